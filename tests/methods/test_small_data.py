"""What small data needs and the paper's recipes leave off: class weights, a warm-up, the target's statistics."""

from copy import deepcopy

import pytest
import torch
from tiny import CLASSES, tiny_batch, tiny_config, tiny_graphs, tiny_networks, together
from torch import Generator, nn

from t2sda_hf.batch import normalize
from t2sda_hf.losses.segmentation import segmentation_loss
from t2sda_hf.methods import ClassMemory
from t2sda_hf.teacher import make_teacher, take_statistics

CALM = "--model={head_dropout: 0, drop_path_rate: 0}"
BALANCED = "--balance.labelled=inverse_root"


# ------------------------------------------------------------------------------------------------------ class weights


def weights_after(counts: list[float], cap: float) -> torch.Tensor:
    memory = ClassMemory(len(counts), 4)
    memory.labelled_pixels += torch.tensor(counts).double()
    return memory.class_weights(cap)


def test_weights_are_the_inverse_root_of_the_share_and_1_on_average():
    weights = weights_after([81.0, 16.0, 3.0], cap=100)
    torch.testing.assert_close(weights[0] / weights[1], torch.tensor(4 / 9))
    assert (weights * torch.tensor([0.81, 0.16, 0.03])).sum().item() == pytest.approx(1)


def test_shares_are_of_all_pixels_so_far():
    cfg = tiny_config(CALM, BALANCED)
    memory, counts = ClassMemory(len(CLASSES), cfg.projector.dim), torch.zeros(len(CLASSES))
    for seed in (0, 1):
        batch = tiny_batch(cfg, seed)
        together(tiny_graphs(cfg, batch=batch, memory=memory))
        counts += torch.stack([(batch.source_labels == k).sum() for k in range(len(CLASSES))])
    assert torch.equal(memory.labelled_pixels, counts.double())


def test_no_weight_is_above_the_cap_and_a_class_that_never_occurred_has_one():
    assert weights_after([1e6, 1.0, 0.0], cap=5)[1:].tolist() == [5, 5]
    assert torch.isfinite(weights_after([0.0, 0.0, 0.0], cap=5)).all()


@pytest.mark.parametrize("method", ["source_only", "generalization", "t2sda"])
def test_the_loss_of_labelled_pixels_is_weighed(method):
    blind = ["--translate.engine=gaussian_blur", "--drw.apply_to=none"] if method == "generalization" else []
    cfg = tiny_config(f"--method={method}", *blind, CALM, BALANCED, "--balance.cap=3")
    batch = tiny_batch(cfg)
    assert (batch.source_labels == 255).any()
    networks, seen = tiny_networks(cfg), []
    networks.student.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    (source, *_) = tiny_graphs(cfg, networks, batch)
    labels = batch.source_labels
    counts = torch.stack([(labels == k).sum() for k in range(len(CLASSES))]).double()
    by_hand = ((counts / counts.sum()).rsqrt() / (counts / counts.sum()).sqrt().sum()).clamp(max=3).float()
    weights = torch.where(labels == 255, 0, by_hand[labels.clamp(max=len(CLASSES) - 1)])
    logits = tiny_networks(cfg).student(seen[0]).logits
    assert source.losses["source"].item() == pytest.approx(segmentation_loss(logits, labels, weights).item(), rel=1e-5)


def test_labelled_pixels_keep_their_weight_where_they_are_pasted_and_pseudo_labels_get_none():
    cfg = tiny_config(CALM, BALANCED)
    batch, memory = tiny_batch(cfg), ClassMemory(len(CLASSES), cfg.projector.dim)
    _, seen = together(tiny_graphs(cfg, batch=batch, memory=memory))
    plain = together(tiny_graphs(tiny_config(CALM), batch=batch))[1]
    shares = memory.labelled_pixels / memory.labelled_pixels.sum()
    by_class = (shares.rsqrt() / shares.sqrt().sum()).clamp(max=10).float()
    pasted = seen["from_source"] & (batch.source_labels != 255)
    assert by_class.unique().numel() > 1
    assert pasted.any()
    torch.testing.assert_close(seen["mixed_weights"][pasted], by_class[batch.source_labels[pasted]])
    of_teacher = ~seen["from_source"]
    torch.testing.assert_close(seen["mixed_weights"][of_teacher], plain["mixed_weights"][of_teacher])


@pytest.mark.parametrize("labelled", ["none", "inverse_root"])
def test_a_pseudo_label_in_doubt_is_not_learned(labelled):
    """By a loop over pixels: its class must win again when all classes are weighed."""
    cfg = tiny_config(CALM, f"--balance={{labelled: {labelled}, doubt: 1}}")
    batch, memory = tiny_batch(cfg), ClassMemory(len(CLASSES), cfg.projector.dim)
    _, seen = together(tiny_graphs(cfg, batch=batch, memory=memory))
    sure = together(tiny_graphs(tiny_config(CALM, f"--balance.labelled={labelled}"), batch=batch))[1]
    size = seen["pseudo_labels"].shape[-2:]
    logits = torch.nn.functional.interpolate(seen["teacher_logits"], size=size, mode="bilinear", align_corners=False)
    wanted = sure["pixel_weights"].clone()
    for image, row, column in torch.ones_like(wanted).nonzero().tolist():
        shares = [
            p * w for p, w in zip(logits[image, :, row, column].softmax(0), memory.class_weights(10), strict=True)
        ]
        if max(range(len(shares)), key=shares.__getitem__) != seen["pseudo_labels"][image, row, column]:
            wanted[image, row, column] = 0
    assert torch.equal(seen["pseudo_labels"], sure["pseudo_labels"])
    assert torch.equal(seen["pixel_weights"], wanted)
    assert (wanted != sure["pixel_weights"]).any()
    assert (wanted > 0).any()


@pytest.mark.parametrize("more", ["--uda={weight_scope: class, class_share: 1}", "--uda.pseudo_labels=soft"])
def test_doubt_takes_weight_away_whatever_else_weighs(more):
    cfg, plain = tiny_config(CALM, more, "--balance.doubt=1"), tiny_config(CALM, more)
    batch = tiny_batch(cfg)
    doubting, trusting = (together(tiny_graphs(own, batch=batch))[1]["pixel_weights"] for own in (cfg, plain))
    kept = doubting > 0
    assert torch.equal(doubting[kept], trusting[kept])
    assert 0 < kept.sum() < (trusting > 0).sum()


def test_a_class_that_no_label_shows_puts_nothing_in_doubt():
    """Not of SYNTHIA's 19 classes those three that it does not have."""
    cfg = tiny_config(CALM, "--balance.doubt=1")
    batch = tiny_batch(cfg)
    batch.source_labels[batch.source_labels == 1] = 255
    memory = ClassMemory(len(CLASSES), cfg.projector.dim)
    _, seen = together(tiny_graphs(cfg, batch=batch, memory=memory))
    _, trusting = together(tiny_graphs(tiny_config(CALM), batch=batch))
    assert memory.labelled_pixels[1] == 0
    size = seen["pseudo_labels"].shape[-2:]
    logits = torch.nn.functional.interpolate(seen["teacher_logits"], size=size, mode="bilinear", align_corners=False)
    weights = memory.class_weights(10)
    weights[1] = weights.min()
    wanted = (logits.softmax(dim=1) * weights[:, None, None]).argmax(dim=1) == seen["pseudo_labels"]
    assert torch.equal(seen["pixel_weights"], trusting["pixel_weights"] * wanted)


@pytest.mark.parametrize("method", ["generalization", "source_free", "distil"])
def test_a_doubt_that_would_do_nothing_is_refused(method):
    needs = {
        "generalization": ["--translate.engine=gaussian_blur", "--drw.apply_to=none"],
        "source_free": ["--start_model=finished"],
        "distil": ["--start_model=finished"],
    }
    with pytest.raises(ValueError, match=r"balance\.doubt must be 0 with method"):
        tiny_config(f"--method={method}", "--balance.doubt=1", *needs[method])


# ------------------------------------------------------------------------------------------------ soft pseudo-labels


SOFT = "--uda.pseudo_labels=soft"


@pytest.mark.parametrize("also", [[], ["--loss_weights.masked_consistency=1", "--patch_mask.block_size=16"]])
def test_the_target_is_learned_from_all_probabilities_and_pasted_pixels_from_their_labels(also):
    cfg = tiny_config(CALM, SOFT, *also)
    networks, logits = tiny_networks(cfg), []
    networks.student.register_forward_hook(lambda *args: logits.append(args[2].logits))
    losses, seen = together(tiny_graphs(cfg, networks, tiny_batch(cfg)))
    size = seen["mixed_labels"].shape[-2:]

    def upsampled(maps):
        return torch.nn.functional.interpolate(maps.double(), size=size, mode="bilinear", align_corners=False)

    wanted = upsampled(seen["teacher_logits"]).softmax(dim=1)
    mixed = wanted.clone()
    for image, row, column in seen["from_source"].nonzero().tolist():
        label = seen["mixed_labels"][image, row, column].item()
        mixed[image, :, row, column] = 0
        if label != 255:
            mixed[image, label, row, column] = 1
    given = {"target": (logits[1], mixed, seen["mixed_weights"])}
    if also:
        given["masked_consistency"] = (logits[2], wanted, seen["pixel_weights"])
    for name, (seen_logits, probabilities, weights) in given.items():
        by_hand = (-(probabilities * upsampled(seen_logits).log_softmax(dim=1)).sum(dim=1) * weights).mean()
        assert losses[name].item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_teacher_that_is_certain_gives_the_same_soft_or_hard():
    def losses(*more):
        cfg = tiny_config(CALM, *more)
        networks = tiny_networks(cfg)
        for parameter in networks.teacher.decode_head.classifier.parameters():
            parameter.mul_(1e4)
        return together(tiny_graphs(cfg, networks, tiny_batch(cfg)))[0]

    # Between two cells of the teacher's map even a certain one is not: so few of these pixels are.
    hard, soft = losses(), losses(SOFT)
    assert soft["target"].item() == pytest.approx(hard["target"].item(), rel=2e-3)
    assert soft["pull"] == hard["pull"]
    assert soft["source"] == hard["source"]


# -------------------------------------------------------------------------------------------------- warm-up and colours


@pytest.mark.parametrize(("pull_start", "without_pull"), [(0, []), (7, [5, 6])])
def test_in_the_source_phase_there_is_the_source_alone(pull_start, without_pull):
    cfg = tiny_config(CALM, "--uda.source_phase=0.5", "--train.max_steps=10", f"--pull.start_step={pull_start}")
    for index in range(10):
        networks, asked = tiny_networks(cfg), []
        networks.teacher.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
        losses = [name for graph in tiny_graphs(cfg, networks, index=index) for name in graph.losses]
        pulls = index >= 5 and index not in without_pull
        assert losses == ["source", *(["target"] * (index >= 5)), *(["pull"] * pulls)]
        assert bool(asked) == (index >= 5)


@pytest.mark.parametrize("phase", [0, 0.5])
def test_the_source_loss_takes_turns(phase):
    cfg = tiny_config(CALM, "--uda.source_ce_on=both", f"--uda.source_phase={phase}", "--train.max_steps=4")
    batch = tiny_batch(cfg)
    for index in range(4):
        networks, given = tiny_networks(cfg), []
        networks.student.register_forward_pre_hook(lambda _, args, given=given: given.append(args[0]))
        first = next(iter(tiny_graphs(cfg, networks, batch, index=index)))
        translated = first.seen["pseudo_target_images"]
        expected = translated if index % 2 else batch.source_images
        torch.testing.assert_close(given[0], normalize(expected))
        # What is not looked at is not made.
        assert torch.equal(translated, batch.source_images) == (index % 2 == 0 and index < 4 * phase)


def test_distorted_as_the_lower_bound_does():
    cfg = tiny_config(
        CALM, "--augment.source=photometric", "--loss_weights={target: 0, pull: 0}", "--translate.engine=none"
    )
    ours = together(tiny_graphs(cfg, batch=tiny_batch(cfg), seed=3))[0]
    bound = together(tiny_graphs(tiny_config(CALM, "--method=source_only"), batch=tiny_batch(cfg), seed=3))[0]
    assert ours["source"] == bound["source"]


# ------------------------------------------------------------------------------------------ statistics of the target


def batches(seed: int) -> list[torch.Tensor]:
    generator = Generator().manual_seed(seed)
    return [normalize(torch.rand(2, 3, 32, 64, generator=generator)) for _ in range(3)]


def test_statistics_are_the_average_over_the_batches():
    network = tiny_networks(tiny_config("--model={head_dropout: 0.5, drop_path_rate: 0.5}")).student.train()
    before = deepcopy(network.state_dict())
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    norm = next(module for module in network.decode_head.modules() if isinstance(module, nn.BatchNorm2d))
    means, variances = [], []

    def look(_, args):
        means.append(args[0].mean(dim=(0, 2, 3)))
        variances.append(args[0].var(dim=(0, 2, 3)))

    handle = norm.register_forward_pre_hook(look)
    take_statistics(network, batches(0))
    handle.remove()
    torch.testing.assert_close(norm.running_mean, torch.stack(means).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert all(module.training for module in network.modules())
    assert norm.momentum == 0.1
    assert [one.num_batches_tracked.item() for one in norms] == [len(means)] * len(norms)  # the projector's, too
    assert len(norms) > 1
    after = network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)


def test_statistics_do_not_depend_on_what_was_there():
    student = tiny_networks(tiny_config()).student
    other = deepcopy(student)
    other.train()(batches(7)[0])
    for network in (student, other):
        take_statistics(network, batches(0))
    for own, given in zip(student.buffers(), other.buffers(), strict=True):
        assert torch.equal(own, given)


def test_a_teacher_keeps_its_modes():
    teacher = make_teacher(tiny_networks(tiny_config()).student)
    modes = [module.training for module in teacher.modules()]
    take_statistics(teacher, batches(0))
    assert [module.training for module in teacher.modules()] == modes
