"""Cross-entropy with DAFormer's denominator: all pixels."""

import math

import pytest
import reference.segmentation as slow
import torch
import torch.nn.functional as F

from t2sda_hf.losses.segmentation import as_probabilities, segmentation_loss

K = 3


def given(size: tuple[int, int] = (4, 6)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, K, *size, generator=random, dtype=torch.float64)
    labels = torch.randint(0, K + 1, (2, 4, 6), generator=random)
    labels[labels == K] = 255
    return logits.float(), labels, torch.rand(2, 4, 6, generator=random)


@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_loop_over_pixels(weighted):
    logits, labels, weights = given()
    pixel_weights = weights if weighted else None
    expected = slow.cross_entropy(logits, labels, pixel_weights)
    assert segmentation_loss(logits, labels, pixel_weights).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
def test_probabilities_of_labels_are_these_labels(weighted):
    logits, labels, weights = given((2, 3))
    weights = weights if weighted else None
    certain = as_probabilities(labels, K)
    assert certain.sum(dim=1).equal((labels != 255).float())
    assert segmentation_loss(logits, certain, weights).item() == pytest.approx(
        segmentation_loss(logits, labels, weights).item(), rel=1e-6
    )


def test_of_probabilities_the_loss_is_their_mean_over_labels():
    logits, labels, weights = given()
    shares = torch.rand(2, K, 4, 6, generator=torch.Generator().manual_seed(1)).softmax(dim=1)
    of_class = [segmentation_loss(logits, torch.full_like(labels, k), weights * shares[:, k]) for k in range(K)]
    torch.testing.assert_close(segmentation_loss(logits, shares, weights), sum(of_class))


@pytest.mark.parametrize("size", [(2, 3), (1, 2), (3, 5)])
def test_logits_are_upsampled_between_pixel_centres(size):
    logits, labels, weights = given(size)
    upsampled = torch.stack([slow.bilinear(image, (4, 6)) for image in logits])
    expected = slow.cross_entropy(upsampled, labels, weights)
    assert segmentation_loss(logits, labels, weights).item() == pytest.approx(expected, rel=1e-5)


def test_no_idea_costs_the_logarithm_of_the_classes():
    loss = segmentation_loss(torch.zeros(2, 19, 4, 4), torch.full((2, 16, 16), 7))
    assert loss.item() == pytest.approx(math.log(19))


def test_ignoring_half_of_the_area_halves_the_loss():
    logits, labels = torch.zeros(1, K, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64)
    whole = segmentation_loss(logits, labels)
    labels[:, :2] = 255
    assert segmentation_loss(logits, labels).item() == pytest.approx(whole.item() / 2)


def test_zero_weights_count_in_the_denominator_too():
    logits, labels, weights = torch.zeros(1, K, 4, 4), torch.zeros(1, 4, 4, dtype=torch.int64), torch.ones(1, 4, 4)
    weights[:, 0] = 0
    weights[:, 1] = 0.5
    share = (4 * 0 + 4 * 0.5 + 8 * 1) / 16
    assert segmentation_loss(logits, labels, weights).item() == pytest.approx(share * math.log(K))


def test_everything_ignored_is_zero_with_gradients():
    logits = torch.randn(2, K, 4, 6, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((2, 4, 6), 255))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_pixels_have_no_gradient_and_the_others_that_of_their_share():
    logits, labels, weights = given()
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(segmentation_loss(logits, labels, weights), logits)
    assert (gradient.abs().sum(dim=1)[labels == 255] == 0).all()
    one_hot = F.one_hot(labels.clamp(max=K), K + 1)[..., :K].permute(0, 3, 1, 2)
    expected = (logits.softmax(dim=1) - one_hot) * (weights * (labels != 255))[:, None] / labels.numel()
    torch.testing.assert_close(gradient, expected)


def test_half_precision_logits_give_a_float32_loss():
    logits, labels, weights = given()
    loss = segmentation_loss(logits.bfloat16(), labels, weights)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(segmentation_loss(logits, labels, weights).item(), rel=0.02)


@pytest.mark.parametrize("size", [(2, 3), (4, 6)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_loss_and_gradient_are_those_of_the_plain_form(size, memory_format, monkeypatch):
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(2, K, *size, generator=random, dtype=torch.float64).contiguous(memory_format=memory_format)
    _, labels, weights = given()
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)  # so that it stays in float64
    results = []
    for form in ("ours", "plain"):
        own = logits.detach().requires_grad_()
        if form == "ours":
            loss = segmentation_loss(own, labels, weights.double())
        else:
            large = F.interpolate(own.contiguous(), size=(4, 6), mode="bilinear", align_corners=False)
            loss = (F.cross_entropy(large, labels, ignore_index=255, reduction="none") * weights.double()).mean()
        results.append((loss, torch.autograd.grad(loss, own)[0]))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
