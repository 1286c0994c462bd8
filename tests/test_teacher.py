"""The mean teacher: how it starts, follows, and judges the target."""

import pytest
import reference.segmentation as slow
import torch
from reference.schedule import teacher_after
from tiny import tiny_config, tiny_model
from torch import nn

from t2sda_hf.teacher import (
    class_probabilities,
    ema_momentum,
    make_teacher,
    pseudo_label_weights,
    undoubted,
    update_teacher,
    with_statistics_of,
)

IMAGES = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def student() -> nn.Module:
    """With much dropout and drop path, so that leaving them on would show."""
    return tiny_model(tiny_config("--model={head_dropout: 0.5, drop_path_rate: 0.5}")).train()


# ------------------------------------------------------------------------------------------------------- the copy


def test_the_teacher_starts_as_a_copy_of_parameters_and_buffers(student):
    student(IMAGES)  # moves the running statistics
    teacher = make_teacher(student)
    own, given = teacher.state_dict(), student.state_dict()
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)
    assert not any(
        p.data_ptr() == q.data_ptr() for p, q in zip(teacher.parameters(), student.parameters(), strict=True)
    )


def test_the_teacher_is_frozen_and_the_student_is_not(student):
    teacher = make_teacher(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert student.training


def test_only_batch_norm_is_in_training_mode(student):
    for module in make_teacher(student).modules():
        assert module.training == isinstance(module, nn.BatchNorm2d)


def test_the_teacher_is_not_random(student):
    teacher = make_teacher(student)
    first, second = (teacher(IMAGES, project=True) for _ in range(2))
    assert torch.equal(first.logits, second.logits)
    assert torch.equal(first.embeddings, second.embeddings)
    assert not torch.equal(student(IMAGES).logits, student(IMAGES).logits)


def test_the_teacher_normalises_by_the_batch_at_hand(student):
    """Running statistics, which nobody averages, must not matter."""
    teacher = make_teacher(student)
    before = teacher(IMAGES).logits
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(7.0)
            module.running_var.fill_(100.0)
    assert torch.equal(teacher(IMAGES).logits, before)
    assert not torch.allclose(teacher(IMAGES[:1]).logits, before[:1])


# ------------------------------------------------------------------------------------------------ the moving average


@pytest.mark.parametrize(
    ("done", "momentum"), [(1, 0.5), (2, 2 / 3), (9, 0.9), (998, 1 - 1 / 999), (999, 0.999), (10**6, 0.999)]
)
def test_momentum_of_the_specification(done, momentum):
    assert ema_momentum(done, 0.999) == pytest.approx(momentum, rel=1e-12)


def test_momentum_never_exceeds_its_final_value():
    assert ema_momentum(1, 0.3) == 0.3
    assert [ema_momentum(done, 0.9) for done in (8, 9, 10)] == pytest.approx([8 / 9, 0.9, 0.9])


def test_averaging_after_every_update_equals_daformers_at_the_start_of_the_next():
    weights = [0.0, 3.0, -1.0, 4.0, 1.0, 5.0, 9.0]
    student, teacher = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    teacher.weight.data.fill_(weights[0])
    for done, weight in enumerate(weights[1:], start=1):
        student.weight.data.fill_(weight)
        update_teacher(teacher, student, ema_momentum(done, 0.7))
        assert teacher.weight.item() == pytest.approx(teacher_after(weights[: done + 1], 0.7), abs=1e-6)


def test_update_averages_every_parameter_and_leaves_buffers(student):
    teacher = make_teacher(tiny_model(seed=1))
    student(IMAGES)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    update_teacher(teacher, student, 0.75)
    names = dict(teacher.named_parameters())
    given = student.state_dict()
    for name, value in teacher.state_dict().items():
        expected = 0.75 * before[name] + 0.25 * given[name] if name in names else before[name]
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("momentum", "follows"), [(0.0, "student"), (1.0, "teacher")])
def test_the_ends_of_the_average(student, momentum, follows):
    teacher = make_teacher(tiny_model(seed=1))
    expected = [p.detach().clone() for p in (student if follows == "student" else teacher).parameters()]
    update_teacher(teacher, student, momentum)
    for own, wanted in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(own.detach(), wanted)


def test_update_leaves_the_student_alone_and_records_nothing(student):
    teacher = make_teacher(tiny_model(seed=1))
    before = [p.detach().clone() for p in student.parameters()]
    update_teacher(teacher, student, 0.9)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(p.grad_fn is None and not p.requires_grad for p in teacher.parameters())


def test_an_evaluable_teacher_has_the_students_statistics(student):
    teacher = make_teacher(tiny_model(seed=1))
    for _ in range(3):
        student(IMAGES)
    evaluable = with_statistics_of(teacher, student)
    assert not any(module.training for module in evaluable.modules())
    for own, wanted in zip(evaluable.parameters(), teacher.parameters(), strict=True):
        assert torch.equal(own, wanted)
    for own, wanted in zip(evaluable.buffers(), student.buffers(), strict=True):
        assert torch.equal(own, wanted)
    evaluable(IMAGES)
    assert teacher.decode_head.batch_norm.training  # the teacher itself goes on as before
    assert not torch.equal(teacher.decode_head.batch_norm.running_mean, student.decode_head.batch_norm.running_mean)


# --------------------------------------------------------------------------------------------------- pseudo-labels


def test_pseudo_labels_are_taken_after_upsampling():
    logits = 4 * torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    probabilities = torch.stack([slow.bilinear(image, (9, 16)) for image in logits]).softmax(dim=1)
    confidence, labels = class_probabilities(logits, (9, 16)).max(dim=1)
    assert labels.dtype == torch.int64
    torch.testing.assert_close(confidence, probabilities.max(dim=1).values)
    assert torch.equal(labels, probabilities.argmax(dim=1))
    assert confidence.min() >= 1 / 5


def test_a_label_is_in_doubt_where_a_rarer_class_is_nearly_as_likely():
    shares = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.05, 0.45], [0.2, 0.2, 0.6]]).T[None, :, None]  # (1,K,1,3 pixels)
    labels = shares.argmax(dim=1)
    assert undoubted(shares, labels, torch.tensor([1.0, 1.0, 2.0])).tolist() == [[[True, False, True]]]
    assert undoubted(shares, labels, torch.tensor([1.0, 3.0, 3.0])).tolist() == [[[False, False, True]]]
    assert undoubted(shares, labels, torch.ones(3)).all()


def test_pseudo_labels_of_half_precision_are_float32():
    confidence, _ = class_probabilities(torch.randn(1, 3, 2, 2).bfloat16(), (4, 4)).max(dim=1)
    assert confidence.dtype == torch.float32


@pytest.mark.parametrize("scope", ["batch", "image"])
@pytest.mark.parametrize(("top", "bottom"), [(0, 0), (2, 3), (0, 3), (2, 0), (5, 5)])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.968, 1.0])
def test_weights_equal_the_pixel_loop(scope, top, bottom, threshold):
    confidence = torch.rand(2, 10, 6, generator=torch.Generator().manual_seed(0))
    confidence[0] = confidence[0] ** 0.1  # one image is surer than the other
    weights = pseudo_label_weights(confidence, threshold, scope, top, bottom)
    expected = slow.pseudo_label_weights(confidence, threshold, scope == "image", top, bottom)
    torch.testing.assert_close(weights, expected)


def test_a_pixel_at_the_threshold_counts_and_unsure_pixels_keep_the_weight():
    confidence = torch.tensor([[[0.5, 0.25, 0.75, 0.25]]])
    assert pseudo_label_weights(confidence, 0.5).tolist() == [[[0.5] * 4]]


def test_rows_left_out_count_in_the_share():
    """Paper's crop: 15 rows above, 120 below; only those rows are sure here."""
    confidence = torch.zeros(1, 512, 4)
    confidence[:, :15] = confidence[:, -120:] = 1
    weights = pseudo_label_weights(confidence, 0.968, ignore_top=15, ignore_bottom=120)
    assert weights[0, :, 0].unique().tolist() == pytest.approx([0, 135 / 512])
    assert (weights > 0).sum() == (512 - 135) * 4


def test_scope_decides_whose_pixels_are_counted():
    confidence = torch.stack([torch.ones(2, 2), torch.zeros(2, 2)])
    assert pseudo_label_weights(confidence, 0.9, "batch")[:, 0, 0].tolist() == [0.5, 0.5]
    assert pseudo_label_weights(confidence, 0.9, "image")[:, 0, 0].tolist() == [1, 0]
