"""Turn a released checkpoint into a folder that from_pretrained can load.

    t2sda convert iter_40000_relevant.pth models/mic
    t2sda convert theirs.pth models/two --weights teacher --classes road other --image_size 512 1024
    t2sda convert vfm_uda.ckpt models/vfm_uda_encoder

The command reads checkpoints of DAFormer, HRDA, MIC, SegFormer (NVIDIA's own and DAFormer's) and DeepLab-V2 on a
ResNet v1c, as forks of mmsegmentation write them. It derives the architecture and its sizes from the names and shapes
of the tensors. If a tensor does not fit anywhere, nothing is written.

Some values cannot be seen in the tensors. For these the command takes the released ones: the dilations, 1-2-5-8
attention heads, and detail crops of 512 pixels. These networks have no projector, so the result gets a new one. The
file is only read: no code in it is run.

Of VFM-UDA and VFM-UDA++ the encoder alone is converted, a DINOv2 for model.pretrained. No head here is their decoder,
and VFM-UDA++ also has an adapter between its blocks, which needs a compiled operator.
"""

from argparse import Namespace

from transformers import Dinov2Config
from transformers.utils import logging

from ..hub.convert import convert_file
from ..models.modeling_t2sda import name_some


def run(args: Namespace) -> int:
    if args.image_size is not None and min(args.image_size) < 32:
        raise ValueError(f"--image_size must be at least 32 32, got {args.image_size}.")
    logging.disable_progress_bar()
    size = tuple(args.image_size) if args.image_size else None
    config, size, idle = convert_file(args.source, args.output, args.weights, args.classes, size)
    if isinstance(config, Dinov2Config):
        beside = "decoder" if config.apply_layernorm else "adapter between its blocks, and its decoder,"
        print(
            f"{args.output}: the encoder alone, a DINOv2 of {config.hidden_size} channels, {config.num_hidden_layers} "
            f"blocks and patches of {config.patch_size}, for model.pretrained with model.size auto. Its {beside} "
            f"cannot be built here, so a head has to be trained. Left out: {name_some(idle)}."
        )
        return 0
    print(
        f"{args.output}: {config.head} on {config.encoder} {tuple(config.hidden_sizes)}, depths {tuple(config.depths)}"
        f"{', two resolutions' if config.multi_resolution else ''}, {config.num_labels} classes, input "
        f"{'as it is' if size is None else f'{size[0]}x{size[1]}'}. New: the projector. Left out: "
        f"{name_some(idle) or 'nothing'}."
    )
    return 0
