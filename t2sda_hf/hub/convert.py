"""Released checkpoints of mmsegmentation's forks as our models: DAFormer, HRDA, MIC, SegFormer, DeepLab-V2. And the
encoder of VFM-UDA and VFM-UDA++, whose decoders are none of our heads.

Architecture and widths are read from the names and shapes of the tensors. Each of them must find a place, or nothing is
written. What tensors cannot say is as released: dilations, 1-2-5-8 attention heads, detail crops of 512. The projector,
which these networks do not have, is a new one. No code in a file is run.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from math import isqrt
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from ..data.transforms import Size
from ..labels import CITYSCAPES_CLASSES
from ..models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor
from ..models.modeling_t2sda import name_some
from ..models.pretrained import UNREADABLE
from ..training.checkpoint import write_folder

# A training checkpoint of DAFormer, HRDA or MIC holds three networks; others hold one, without a prefix.
NETWORKS = {"student": "model.", "teacher": "ema_model.", "ImageNet": "imnet_model."}
# Our names -> theirs; {0} is the first group of the pattern, {next} that number plus one. The first that fits counts.
ENCODER_NAMES = {
    r"segformer\.stages\.(\d)\.patch_embeddings\.proj": "backbone.patch_embed{next}.proj",
    r"segformer\.stages\.(\d)\.patch_embeddings\.layer_norm": "backbone.patch_embed{next}.norm",
    r"segformer\.stages\.(\d)\.layer_norm": "backbone.norm{next}",
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.layernorm_before": "backbone.block{next}.{1}.norm1",
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.layernorm_after": "backbone.block{next}.{1}.norm2",
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.mlp": "backbone.block{next}.{1}.mlp",
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.q_proj": "backbone.block{next}.{1}.attn.q",
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.[kv]_proj": "backbone.block{next}.{1}.attn.kv",
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.o_proj": "backbone.block{next}.{1}.attn.proj",
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.sequence_reduction\.sequence_reduction": (
        "backbone.block{next}.{1}.attn.sr"
    ),
    r"segformer\.stages\.(\d)\.blocks\.(\d+)\.attention\.sequence_reduction\.layer_norm": (
        "backbone.block{next}.{1}.attn.norm"
    ),
    "resnet": "backbone",
}
DAFORMER_NAMES = {
    r"levels\.(\d)": "embed_layers.{0}.proj",
    r"branches\.0\.0": "fuse_layer.aspp_modules.0.conv",
    r"branches\.0\.1": "fuse_layer.aspp_modules.0.bn",
    r"branches\.(\d)\.0\.0": "fuse_layer.aspp_modules.{0}.depthwise_conv.conv",
    r"branches\.(\d)\.0\.1": "fuse_layer.aspp_modules.{0}.depthwise_conv.bn",
    r"branches\.(\d)\.1\.0": "fuse_layer.aspp_modules.{0}.pointwise_conv.conv",
    r"branches\.(\d)\.1\.1": "fuse_layer.aspp_modules.{0}.pointwise_conv.bn",
    r"bottleneck\.0": "fuse_layer.bottleneck.conv",
    r"bottleneck\.1": "fuse_layer.bottleneck.bn",
    "classifier": "conv_seg",
}
# DAFormer's head with a 1x1 convolution in place of the branches: SegFormer's. It is also HRDA's scale attention.
FUSED_NAMES = {
    r"linear_c\.(\d)\.proj": "embed_layers.{0}.proj",
    "linear_fuse": "fuse_layer.conv",
    "batch_norm": "fuse_layer.bn",
    "classifier": "conv_seg",
}
SEGFORMER_NAMES = {
    r"linear_c\.(\d)": "linear_c.{0}",
    "linear_fuse": "linear_fuse.conv",
    "batch_norm": "linear_fuse.bn",
    "classifier": "linear_pred",
}
NVIDIA_NAMES = SEGFORMER_NAMES | {r"linear_c\.(\d)": "linear_c{next}"}
DEEPLABV2_NAMES = {r"branches\.(\d)": "aspp_modules.{0}.conv"}
DEEPLABV2_DILATIONS = {2: (6, 12), 4: (6, 12, 18, 24)}  # by the number of branches
MIT_HEADS = (1, 2, 5, 8)  # of every published Mix Transformer

# VFM-UDA's Lightning files: the networks of which an encoder is taken, and what else of a training they may hold.
LIGHTNING = {"student": "network.", "teacher": "network_ema."}
LIGHTNING_OTHERS = ("network_feature_extractor.", "network_feature_head.", "metrics.")
# transformers' names of a DINOv2 -> those of its own release, which VFM-UDA keeps.
DINOV2_NAMES = {
    r"embeddings\.cls_token": "cls_token",
    r"embeddings\.mask_token": "mask_token",
    r"embeddings\.position_embeddings": "pos_embed",
    r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
    r"encoder\.layer\.(\d+)\.attention\.[qkv]_proj": "blocks.{0}.attn.qkv",
    r"encoder\.layer\.(\d+)\.attention\.o_proj": "blocks.{0}.attn.proj",
    r"encoder\.layer\.(\d+)\.layer_scale(\d)\.lambda1": "blocks.{0}.ls{1}.gamma",
    r"encoder\.layer\.(\d+)\.(norm\d|mlp\.fc\d)": "blocks.{0}.{1}",
    "layernorm": "norm",
}
DINOV2_HEAD = 64  # channels of an attention head, in every size
# Beside the ViT. VFM-UDA: two transposed convolutions, a 3x3 and a 1x1 one, on the last map. VFM-UDA++: a ViT-adapter,
# whose deformable attention is a compiled operator, and a head on its four maps.
DECODER = ("upscale.", "out.", "token_masking.")
ADAPTER = tuple(
    f"encoder.{name}" for name in ("level_embed", "spm.", "interactions.", "up.", *(f"norm{i}." for i in "1234"))
)

# What training scripts note beside tensors: numbers of NumPy, under both names that its releases give to their maker.
# These make numbers and nothing else, and Lightning's dict is read as a dict; all other objects are refused unread.
NUMBERS: list[Any] = [
    np.dtype,
    *(type(np.dtype(name)) for name in ("bool", "int32", "int64", "uint32", "uint64", "float32", "float64")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(
        (dict, f"{place}.AttributeDict")
        for place in (
            "lightning.fabric.utilities.data",
            "lightning_fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
            "pytorch_lightning.utilities.parsing",
        )
    ),
]


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and what is noted beside them.

    Raises:
        ValueError: if there is no such file, it cannot be read, holds objects that code would have to make, or holds
            no named tensors.
    """
    try:
        with torch.serialization.safe_globals(NUMBERS):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        objects = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not objects:
            raise ValueError(f"{path} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from error
        raise ValueError(
            f"{path} holds objects of {', '.join(dict.fromkeys(objects))} beside its tensors. Making them could run "
            f"any code, so nothing of the file was used. If you trust it, load it yourself with pickle allowed and "
            f'keep its tensors alone: torch.save({{"state_dict": content["state_dict"]}}, NEW).'
        ) from error
    except UNREADABLE as error:
        problem = f"{type(error).__name__} {error}".splitlines()[0] if path.exists() else "there is no such file"
        raise ValueError(f"{path} cannot be read as a checkpoint: {problem}") from error
    content = content if isinstance(content, dict) else {}
    tensors = content.get("state_dict", content)
    others = [str(name) for name, value in tensors.items() if not isinstance(value, Tensor)]
    if not tensors or others:
        found = f"it has {name_some(others)}" if others else "it is empty"
        raise ValueError(f"{path} must hold a state_dict of tensors, {found}. Give a checkpoint of a segmenter.")
    notes = content.get("meta") if tensors is not content else None
    return dict(tensors), notes if isinstance(notes, dict) else {}


def pick_network(tensors: Mapping[str, Tensor], weights: str) -> dict[str, Tensor]:
    """The tensors of one network, without its prefix.

    Raises:
        ValueError: if it is not there, or there are tensors of something unknown.
    """
    networks: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for full_name, tensor in tensors.items():
        name = full_name.removeprefix("module.")  # of a data-parallel wrapper
        prefix = next((one for one in NETWORKS.values() if name.startswith(one)), "")
        name = name.removeprefix(prefix)
        if not name.startswith(("backbone.", "decode_head.", "auxiliary_head.")):
            unknown.append(full_name)
        networks.setdefault(prefix, {})[name] = tensor
    if unknown:
        raise ValueError(
            f"{len(unknown)} unknown tensors: {name_some(unknown)}. A segmenter has backbone.* and decode_head.*, "
            f"after {', '.join(NETWORKS.values())} or nothing."
        )
    wanted = NETWORKS[weights]
    if weights == "student" and wanted not in networks:
        wanted = ""
    if wanted not in networks:
        found = [name for name, prefix in NETWORKS.items() if prefix in networks]
        raise ValueError(f"no {weights}, only {', '.join(found) or 'one network'}. Give another --weights.")
    return networks[wanted]


class Shapes:
    """Sizes of a network's tensors; ValueError with the name of one that is missing."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"the tensor {name} is missing, which tells the network's size. Give a whole segmenter.")
        return tuple(self.tensors[name].shape)

    def any(self, start: str) -> bool:
        return any(name.startswith(start) for name in self.tensors)

    def count(self, start: str) -> int:
        """How many numbers follow `start` in the names."""
        numbers = (re.match(re.escape(start) + r"(\d+)\.", name) for name in self.tensors)
        return len({number[1] for number in numbers if number})


def read_encoder(shapes: Shapes) -> dict[str, Any]:
    """The fields of T2SDAConfig that describe the encoder. ValueError if it is none of ours."""
    if shapes.any("backbone.patch_embed1."):
        stages = range(1, 5)
        sizes = tuple(shapes(f"backbone.patch_embed{stage}.proj.weight")[0] for stage in stages)
        if any(size % heads for size, heads in zip(sizes, MIT_HEADS, strict=True)):
            raise ValueError(
                f"widths {sizes} do not divide into {MIT_HEADS} attention heads, which Mix Transformers have."
            )
        reductions = (f"backbone.block{stage}.0.attn.sr.weight" for stage in stages)
        return {
            "encoder": "mit",
            "num_channels": shapes("backbone.patch_embed1.proj.weight")[1],
            "depths": tuple(shapes.count(f"backbone.block{stage}.") for stage in stages),
            "hidden_sizes": sizes,
            "num_attention_heads": MIT_HEADS,
            "patch_sizes": tuple(shapes(f"backbone.patch_embed{stage}.proj.weight")[2] for stage in stages),
            "sr_ratios": tuple(shapes(name)[2] if name in shapes.tensors else 1 for name in reductions),
            "mlp_ratios": tuple(
                shapes(f"backbone.block{stage}.0.mlp.fc1.weight")[0] // size
                for stage, size in zip(stages, sizes, strict=True)
            ),
        }
    if not shapes.any("backbone.layer1."):
        raise ValueError(
            f"the backbone is neither a Mix Transformer nor a ResNet of mmsegmentation's names: "
            f"{name_some([name for name in shapes.tensors if name.startswith('backbone.')])}."
        )
    if shapes.any("backbone.conv1."):
        raise ValueError("the backbone is a ResNet with one convolution as its stem; only v1c, with three, is known.")
    if not shapes.any("backbone.layer1.0.conv3."):
        raise ValueError(
            "the backbone is a ResNet of basic blocks (18 or 34); only bottlenecks (50 and more) are known."
        )
    return {
        "encoder": "resnet",
        "num_channels": shapes("backbone.stem.0.weight")[1],
        "depths": tuple(shapes.count(f"backbone.layer{stage}.") for stage in range(1, 5)),
        "hidden_sizes": tuple(shapes(f"backbone.layer{stage}.0.conv3.weight")[0] for stage in range(1, 5)),
        "projector_in_index": (3,),
    }


def read_head(shapes: Shapes, head: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of T2SDAConfig that describe the head under the prefix `head`, and the names of its parts."""
    if shapes.any(f"{head}aspp_modules."):
        branches = shapes.count(f"{head}aspp_modules.")
        if branches not in DEEPLABV2_DILATIONS:
            raise ValueError(f"a DeepLab-V2 head of {branches} branches; the dilations are known of 2 and of 4.")
        fields: dict[str, Any] = {"head": "deeplabv2", "head_dilations": DEEPLABV2_DILATIONS[branches]}
        return fields | {"num_labels": shapes(f"{head}aspp_modules.0.conv.weight")[0]}, DEEPLABV2_NAMES
    if shapes.any(f"{head}embed_layers."):
        fields = {"decoder_hidden_size": shapes(f"{head}embed_layers.0.proj.weight")[0]}
        fields |= {"num_labels": shapes(f"{head}conv_seg.weight")[0]}
        if not shapes.any(f"{head}fuse_layer.aspp_modules."):
            return fields | {"head": "all_mlp"}, FUSED_NAMES
        branches = shapes.count(f"{head}fuse_layer.aspp_modules.")
        if branches != 4:
            raise ValueError(f"a DAFormer head of {branches} branches; the dilations are known of 4.")
        return fields | {"head": "daformer"}, DAFORMER_NAMES
    if shapes.any(f"{head}linear_c"):
        names = SEGFORMER_NAMES if shapes.any(f"{head}linear_c.") else NVIDIA_NAMES
        level = names[r"linear_c\.(\d)"].format(0, next=1)
        fields = {"head": "all_mlp", "decoder_hidden_size": shapes(f"{head}{level}.proj.weight")[0]}
        return fields | {"num_labels": shapes(f"{head}linear_pred.weight")[0]}, names
    raise ValueError(
        f"the head is neither DAFormer's nor SegFormer's nor DeepLab-V2's: "
        f"{name_some([name for name in shapes.tensors if name.startswith('decode_head.')]) or 'there is none'}."
    )


def translate(name: str, names: Mapping[str, str]) -> str:
    """One of our names in theirs."""
    for pattern, theirs in names.items():
        found = re.match(pattern + r"(?=\.|$)", name)
        if found:
            number = int(found[1]) + 1 if found.groups() else 0
            return theirs.format(*found.groups(), next=number) + name[found.end() :]
    raise AssertionError(name)  # the tables name every part of our networks


def rearranged(name: str, tensor: Tensor, coarsest_first: bool) -> Tensor:
    """Their tensor as ours: keys and values apart, and the coarsest level first where levels are fused."""
    if re.search(r"\.[kv]_proj\.", name):
        return tensor.chunk(2)[".v_proj." in name]
    if name.endswith("linear_fuse.weight") and not coarsest_first:
        return torch.cat(tensor.chunk(4, dim=1)[::-1], dim=1)
    return tensor


def convert(tensors: Mapping[str, Tensor], **fields: Any) -> tuple[T2SDAForSemanticSegmentation, list[str]]:
    """The network of `tensors`, and the names of those that only training uses.

    Args:
        tensors: of one network, by the names of mmsegmentation.
        fields: of T2SDAConfig, beside those that are read from `tensors`.

    Raises:
        ValueError: naming what is missing, unknown or of another shape.
    """
    shapes = Shapes(tensors)
    two = shapes.any("decode_head.head.")
    head = "decode_head.head." if two else "decode_head."
    encoder_fields = read_encoder(shapes)
    head_fields, head_names = read_head(shapes, head)
    names = dict(ENCODER_NAMES)
    names |= {rf"decode_head\.{pattern}": head + theirs for pattern, theirs in head_names.items()}
    if two:
        attention = DEEPLABV2_NAMES if head_fields["head"] == "deeplabv2" else FUSED_NAMES
        names |= {
            rf"scale_attention\.{pattern}": f"decode_head.scale_attention.{theirs}"
            for pattern, theirs in attention.items()
        }
    torch.manual_seed(0)  # of the projector
    model = T2SDAForSemanticSegmentation(
        T2SDAConfig(**(encoder_fields | head_fields | {"multi_resolution": two} | fields))
    )
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("projector.")}
    theirs = {name: translate(name, names) for name in own}
    # A SegFormer head inherits a classifier that it does not use; DeepLab's auxiliary head is for training.
    unused = (f"{head}conv_seg.",) if head_names in (SEGFORMER_NAMES, NVIDIA_NAMES) else ()
    idle = [name for name in tensors if name.startswith(("auxiliary_head.", *unused))]
    looks = (
        f"{head_fields['head']} on {encoder_fields['encoder']} {encoder_fields['hidden_sizes']}, depths "
        f"{encoder_fields['depths']}"
    )

    def as_ours(name: str, tensor: Tensor) -> Tensor:
        return rearranged(name, tensor, head_names is NVIDIA_NAMES)

    # Files from before PyTorch 0.4.1 have no counter of batches; nothing reads it here.
    converted = fitted(own, theirs, tensors, idle, ("num_batches_tracked",), as_ours, looks)
    model.load_state_dict(model.state_dict() | converted)
    return model.eval(), idle


def fitted(
    own: Mapping[str, Tensor],
    theirs: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    idle: Collection[str],
    needless: tuple[str, ...],
    as_ours: Callable[[str, Tensor], Tensor],
    looks: str,
) -> dict[str, Tensor]:
    """The tensors of a network under our names.

    Args:
        own: of our network.
        theirs: our name -> theirs.
        tensors: theirs.
        idle: names of theirs that are left out.
        needless: endings of our names that a file may lack.
        as_ours: what our tensor of this name is, of theirs.
        looks: like what, for the message.

    Raises:
        ValueError: naming what is missing, unknown or of another shape.
    """
    unknown = tensors.keys() - theirs.values() - set(idle)
    missing = {other for name, other in theirs.items() if not name.endswith(needless)} - tensors.keys()
    converted = {name: as_ours(name, tensors[other]) for name, other in theirs.items() if other in tensors}
    misshapen = {
        f"{theirs[name]} {tuple(tensors[theirs[name]].shape)}"
        for name, tensor in converted.items()
        if tensor.shape != own[name].shape
    }
    problems = [
        f"{len(which)} {what}: {name_some(sorted(which))}"
        for which, what in ((missing, "missing"), (unknown, "unknown"), (misshapen, "of another shape"))
        if which
    ]
    if problems:
        raise ValueError(
            f"it looks like {looks}, but of its tensors are {'; '.join(problems)}. Only networks as they were released "
            "can be converted."
        )
    return converted


def convert_encoder(tensors: Mapping[str, Tensor], weights: str) -> tuple[Dinov2Model, list[str]]:
    """The DINOv2 of a VFM-UDA or VFM-UDA++ network, and the names of its tensors that are left out.

    The last norm and the mask token, which VFM-UDA++ does not have, are new ones, and the norm is not applied.

    Args:
        tensors: of a Lightning module, whole.
        weights: "student" or "teacher".

    Raises:
        ValueError: naming what is missing, unknown or of another shape.
    """
    strangers = [name for name in tensors if not name.startswith((*LIGHTNING.values(), *LIGHTNING_OTHERS))]
    if strangers:
        raise ValueError(
            f"{len(strangers)} unknown tensors: {name_some(strangers)}. VFM-UDA's have the prefixes "
            f"{', '.join(LIGHTNING.values())} and {', '.join(LIGHTNING_OTHERS)}."
        )
    prefix = LIGHTNING.get(weights, "none")
    network = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if not network:
        found = [name for name, one in LIGHTNING.items() if any(full.startswith(one) for full in tensors)]
        raise ValueError(f"no {weights}, only {', '.join(found)}. Give another --weights.")
    idle = [name for name in network if name.startswith((*DECODER, *ADAPTER))]
    adapted = any(name.startswith(ADAPTER) for name in idle)
    encoder = {name.removeprefix("encoder."): tensor for name, tensor in network.items() if name not in idle}
    shapes = Shapes(encoder)
    _, positions, hidden = shapes("pos_embed")
    patch, side = shapes("patch_embed.proj.weight")[2], isqrt(positions - 1)
    if hidden % DINOV2_HEAD or side**2 != positions - 1:
        raise ValueError(
            f"pos_embed {(1, positions, hidden)} is no DINOv2's: it has one position, those of a square, and heads of "
            f"{DINOV2_HEAD} channels."
        )
    depth = shapes.count("blocks.")
    model = Dinov2Model(
        Dinov2Config(
            hidden_size=hidden,
            num_hidden_layers=depth,
            num_attention_heads=hidden // DINOV2_HEAD,
            mlp_ratio=shapes("blocks.0.mlp.fc1.weight")[0] // hidden,
            patch_size=patch,
            image_size=side * patch,
            apply_layernorm=not adapted,
        )
    )
    own = model.state_dict()
    theirs = {name: translate(name, DINOV2_NAMES) for name in own}
    needless = ("mask_token", *(name for name in own if adapted and name.startswith("layernorm.")))

    def as_ours(name: str, tensor: Tensor) -> Tensor:
        part = re.search(r"\.([qkv])_proj\.", name)
        return tensor.chunk(3)["qkv".index(part[1])] if part else tensor

    looks = f"DINOv2 of {hidden} channels and {depth} blocks"
    model.load_state_dict(own | fitted(own, theirs, encoder, (), needless, as_ours, looks))
    return model.eval(), idle


def class_names(given: Sequence[str] | None, notes: Mapping[str, Any], num_labels: int) -> tuple[str, ...]:
    """The names of the outputs: those that are given, those in the file, or Cityscapes'."""
    noted = notes.get("CLASSES")
    if given is None and isinstance(noted, list | tuple) and len(noted) == num_labels:
        given = [str(name) for name in noted]
    if given is None and num_labels == len(CITYSCAPES_CLASSES):
        given = CITYSCAPES_CLASSES
    if given is None or len(given) != num_labels or len(set(given)) != num_labels:
        found = "there are none" if given is None else f"there are {len(given)}: {', '.join(given)}"
        raise ValueError(f"{num_labels} outputs need as many different names, {found}. Give them: --classes NAME ...")
    return tuple(given)


def convert_file(
    source: Path, output: Path, weights: str, classes: Sequence[str] | None, image_size: Size | None
) -> tuple[T2SDAConfig | Dinov2Config, Size | None, list[str]]:
    """Write a checkpoint as a folder for `from_pretrained`, or nothing at all: of VFM-UDA the encoder alone.

    Args:
        source: file of torch.save; only read.
        output: folder that does not exist.
        weights: "student" or "teacher" of a training checkpoint.
        classes: names in the order of the outputs; None takes those in the file, else Cityscapes' 19.
        image_size: (height, width) of the network's input; None is as released for Cityscapes' classes, and for others
            says that images keep theirs.

    Returns:
        The config of the model, or of the encoder, its input size, and the names of the tensors that were left out.

    Raises:
        ValueError: naming what is missing, unknown or of another shape, or that `output` exists.
        CheckpointError: if the folder cannot be written.
    """
    if output.exists():
        raise ValueError(f"{output} exists: nothing is overwritten, choose another folder.")
    tensors, notes = read_checkpoint(source)
    if any(name.startswith(tuple(LIGHTNING.values())) for name in tensors):
        if classes is not None or image_size is not None:
            raise ValueError(
                f"{source} is of VFM-UDA, of which the encoder alone is converted: leave out --classes and "
                "--image_size."
            )
        try:
            encoder, left = convert_encoder(tensors, weights)
        except ValueError as error:
            raise ValueError(f"{source} is not converted: {error}") from error
        output.parent.mkdir(parents=True, exist_ok=True)
        write_folder(output, encoder.save_pretrained, manifest=False)
        return encoder.config, None, left
    try:
        model, idle = convert(pick_network(tensors, weights))
        config: Any = model.config  # transformers types it as that of any model
        names = class_names(classes, notes, config.num_labels)
    except ValueError as error:
        raise ValueError(f"{source} is not converted: {error}") from error
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    if image_size is None and names == CITYSCAPES_CLASSES:
        image_size = (1024, 2048) if config.multi_resolution else (512, 1024)
    processor = T2SDAImageProcessor(size=image_size)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    output.parent.mkdir(parents=True, exist_ok=True)
    write_folder(output, write, manifest=False)
    return config, image_size, idle
