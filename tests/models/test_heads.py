import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from t2sda_hf.models.heads import AllMLPHead, DAFormerHead, conv1x1_of_concatenation
from t2sda_hf.models.projector import Projector

B5_WIDTHS = (64, 128, 320, 512)
WIDTHS = (3, 4, 5, 6)


def make_features(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Four levels of an image of odd size: 18x23, 9x12, 5x6, 3x3."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((18, 23), (9, 12), (5, 6), (3, 3))
    return [
        torch.randn(2, channels, *size, generator=generator, dtype=dtype).requires_grad_()
        for channels, size in zip(WIDTHS, sizes, strict=True)
    ]


def resize_and_concatenate(levels: list[Tensor]) -> Tensor:
    size = levels[0].shape[-2:]
    return torch.cat([F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in levels], dim=1)


def shuffle_norms(module: nn.Module) -> None:
    """Give batch norms other values than 1 and 0, so that a forgotten one would show."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.bias, part.running_mean, part.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)


def assert_same_values_and_gradients(module: nn.Module, plain, training: bool) -> None:
    """`module(features)` and `plain(features)`, a slow form with the same parameters, agree to rounding in float64."""
    torch.manual_seed(0)
    shuffle_norms(module)
    module.double().train(training)
    results = []
    for function in (module, plain):
        features = make_features()
        module.zero_grad()
        output = function(features)
        weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (output * weight).sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
        gradients |= {f"level {i}": level.grad for i, level in enumerate(features) if level.grad is not None}
        results.append((output, gradients))
    (output, gradients), (plain_output, plain_gradients) = results
    torch.testing.assert_close(output, plain_output, rtol=1e-10, atol=1e-10)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-9, atol=1e-10, msg=f"gradient of {name}")


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_daformer_head_has_the_published_number_of_parameters():
    assert count(DAFormerHead(B5_WIDTHS, 256, 19)) == 3_712_275


def test_projector_has_the_specified_number_of_parameters():
    assert count(Projector(B5_WIDTHS)) == 328_704


@pytest.mark.parametrize("training", [True, False])
def test_all_mlp_head_equals_its_plain_form(training):
    head = AllMLPHead(WIDTHS, channels=7, num_labels=4, dropout=0.0)

    def plain(features: list[Tensor]) -> Tensor:
        projected = [
            level.proj(one.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            for level, one in zip(head.linear_c, features, strict=True)
        ]
        size = features[0].shape[-2:]
        up = [F.interpolate(one, size=size, mode="bilinear", align_corners=False) for one in projected]
        fused = head.linear_fuse(torch.cat(up[::-1], dim=1))
        return head.classifier(F.relu(head.batch_norm(fused)))

    assert_same_values_and_gradients(head, plain, training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kernel", "in_index", "final_relu"), [(1, (0, 1, 2, 3), True), (1, (1, 3), False), (3, (0, 1, 2, 3), True)]
)
def test_projector_equals_its_plain_form(kernel, in_index, final_relu, training):
    projector = Projector(WIDTHS, in_index, hidden=7, dim=6, kernel=kernel, final_relu=final_relu)

    def plain(features: list[Tensor]) -> Tensor:
        concatenated = resize_and_concatenate([features[index] for index in in_index])
        return projector.block2(projector.block1(concatenated))

    assert_same_values_and_gradients(projector, plain, training)


@pytest.mark.parametrize("training", [True, False])
def test_daformer_head_equals_the_steps_of_the_specification(training):
    head = DAFormerHead(WIDTHS, channels=4, num_labels=3, dilations=(1, 6, 12, 18), dropout=0.0)

    def block(convolution: nn.Module, norm: nn.Module, maps: Tensor, dilation: int, groups: int) -> Tensor:
        padding = dilation * (convolution.weight.shape[-1] // 2)
        maps = F.conv2d(maps, convolution.weight, padding=padding, dilation=dilation, groups=groups)
        return F.relu(norm(maps))

    def plain(features: list[Tensor]) -> Tensor:
        levels = [
            torch.einsum("oc,bchw->bohw", linear.weight, one) + linear.bias[:, None, None]
            for linear, one in zip(head.levels, features, strict=True)
        ]
        fused = resize_and_concatenate(levels)
        outputs = [block(*head.branches[0][:2], fused, 1, 1)]
        for branch, dilation in zip(head.branches[1:], (6, 12, 18), strict=True):
            depthwise, pointwise = branch
            outputs.append(block(*pointwise[:2], block(*depthwise[:2], fused, dilation, 16), 1, 1))
        bottleneck = block(*head.bottleneck[:2], torch.cat(outputs, dim=1), 1, 1)
        return head.classifier(bottleneck)

    assert_same_values_and_gradients(head, plain, training)


def test_conv1x1_of_one_pixel_by_hand():
    fine = torch.tensor([1.0, 3.0]).view(1, 1, 1, 2)
    coarse = torch.tensor([10.0]).view(1, 1, 1, 1)

    result = conv1x1_of_concatenation(
        [fine, coarse], [torch.tensor([[2.0]]), torch.tensor([[0.5]])], torch.tensor([7.0])
    )

    assert result.flatten().tolist() == [2 * 1 + 0.5 * 10 + 7, 2 * 3 + 0.5 * 10 + 7]


@pytest.mark.parametrize("kernel", [1, 3])
def test_embeddings_are_channels_last_and_not_negative(kernel):
    embeddings = Projector(WIDTHS, hidden=8, dim=8, kernel=kernel)(make_features(torch.float32))

    assert embeddings.shape[-2:] == (18, 23)
    assert embeddings.is_contiguous(memory_format=torch.channels_last)
    assert embeddings.min() == 0


def test_without_the_final_relu_embeddings_may_be_negative():
    embeddings = Projector(WIDTHS, hidden=8, dim=8, final_relu=False)(make_features(torch.float32))

    assert embeddings.min() < 0


def test_embeddings_have_the_size_of_the_finest_level_that_is_read():
    embeddings = Projector(WIDTHS, in_index=(2, 3), hidden=8, dim=8)(make_features(torch.float32))

    assert embeddings.shape == (2, 8, 5, 6)


@pytest.mark.parametrize("head_class", [AllMLPHead, DAFormerHead])
def test_dropout_takes_whole_channels_and_only_in_training(head_class):
    head = head_class(WIDTHS, channels=32, num_labels=2, dropout=0.5)
    dropped = head.dropout(torch.ones(4, 32, 3, 3))

    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropped.amin((2, 3)), dropped.amax((2, 3)))
    head.eval()
    features = make_features(torch.float32)
    assert torch.equal(head(features), head(features))


@pytest.mark.parametrize("head_class", [AllMLPHead, DAFormerHead])
def test_the_penultimate_feature_is_what_the_classifier_reads(head_class):
    head = head_class(WIDTHS, channels=8, num_labels=2).eval()
    features = make_features(torch.float32)

    penultimate = head.penultimate(features)

    assert penultimate.shape == (2, 8, 18, 23)
    assert penultimate.min() >= 0
    assert torch.equal(head.classifier(penultimate), head(features))
