"""ResNet v1c and DeepLab-V2: sizes, the dilated form against transformers' strided one, and files of other code."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, ResNetConfig, ResNetModel

from t2sda_hf.config import OptimConfig, load_config
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, load_pretrained_encoder
from t2sda_hf.models.heads import DeepLabV2Head
from t2sda_hf.models.resnet import ResNetV1cEncoder
from t2sda_hf.training.build import build_student
from t2sda_hf.training.optim import make_optimizer

WIDTHS, DEPTHS = (16, 32, 48, 64), (1, 2, 3, 2)


def build(seed: int = 0, **fields) -> T2SDAForSemanticSegmentation:
    torch.manual_seed(seed)
    small = {"hidden_sizes": WIDTHS, "depths": DEPTHS, "projector_dim": 8, "projector_hidden": 8, "num_labels": 5}
    return T2SDAForSemanticSegmentation(T2SDAConfig.from_size("resnet101c", **(small | fields)))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module")
def paper_model() -> T2SDAForSemanticSegmentation:
    """ResNet-101 with DeepLab-V2 in full size, without the memory for it."""
    with torch.device("meta"):
        return T2SDAForSemanticSegmentation(T2SDAConfig.from_size("resnet101c", num_labels=19))


# ------------------------------------------------------------------------------------------------------------ sizes


def test_number_of_parameters(paper_model):
    """timm lists resnet101c with 44.57 M, of which the classifier is 2,049,000. Head: 2·(9·2048·19 + 19)."""
    assert count(paper_model.resnet) == 44_568_392 - 2_049_000
    assert count(paper_model.decode_head) == 700_454
    assert count(paper_model.projector) == (2048 * 256 + 2 * 256) + (256 * 256 + 2 * 256)
    assert not hasattr(paper_model, "segformer")


@pytest.mark.parametrize(("height", "width"), [(512, 512), (96, 160), (70, 91)])
def test_maps_have_strides_4_8_8_8_and_logits_and_embeddings_8(paper_model, height, width):
    output = paper_model(torch.empty(2, 3, height, width, device="meta"), project=True, output_hidden_states=True)
    fine, coarse = ((-(-height // stride), -(-width // stride)) for stride in (4, 8))
    assert [tuple(one.shape) for one in output.hidden_states] == [
        (2, 256, *fine),
        (2, 512, *coarse),
        (2, 1024, *coarse),
        (2, 2048, *coarse),
    ]
    assert output.logits.shape == (2, 19, *coarse)
    assert output.embeddings.shape == (2, 256, *coarse)


def test_strides_and_contracted_dilations(paper_model):
    layers = [getattr(paper_model.resnet, f"layer{stage}") for stage in (1, 2, 3, 4)]
    assert [len(layer) for layer in layers] == [3, 4, 23, 3]
    dilations = [[block.conv2.dilation[0] for block in layer] for layer in layers]
    assert dilations == [[1] * 3, [1] * 4, [1] + [2] * 22, [2] + [4] * 2]
    strides = [[block.conv2.stride[0] for block in layer] for layer in layers]
    assert strides == [[1] * 3, [2] + [1] * 3, [1] * 23, [1] * 3]
    assert all(block.conv1.stride == (1, 1) for layer in layers for block in layer)  # v1.5: the 3x3 has the stride


# ----------------------------------------------------------------------------------- against another implementation


def as_transformers(encoder: ResNetV1cEncoder) -> ResNetModel:
    """The stages of transformers' ResNet, which has no dilation but strides of 2, with the same weights."""
    twin = ResNetModel(
        ResNetConfig(
            embedding_size=WIDTHS[0] // 4, hidden_sizes=list(WIDTHS), depths=list(DEPTHS), layer_type="bottleneck"
        )
    ).eval()
    for layer, stage in zip((1, 2, 3, 4), twin.encoder.stages, strict=True):
        for block, other in zip(getattr(encoder, f"layer{layer}"), stage.layers, strict=True):
            for index, part in enumerate(other.layer, start=1):
                part.convolution.load_state_dict(getattr(block, f"conv{index}").state_dict())
                part.normalization.load_state_dict(getattr(block, f"bn{index}").state_dict())
            if not isinstance(block.downsample, nn.Identity):
                other.shortcut.convolution.load_state_dict(block.downsample[0].state_dict())
                other.shortcut.normalization.load_state_dict(block.downsample[1].state_dict())
    return twin


def test_every_other_pixel_of_a_dilated_stage_is_the_strided_network(randomize):
    """With contracted dilation, and with it alone: the strided net's stages 3 and 4 are every 2nd and 4th pixel."""
    encoder = randomize(build().resnet).eval().double()
    twin = as_transformers(encoder).double()
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    maps = encoder(images).hidden_states
    expected = twin.encoder(encoder.maxpool(encoder.stem(images)), output_hidden_states=True).hidden_states[1:]

    for one, other, step in zip(maps, expected, (1, 1, 2, 4), strict=True):
        torch.testing.assert_close(one[..., ::step, ::step], other, rtol=1e-10, atol=1e-10)
        assert other.std() > 1e-3


def test_the_stem_is_three_convolutions_of_which_the_first_halves(randomize):
    encoder = randomize(build().resnet).eval()
    images = torch.randn(1, 3, 33, 40)
    hidden = images
    for position, stride in ((0, 2), (3, 1), (6, 1)):
        convolution, norm = encoder.stem[position], encoder.stem[position + 1]
        hidden = F.relu(norm(F.conv2d(hidden, convolution.weight, stride=stride, padding=1)))
    assert [encoder.stem[position].weight.shape[:2] for position in (0, 3, 6)] == [(2, 3), (2, 2), (4, 2)]
    assert torch.equal(encoder.stem(images), hidden)
    assert encoder.maxpool(hidden).shape == (1, 4, 9, 10)


# ------------------------------------------------------------------------------------------------------- DeepLab-V2


def test_the_head_is_a_sum_of_two_dilated_convolutions():
    """Pixel by pixel from the definition: 3x3 taps at distance 6 and 12, zeros outside."""
    torch.manual_seed(0)
    head = DeepLabV2Head(3, 2).double()
    maps = torch.randn(1, 3, 15, 16, dtype=torch.float64)
    expected = torch.zeros(1, 2, 15, 16, dtype=torch.float64)
    for branch, distance in zip(head.branches, (6, 12), strict=True):
        for y in range(15):
            for x in range(16):
                expected[0, :, y, x] += branch.bias
                for i in range(3):
                    for j in range(3):
                        v, u = y + (i - 1) * distance, x + (j - 1) * distance
                        if 0 <= v < 15 and 0 <= u < 16:
                            expected[0, :, y, x] += branch.weight[:, :, i, j] @ maps[0, :, v, u]
    torch.testing.assert_close(head([torch.zeros(1, 1, 30, 32), maps]), expected, rtol=1e-10, atol=1e-12)


def test_the_head_starts_near_zero_and_four_branches_are_a_choice():
    branches = build(hidden_sizes=(64, 128, 256, 512), depths=(1, 1, 1, 1)).decode_head.branches
    assert [branch.dilation[0] for branch in branches] == [6, 12]
    for branch in branches:
        assert branch.weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert branch.bias.abs().max() == 0
    four = build(head_dilations=(6, 12, 18, 24))
    assert [branch.padding[0] for branch in four.decode_head.branches] == [6, 12, 18, 24]


def test_a_resnet_may_have_the_other_heads():
    for head in ("daformer", "all_mlp"):
        model = build(head=head, decoder_hidden_size=8, projector_in_index=(0, 1, 2, 3))
        output = model(torch.randn(2, 3, 64, 96), project=True)
        assert output.logits.shape == (2, 5, 16, 24)
        assert output.embeddings.shape == (2, 8, 16, 24)


# ---------------------------------------------------------------------------------------------- training and saving


def test_gradients_reach_every_parameter_and_batch_norm_learns():
    model = build().train()
    before = model.resnet.stem[1].running_mean.clone()
    output = model(torch.randn(2, 3, 64, 64), project=True)
    (output.logits.square().sum() + output.embeddings.square().sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert not torch.equal(model.resnet.stem[1].running_mean, before)


def test_the_whole_resnet_is_decayed_at_the_encoders_rate():
    """Method 4.2: no exception for its batch norm."""
    model = build()
    groups = make_optimizer(model.encoder, model, OptimConfig()).param_groups
    encoder, norms, rest = groups
    assert (encoder["lr"], encoder["weight_decay"]) == (6e-5, 0.01)
    assert (rest["lr"], rest["weight_decay"]) == (pytest.approx(6e-4), 0.01)
    assert {id(p) for p in encoder["params"]} == {id(p) for p in model.resnet.parameters()}
    assert norms["params"] == []
    assert {id(p) for p in rest["params"]} == {
        id(p) for part in (model.decode_head, model.projector) for p in part.parameters()
    }


def test_a_saved_model_comes_back(tmp_path, randomize):
    model = randomize(build()).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 70, 91)
    assert (loaded.config.encoder, loaded.config.head_dilations) == ("resnet", (6, 12))
    assert torch.equal(loaded(images).logits, model(images).logits)


def test_a_checkpoint_without_a_tensor_of_the_resnet_is_refused(tmp_path):
    build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["resnet.layer3.1.conv2.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 tensors of the encoder: resnet\.layer3\.1\.conv2\.weight"):
        T2SDAForSemanticSegmentation.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------- weights of other code


TIMM_STEM = {"stem.0": "conv1.0", "stem.1": "conv1.1", "stem.3": "conv1.3", "stem.4": "conv1.4", "stem.6": "conv1.6"}
TIMM_STEM |= {"stem.7": "bn1"}


@pytest.fixture
def source(randomize) -> dict[str, Tensor]:
    """Tensors of a trained encoder, in open-mmlab's names, and the classifier that comes with them."""
    return randomize(build(seed=1).resnet).state_dict() | {"fc.weight": torch.ones(9, 64), "fc.bias": torch.ones(9)}


def in_timm_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    named = {}
    for name, tensor in tensors.items():
        stem = next((ours for ours in TIMM_STEM if name.startswith(f"{ours}.")), None)
        named[name if stem is None else TIMM_STEM[stem] + name.removeprefix(stem)] = tensor
    return named


def write(path: Path, tensors: dict[str, Tensor], kind: str) -> Path:
    path.mkdir(exist_ok=True)
    if kind == "safetensors folder":
        save_file(tensors, path / "model.safetensors")
        return path
    if kind == "safetensors file":
        save_file(tensors, path / "any.safetensors")
        return path / "any.safetensors"
    if kind == "bin folder":
        torch.save(tensors, path / "pytorch_model.bin")
        return path
    torch.save({"state_dict": tensors, "meta": {"epoch": 3}}, path / "resnet101_v1c.pth")
    return path / "resnet101_v1c.pth"


@pytest.mark.parametrize("kind", ["safetensors folder", "safetensors file", "bin folder", "open-mmlab file"])
@pytest.mark.parametrize("names", ["open-mmlab", "open-mmlab with prefix", "timm"])
def test_every_tensor_is_loaded(tmp_path, source, kind, names):
    tensors = source
    if names == "timm":
        tensors = in_timm_names(source)
        assert "conv1.0.weight" in tensors
        assert "bn1.running_var" in tensors
    elif names != "open-mmlab":
        tensors = {f"backbone.{name}": tensor for name, tensor in source.items()} | {"decode_head.x": torch.ones(1)}
    model = build()
    head = {name: tensor.clone() for name, tensor in model.decode_head.state_dict().items()}

    load_pretrained_encoder(model, write(tmp_path / "w", tensors, kind))

    for name, tensor in model.resnet.state_dict().items():
        assert torch.equal(tensor, source[name]), name
    assert all(torch.equal(tensor, head[name]) for name, tensor in model.decode_head.state_dict().items())


def test_the_encoder_of_a_t2sda_model_is_loaded(tmp_path, source):
    trained = build(seed=2, head="daformer", decoder_hidden_size=8)
    trained.resnet.load_state_dict({name: tensor for name, tensor in source.items() if not name.startswith("fc.")})
    trained.save_pretrained(tmp_path)
    model = build()
    load_pretrained_encoder(model, str(tmp_path))
    assert all(torch.equal(tensor, source[name]) for name, tensor in model.resnet.state_dict().items())


def test_files_without_the_counter_of_batches_are_whole(tmp_path, source):
    old = {name: tensor for name, tensor in source.items() if not name.endswith("num_batches_tracked")}
    model = build()
    load_pretrained_encoder(model, write(tmp_path / "w", old, "open-mmlab file"))
    assert torch.equal(model.resnet.layer4[1].bn3.running_var, source["layer4.1.bn3.running_var"])


def without(*names: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (without("layer3.2.bn1.running_var"), r"of 155 tensors, 1 missing \(layer3\.2\.bn1\.running_var\)"),
        (without("stem.0.weight", "stem.4.bias"), r"2 missing \(stem\.0\.weight, stem\.4\.bias\)"),
        (lambda t: t | {"layer2.0.conv1.weight": torch.ones(1)}, r"1 of another shape \(layer2\.0\.conv1\.weight\)"),
        (lambda t: t | {"layer3.3.conv1.weight": torch.ones(1)}, r"deeper than the model's \(1, 2, 3, 2\).*layer3\.3"),
        (lambda t: t | {"conv1.weight": torch.ones(4, 3, 7, 7)}, r"one 7x7 convolution \(torchvision's\).*v1c"),
        (lambda t: t | {f"ema.{n}": v for n, v in t.items()}, r"must hold one ResNet.*there is 2 of them"),
        (lambda t: {"a": torch.ones(1)}, r"must hold one ResNet.*there is none"),
        (lambda t: {n: v for n, v in t.items() if n.startswith("fc")}, r"must hold one ResNet.*none"),
    ],
)
def test_what_is_not_whole_is_refused_and_nothing_is_loaded(tmp_path, source, edit, message):
    model = build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained_encoder(model, write(tmp_path / "w", edit(dict(source)), "open-mmlab file"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=f"{name} holds no weights that can be read"):
        load_pretrained_encoder(build(), tmp_path / name)


def test_a_folder_without_weights_and_a_name_without_anything(tmp_path):
    with pytest.raises(ValueError, match=r"none of the weight files model\.safetensors, pytorch_model\.bin"):
        load_pretrained_encoder(build(), tmp_path)
    with pytest.raises(ValueError, match="no weights at 'nobody/resnet': it is neither a file"):
        load_pretrained_encoder(build(), "nobody/resnet", local_files_only=True)


def test_a_resnet_is_no_mix_transformer(tmp_path, tiny):
    build().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with a resnet encoder, the model here has a Mix Transformer"):
        load_pretrained_encoder(T2SDAForSemanticSegmentation(T2SDAConfig(**tiny)), tmp_path)


# ---------------------------------------------------------------------------------------------------------- the run


def test_the_run_builds_it(tmp_path, source):
    weights = write(tmp_path / "w", source, "open-mmlab file")
    model = f"{{size: resnet101c, pretrained: '{weights}', head: deeplabv2, depths: [1, 2, 3, 2], "
    cfg = load_config(None, [f"--model={model} hidden_sizes: [16, 32, 48, 64]}}"])
    student = build_student(cfg)
    assert torch.equal(student.resnet.layer1[0].conv2.weight, source["layer1.0.conv2.weight"])
    assert [branch.dilation[0] for branch in student.decode_head.branches] == [6, 12]
    assert student.projector.in_channels == [64]  # the last stage, unless the run names others
    assert student.config.num_labels == 19


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "vgg"}, "encoder must be one of mit, resnet, backbone; got 'vgg'"),
        ({"hidden_sizes": (12, 16, 24, 32)}, r"multiples of 8; got \(12, 16, 24, 32\)"),
        ({"head_dilations": (0,)}, "head_dilations must be"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        T2SDAConfig(**({"encoder": "resnet"} | fields))


def test_checkpointing_of_activations_is_refused():
    with pytest.raises(ValueError, match=r"model\.activation_checkpointing must be false for a ResNet"):
        load_config(None, ["--model={size: resnet101c, activation_checkpointing: true}"])
