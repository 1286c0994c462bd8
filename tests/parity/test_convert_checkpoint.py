"""`t2sda convert`: what it takes, what it refuses, and that nothing is left of a refused one."""

import json
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parity.recipe import checkpoint, image, networks, weight
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from t2sda_hf.cli import main
from t2sda_hf.evaluation.inference import load_model, saved_image_size
from t2sda_hf.hub.convert import Shapes, pick_network, read_checkpoint, read_encoder
from t2sda_hf.labels import CITYSCAPES_CLASSES
from t2sda_hf.models import (
    MIT_SIZES,
    T2SDAConfig,
    T2SDAForSemanticSegmentation,
    T2SDAImageProcessor,
    encoder_fields,
    load_pretrained_encoder,
)

DAFORMER = "model.decode_head.fuse_layer.bottleneck.conv.weight"
SEGFORMER_LAST = "decode_head.linear_pred"


def save(path: Path, state_dict: dict[str, Tensor], **more: object) -> Path:
    torch.save({"state_dict": OrderedDict(state_dict), **more}, path)
    return path


def convert(tmp_path: Path, state_dict: dict[str, Tensor], *arguments: str, **more: object) -> int:
    return main(["convert", str(save(tmp_path / "their.pth", state_dict, **more)), str(tmp_path / "out"), *arguments])


def assert_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, *words: str, expected: int = 2
) -> None:
    """The exit code, one line that names what is wrong, and nothing beside the file."""
    printed = capsys.readouterr()
    assert code == expected
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert [word for word in words if word not in printed.err] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["their.pth"]


def logits(folder: Path) -> Tensor:
    model, _ = load_model(str(folder))
    with torch.no_grad():
        return model(image("any", (1, 3, 64, 64)) * 4 - 2).logits


# ------------------------------------------------------------------------------------------------------ what is taken


def test_the_folder_is_a_whole_model_with_processor_and_names(tmp_path, capsys):
    assert convert(tmp_path, checkpoint("mit_daformer")) == 0
    assert "daformer on mit (8, 16, 40, 64), depths (1, 2, 1, 1), 19 classes, input 512x1024" in capsys.readouterr().out
    model, names = load_model(str(tmp_path / "out"))
    assert names == CITYSCAPES_CLASSES
    assert saved_image_size(str(tmp_path / "out")) == (512, 1024)
    assert isinstance(AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "out"), T2SDAForSemanticSegmentation)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"height": 512, "width": 1024}
    assert model.config.sr_ratios == [8, 4, 2, 1]


def test_student_and_teacher_of_one_file(tmp_path):
    both = checkpoint("mit_daformer", ("model.", "ema_model.", "imnet_model."))
    assert convert(tmp_path, both, "--weights", "teacher") == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for prefix, same in (("ema_model.", True), ("model.", False)):
        theirs = both[f"{prefix}decode_head.conv_seg.weight"]
        assert torch.equal(saved["decode_head.classifier.weight"], theirs) == same


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
def test_prefixes(prefix):
    theirs = {prefix + name: torch.zeros(shape) for name, shape in networks()["mit_daformer"].items()}
    assert pick_network(theirs, "student").keys() == networks()["mit_daformer"].keys()


def test_a_file_of_tensors_alone(tmp_path):
    torch.save(checkpoint("mit_daformer"), tmp_path / "their.pth")
    assert read_checkpoint(tmp_path / "their.pth")[0].keys() == checkpoint("mit_daformer").keys()


def test_nvidias_segformer_fuses_the_coarsest_level_first(tmp_path, capsys):
    """Its head is DAFormer's copy with levels counted from 1 and fused the other way round, so logits must be equal."""
    copy = checkpoint("mit_segformer", [""])
    fuse = "decode_head.linear_fuse.conv.weight"
    levels = {name: f"decode_head.linear_c{int(name[21]) + 1}{name[22:]}" for name in copy if ".linear_c." in name}
    theirs = {levels.get(name, name): tensor for name, tensor in copy.items()}
    theirs[fuse] = torch.cat(copy[fuse].chunk(4, 1)[::-1], 1)
    assert main(["convert", str(save(tmp_path / "copy.pth", copy)), str(tmp_path / "copy")]) == 0
    assert convert(tmp_path, theirs) == 0
    assert "Left out: decode_head.conv_seg.weight, decode_head.conv_seg.bias" in capsys.readouterr().out
    assert torch.equal(logits(tmp_path / "copy"), logits(tmp_path / "out"))


def test_auxiliary_heads_are_left_out_and_old_files_have_no_counters(tmp_path, capsys):
    state_dict = checkpoint("resnet_dlv2")
    old = {name: tensor for name, tensor in state_dict.items() if not name.endswith("num_batches_tracked")}
    assert convert(tmp_path, old | {"model.auxiliary_head.conv_seg.bias": torch.zeros(19)}) == 0
    assert "Left out: auxiliary_head.conv_seg.bias." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("noted", "given"), [(None, ["a", "b", "c"]), (("a", "b", "c"), []), (("x", "y"), ["a", "b", "c"])]
)
def test_names_of_other_classes_are_given_or_in_the_file(tmp_path, noted, given):
    state_dict = checkpoint("mit_segformer")
    for name in [name for name in state_dict if SEGFORMER_LAST in name]:
        state_dict[name] = state_dict[name][:3]
    arguments = ["--classes", *given] if given else []
    assert convert(tmp_path, state_dict, *arguments, meta={"CLASSES": noted} if noted else {}) == 0
    assert load_model(str(tmp_path / "out"))[1] == ("a", "b", "c")
    assert saved_image_size(str(tmp_path / "out")) is None


def test_an_input_size_of_ones_own(tmp_path):
    assert convert(tmp_path, checkpoint("mit_daformer"), "--image_size", "720", "1280") == 0
    assert saved_image_size(str(tmp_path / "out")) == (720, 1280)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_training_scripts_note(tmp_path, legacy):
    """The meta of mmcv's runner, numbers of NumPy among it, and the optimiser's state."""
    meta = {"seed": np.int64(1), "epoch": 1, "iter": 40000, "env_info": "Linux", "config": "x = 1", "hook_msgs": {}}
    optimizer = {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": np.float64(6e-5)}]}
    torch.save(
        {"meta": meta, "state_dict": checkpoint("mit_daformer"), "optimizer": optimizer},
        tmp_path / "their.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    assert main(["convert", str(tmp_path / "their.pth"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("size", MIT_SIZES)
def test_every_published_size_is_read_from_the_tensors(size):
    """Names and shapes only: the largest has 84 million parameters."""
    widths, depths = MIT_SIZES[size]["hidden_sizes"], MIT_SIZES[size]["depths"]
    tensors = {}
    for name, shape in networks()["mit_daformer"].items():
        if name.startswith("backbone.block"):
            stage, block = int(name[14]), name.split(".")[2]
            if block != "0":
                continue
            names = [name.replace(f".block{stage}.0.", f".block{stage}.{i}.") for i in range(depths[stage - 1])]
        else:
            names = [name]
        small = dict(
            zip((8, 16, 40, 64, 32, 160, 256), (*widths, 4 * widths[0], 4 * widths[2], 4 * widths[3]), strict=True)
        )
        tensors |= {one: torch.empty([small.get(side, side) for side in shape], device="meta") for one in names}
    read = read_encoder(Shapes(tensors))
    assert (read["hidden_sizes"], read["depths"]) == (widths, depths)


# ---------------------------------------------------------------------------------------------------- what is refused


def without(name: str):
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, *shape: int):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("mit_daformer", without(DAFORMER), ["1 missing: decode_head.fuse_layer.bottleneck.conv.weight"]),
        ("mit_daformer", without("model.backbone.norm3.bias"), ["1 missing: backbone.norm3.bias"]),
        ("mit_daformer", without("model.decode_head.conv_seg.weight"), ["decode_head.conv_seg.weight is missing"]),
        ("mit_daformer", without("model.backbone.patch_embed2.proj.weight"), ["patch_embed2.proj.weight is missing"]),
        (
            "mit_daformer",
            without("model.backbone.block3.0.attn.sr.weight"),
            ["3 unknown: backbone.block3.0.attn.norm.bias"],
        ),
        ("mit_daformer", with_tensor("model.decode_head.image_pool.1.conv.weight", 2), ["1 unknown", "image_pool"]),
        ("mit_daformer", with_tensor("model.backbone.extra", 2), ["1 unknown: backbone.extra"]),
        ("mit_daformer", with_tensor("discriminator.weight", 2), ["1 unknown tensors: discriminator.weight"]),
        (
            "mit_daformer",
            with_tensor(DAFORMER, 16, 64, 1, 1),
            ["1 of another shape", "bottleneck.conv.weight (16, 64, 1, 1)"],
        ),
        ("mit_daformer", with_tensor("model.backbone.block1.0.attn.kv.weight", 15, 8), ["attn.kv.weight (15, 8)"]),
        (
            "mit_daformer",
            with_tensor("model.backbone.patch_embed4.proj.weight", 60, 40, 3, 3),
            ["60", "attention heads"],
        ),
        ("mit_segformer", with_tensor("model.decode_head.linear_fuse.conv.weight", 16, 64, 3, 3), ["(16, 64, 3, 3)"]),
        ("resnet_dlv2", without("model.backbone.layer3.5.conv3.weight"), ["1 missing: backbone.layer3.5.conv3.weight"]),
        ("resnet_dlv2", with_tensor("model.backbone.conv1.weight", 8, 3, 7, 7), ["v1c"]),
        ("resnet_dlv2", with_tensor("model.decode_head.aspp_modules.2.conv.weight", 19, 256, 3, 3), ["3 branches"]),
        (
            "hrda_daformer",
            without("model.decode_head.scale_attention.conv_seg.bias"),
            ["scale_attention.conv_seg.bias"],
        ),
        ("hrda_dlv2", without("model.decode_head.head.aspp_modules.1.conv.bias"), ["head.aspp_modules.1.conv.bias"]),
    ],
)
def test_a_network_that_does_not_fit_is_refused_by_name(tmp_path, capsys, case, change, words):
    state_dict = checkpoint(case)
    change(state_dict)
    assert_refused(tmp_path, capsys, convert(tmp_path, state_dict), "their.pth", *words)


def test_other_networks_are_refused(tmp_path, capsys):
    def only(start: str, *more: str) -> dict[str, Tensor]:
        return {n: t for n, t in checkpoint("mit_daformer").items() if n.startswith(start)} | {
            name: weight(name, (2,)) for name in more
        }

    assert_refused(tmp_path, capsys, convert(tmp_path, only("model.backbone")), "there is none")
    assert_refused(tmp_path, capsys, convert(tmp_path, only("model.decode")), "neither a Mix Transformer nor a ResNet")
    other = only("model.backbone", "model.decode_head.fusion_conv.conv.weight")  # mmsegmentation's own SegFormer
    assert_refused(tmp_path, capsys, convert(tmp_path, other), "decode_head.fusion_conv.conv.weight")
    basic = {"backbone.layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
    assert_refused(tmp_path, capsys, convert(tmp_path, basic), "basic blocks")


def test_a_teacher_that_is_not_there(tmp_path, capsys):
    code = convert(tmp_path, checkpoint("mit_daformer"), "--weights", "teacher")
    assert_refused(tmp_path, capsys, code, "no teacher, only student")


def test_class_names_must_fit(tmp_path, capsys):
    state_dict = checkpoint("mit_daformer")
    assert_refused(tmp_path, capsys, convert(tmp_path, state_dict, "--classes", "a", "b"), "19 outputs", "--classes")
    for name in [name for name in state_dict if "conv_seg" in name]:
        state_dict[name] = state_dict[name][:3]
    assert_refused(tmp_path, capsys, convert(tmp_path, state_dict), "3 outputs need as many different names")
    assert_refused(tmp_path, capsys, convert(tmp_path, state_dict, "--classes", "a", "b", "b"), "different names")


class Evil:
    """What a malicious file does: anything, while it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["state_dict", "meta"])
def test_code_in_a_file_is_not_run(tmp_path, capsys, where, legacy):
    content = {"state_dict": checkpoint("mit_daformer"), "meta": {}}
    content[where]["evil"] = Evil(tmp_path / "was_here")
    torch.save(content, tmp_path / "their.pth", _use_new_zipfile_serialization=not legacy)
    code = main(["convert", str(tmp_path / "their.pth"), str(tmp_path / "out")])
    assert_refused(tmp_path, capsys, code, "open", "nothing of the file was used")


def test_objects_of_other_libraries_are_named(tmp_path, capsys):
    code = convert(tmp_path, checkpoint("mit_daformer"), meta={"data_root": Path("data")})
    assert_refused(tmp_path, capsys, code, "pathlib", "keep its tensors alone")


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"PK\x03\x04 cut off"])
def test_files_that_are_no_checkpoints(tmp_path, capsys, content):
    (tmp_path / "their.pth").write_bytes(content)
    code = main(["convert", str(tmp_path / "their.pth"), str(tmp_path / "out")])
    assert_refused(tmp_path, capsys, code, "cannot be read as a checkpoint")


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"state_dict": {"a": 1}}, [torch.zeros(2)], {"lr": 0.1}])
def test_files_without_tensors(tmp_path, capsys, content):
    torch.save(content, tmp_path / "their.pth")
    code = main(["convert", str(tmp_path / "their.pth"), str(tmp_path / "out")])
    assert_refused(tmp_path, capsys, code, "must hold a state_dict of tensors")


def test_no_file_and_a_folder_that_exists(tmp_path, capsys):
    assert main(["convert", str(tmp_path / "their.pth"), str(tmp_path / "out")]) == 2
    assert "there is no such file" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    assert convert(tmp_path, checkpoint("mit_daformer")) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_nothing_is_left_when_writing_fails(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(T2SDAImageProcessor, "save_pretrained", full)
    code = convert(tmp_path, checkpoint("mit_daformer"))
    assert_refused(tmp_path, capsys, code, "No space left on device", expected=1)  # no fault of the input


def test_the_config_says_what_was_read(tmp_path):
    assert convert(tmp_path, checkpoint("hrda_dlv2")) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["encoder"], config["head"], config["multi_resolution"]) == ("resnet", "deeplabv2", True)
    assert (config["depths"], config["head_dilations"]) == ([3, 4, 6, 3], [6, 12])
    assert (config["hidden_sizes"], config["detail_crop_size"]) == ([32, 64, 128, 256], [512, 512])
    assert saved_image_size(str(tmp_path / "out")) == (1024, 2048)


# ------------------------------------------------------------------------------------------------- encoders of VFM-UDA


def vit(prefix: str, norm: bool, seed: int, channels: int = 64, blocks: int = 2) -> dict[str, Tensor]:
    """A DINOv2 under the names of its own release, of random numbers."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"cls_token": (1, 1, channels), "pos_embed": (1, 17, channels)}
    shapes |= {"patch_embed.proj.weight": (channels, 3, 14, 14), "patch_embed.proj.bias": (channels,)}
    shapes |= {"mask_token": (1, channels)} if norm else {}
    linear = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for block in range(blocks):
        for name, (out, given) in linear.items():
            shapes[f"blocks.{block}.{name}.weight"] = out * channels, given * channels
            shapes[f"blocks.{block}.{name}.bias"] = (out * channels,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{block}.{name}"] = (channels,)
    shapes |= {"norm.weight": (channels,), "norm.bias": (channels,)} if norm else {}
    return {prefix + name: torch.randn(shape, generator=random) * 0.2 for name, shape in shapes.items()}


VFM_UDA = {"upscale.0.weight": (64, 32, 2, 2), "upscale.5.weight": (16, 16, 3, 3), "out.weight": (19, 16, 1, 1)}
ADAPTED = {
    "encoder.level_embed": (3, 64),
    "encoder.spm.stem.0.weight": (8, 3, 3, 3),
    "encoder.norm1.running_mean": (64,),
}
ADAPTED |= {"encoder.interactions.0.injector.gamma": (64,), "upscale.up_conv1.weight": (64, 32, 2, 2)}


def vfm_uda(plus: bool = False) -> dict[str, Tensor]:
    """Student and teacher as a Lightning module has them; of VFM-UDA++ also a frozen DINOv2."""
    tensors: dict[str, Tensor] = {}
    for seed, network in enumerate(("network.", "network_ema.")):
        tensors |= vit(f"{network}encoder.", not plus, seed)
        tensors |= {network + name: torch.zeros(shape) for name, shape in (ADAPTED if plus else VFM_UDA).items()}
    others = vit("network_feature_extractor.encoder.", True, 9) if plus else {}
    return tensors | others | ({} if plus else {"network.token_masking.mask_token": torch.zeros(1, 64)})


class AttributeDict(dict):
    """Stands for Lightning's, which notes the settings of a module in one."""


AttributeDict.__module__, AttributeDict.__qualname__ = "lightning.fabric.utilities.data", "AttributeDict"


def as_released(tensors: dict[str, Tensor], images: Tensor, norm: bool) -> Tensor:
    """DINOv2 by its paper and the names of its release, of images that its positions cover."""
    x = F.conv2d(images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=14)
    x = torch.cat([tensors["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + tensors["pos_embed"]

    def layer(name: str, given: Tensor) -> Tensor:
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        return F.linear(given, weight, bias) if weight.ndim == 2 else F.layer_norm(given, (64,), weight, bias, 1e-6)

    for block in ("blocks.0", "blocks.1"):
        query, key, value = layer(f"{block}.attn.qkv", layer(f"{block}.norm1", x)).chunk(3, dim=-1)
        seen = (query @ key.transpose(1, 2) / 8).softmax(-1) @ value  # one head of 64 channels
        x = x + tensors[f"{block}.ls1.gamma"] * layer(f"{block}.attn.proj", seen)
        wide = F.gelu(layer(f"{block}.mlp.fc1", layer(f"{block}.norm2", x)))
        x = x + tensors[f"{block}.ls2.gamma"] * layer(f"{block}.mlp.fc2", wide)
    x = layer("norm", x) if norm else x
    return x[:, 1:].transpose(1, 2).unflatten(2, (4, 4))


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("weights", ["student", "teacher"])
def test_of_vfm_uda_the_encoder_is_converted(tmp_path, capsys, monkeypatch, plus, weights):
    tensors = vfm_uda(plus)
    place = ""
    for part in AttributeDict.__module__.split("."):
        place = f"{place}.{part}".lstrip(".")
        monkeypatch.setitem(sys.modules, place, SimpleNamespace(AttributeDict=AttributeDict))
    settings = {"hyper_parameters": AttributeDict(lr=5e-5, network={"model_name": "dinov2_vitb14"}), "epoch": 0}
    assert convert(tmp_path, tensors, "--weights", weights, **settings, pytorch_lightning_version="2.4.0") == 0

    said = capsys.readouterr().out
    assert "the encoder alone, a DINOv2 of 64 channels, 2 blocks and patches of 14, for model.pretrained" in said
    assert ("Its adapter between its blocks" in said) == plus
    encoder = load_pretrained(tmp_path / "out")
    images = image("any", (2, 3, 56, 56)) * 4 - 2
    network = "network.encoder." if weights == "student" else "network_ema.encoder."
    own = {name.removeprefix(network): tensor for name, tensor in tensors.items() if name.startswith(network)}
    with torch.no_grad():
        found = encoder(images).feature_maps[-1]
    torch.testing.assert_close(found, as_released(own, images, norm=not plus), rtol=1e-4, atol=1e-4)


def load_pretrained(folder: Path) -> Any:
    """The backbone of a student that starts from the folder."""
    fields = encoder_fields(folder)
    student = T2SDAForSemanticSegmentation(T2SDAConfig(**fields, out_layers=(2,), decoder_hidden_size=8)).eval()
    load_pretrained_encoder(student, folder)
    return student.backbone.model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"network.blocks.7.strange": torch.ones(1)}, ["1 unknown: blocks.7.strange"]),
        ({"network.encoder.blocks.1.attn.qkv.weight": None}, ["1 missing: blocks.1.attn.qkv.weight"]),
        ({"network.encoder.blocks.1.norm1.bias": torch.ones(7)}, ["1 of another shape: blocks.1.norm1.bias (7,)"]),
        ({"network.encoder.pos_embed": torch.ones(1, 16, 64)}, ["pos_embed (1, 16, 64) is no DINOv2's"]),
        ({"discriminator.weight": torch.ones(1)}, ["1 unknown tensors: discriminator.weight"]),
    ],
)
def test_a_vfm_uda_that_is_another_network_is_refused_by_name(tmp_path, capsys, change, words):
    tensors = {name: tensor for name, tensor in (vfm_uda() | change).items() if tensor is not None}
    assert_refused(tmp_path, capsys, convert(tmp_path, tensors), "is not converted:", *words)


def test_what_only_a_whole_segmenter_has_is_refused_for_an_encoder(tmp_path, capsys):
    code = convert(tmp_path, vfm_uda(), "--image_size", "512", "512")
    assert_refused(tmp_path, capsys, code, "of which the encoder alone is converted: leave out --classes")
    student = {name: tensor for name, tensor in vfm_uda().items() if not name.startswith("network_ema.")}
    assert_refused(tmp_path, capsys, convert(tmp_path, student, "--weights", "teacher"), "no teacher, only student")
