import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2sda_hf.models.projector import Projector

B5_WIDTHS = (64, 128, 320, 512)
B0_WIDTHS = (32, 64, 160, 256)
WIDTHS = (3, 4, 5, 6)
# The levels of an image of 70 x 91 pixels.
SIZES = ((18, 23), (9, 12), (5, 6), (3, 3))


def make_features(widths: tuple[int, ...] = WIDTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, *size, generator=generator) for channels, size in zip(widths, SIZES, strict=True)]


def make_projector(*args, seed: int = 0, **kwargs) -> Projector:
    """A projector whose norms are not the identity, so that a forgotten one would show."""
    torch.manual_seed(seed)
    projector = Projector(*args, **kwargs)
    for part in projector.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return projector


def plain_projector(
    tensors: dict[str, Tensor], features: list[Tensor], training: bool, final_relu: bool = True
) -> Tensor:
    """The two Conv-BN-ReLU blocks of method 1.6 word by word; running statistics in `tensors` move on as well."""
    size = features[0].shape[-2:]
    maps = torch.cat([F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in features], dim=1)
    for block in ("block1", "block2"):
        weight = tensors[f"{block}.0.weight"]
        maps = F.conv2d(maps, weight, padding=weight.shape[-1] // 2)
        maps = F.batch_norm(
            maps,
            tensors[f"{block}.1.running_mean"],
            tensors[f"{block}.1.running_var"],
            tensors[f"{block}.1.weight"],
            tensors[f"{block}.1.bias"],
            training=training,
            momentum=0.1,
            eps=1e-5,
        )
        if block == "block1" or final_relu:
            maps = F.relu(maps)
    return maps


@pytest.mark.parametrize(
    ("widths", "settings", "expected"),
    [
        (B5_WIDTHS, {}, 328_704),
        # sum of widths * 256 + 256 * 256, times 9 for a 3x3 kernel, and 2 * 2 * 256 of the norms
        (B0_WIDTHS, {}, 512 * 256 + 256 * 256 + 1024),
        (B5_WIDTHS, {"kernel": 3}, 9 * (1024 * 256 + 256 * 256) + 1024),
        (B5_WIDTHS, {"in_index": (3,)}, 512 * 256 + 256 * 256 + 1024),
        (B5_WIDTHS, {"hidden": 64, "dim": 32}, 1024 * 64 + 64 * 32 + 2 * 64 + 2 * 32),
    ],
)
def test_number_of_parameters(widths, settings, expected):
    projector = Projector(widths, **settings)

    assert sum(parameter.numel() for parameter in projector.parameters()) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kernel", "in_index", "final_relu"),
    [(1, (0, 1, 2, 3), True), (1, (0, 1, 2, 3), False), (1, (1, 3), True), (3, (0, 1, 2, 3), True), (3, (2,), False)],
)
def test_values_gradients_and_statistics_equal_the_plain_form(kernel, in_index, final_relu, training):
    """In float32 and at B5's widths: the shortcut of kernel 1 loses nothing that float32 would have kept."""
    projector = make_projector(B5_WIDTHS, in_index, hidden=32, dim=24, kernel=kernel, final_relu=final_relu).train(
        training
    )
    ours = [one.requires_grad_() for one in make_features(B5_WIDTHS)]
    theirs = [one.requires_grad_() for one in make_features(B5_WIDTHS)]
    tensors = {name: tensor.clone() for name, tensor in projector.state_dict().items()}
    for name, _ in projector.named_parameters():
        tensors[name].requires_grad_()

    embeddings = projector(ours)
    expected = plain_projector(tensors, [theirs[index] for index in in_index], training, final_relu)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (embeddings * direction).sum().backward()
    (expected * direction).sum().backward()

    def assert_close(one: Tensor, other: Tensor, name: str) -> None:
        assert (one - other).abs().max() <= 1e-5 * other.abs().max(), name

    assert_close(embeddings, expected, "embeddings")
    for name, parameter in projector.named_parameters():
        assert_close(parameter.grad, tensors[name].grad, name)
    for name, buffer in projector.named_buffers():
        if buffer.is_floating_point():
            assert_close(buffer, tensors[name], name)
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        if index in in_index:
            assert_close(one.grad, other.grad, f"level {index}")
        else:
            assert one.grad is None


def test_one_channel_by_hand():
    """Constant maps a, b: relu(s * v * relu(s * (w1 a + w2 b))) with s = 1/sqrt(1 + eps) of fresh norms."""
    projector = Projector((1, 1), in_index=(0, 1), hidden=1, dim=1).eval()
    with torch.no_grad():
        projector.block1[0].weight.copy_(torch.tensor([2.0, -0.5]).view(1, 2, 1, 1))
        projector.block2[0].weight.fill_(3.0)

    embeddings = projector([torch.full((1, 1, 4, 6), 5.0), torch.full((1, 1, 2, 3), 4.0)])

    scale = 1 / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(embeddings, torch.full((1, 1, 4, 6), scale * 3 * scale * (2 * 5 - 0.5 * 4)))
    negative = projector([torch.full((1, 1, 4, 6), -5.0), torch.full((1, 1, 2, 3), 4.0)])
    assert torch.equal(negative, torch.zeros(1, 1, 4, 6))


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("in_index", "size"), [((0, 1, 2, 3), (18, 23)), ((1, 2), (9, 12)), ((3,), (3, 3))])
def test_size_is_that_of_the_first_level_read_and_layout_is_channels_last(kernel, in_index, size):
    projector = make_projector(WIDTHS, in_index, hidden=8, dim=16, kernel=kernel)

    embeddings = projector(make_features())

    assert embeddings.shape == (2, 16, *size)
    assert embeddings.is_contiguous(memory_format=torch.channels_last)
    assert embeddings[0, :, 0, 0].is_contiguous()


def test_the_layout_of_the_features_does_not_matter():
    projector = make_projector(WIDTHS, hidden=8, dim=8).eval()
    features = make_features()

    again = projector([one.contiguous(memory_format=torch.channels_last) for one in features])

    torch.testing.assert_close(again, projector(features), rtol=1e-6, atol=1e-6)


def test_levels_that_are_not_read_change_nothing():
    projector = make_projector(WIDTHS, (1, 3), hidden=8, dim=8).eval()
    features = make_features()
    before = projector(features)

    for level, changes in ((0, False), (1, True), (2, False), (3, True)):
        others = list(features)
        others[level] = others[level] + 1
        assert torch.equal(projector(others), before) is not changes


@pytest.mark.parametrize(("kernel", "reach"), [(1, 0), (3, 2)])
def test_a_pixel_reaches_as_far_as_the_two_kernels(kernel, reach):
    projector = make_projector(WIDTHS, hidden=16, dim=16, kernel=kernel, final_relu=False).eval()
    features = make_features()
    before = projector(features)
    features[0][0, :, 7, 11] += 1

    changed = (projector(features) != before).any(dim=1).nonzero()

    assert changed.amin(0).tolist() == [0, 7 - reach, 11 - reach]
    assert changed.amax(0).tolist() == [0, 7 + reach, 11 + reach]


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_final_relu_only_clips(kernel):
    """The same weights load with and without it, and embeddings differ in their negative part alone."""
    clipped = make_projector(WIDTHS, hidden=8, dim=8, kernel=kernel)
    free = make_projector(WIDTHS, hidden=8, dim=8, kernel=kernel, final_relu=False, seed=1)
    free.load_state_dict(clipped.state_dict())

    embeddings, signed = clipped(make_features()), free(make_features())

    assert embeddings.min() == 0
    assert signed.min() < 0
    assert torch.equal(embeddings, signed.relu())
