"""The run as a tree of frozen dataclasses. Defaults are the paper's main run (GTA5 -> Cityscapes, DAFormer, MiT-B5).

A YAML file lists differences, the command line overrides it with the same dotted keys, and draccus turns both into
this tree. [P] marks a value the paper states, [D] one of the public DAFormer code it builds on, [O] a choice the
paper leaves open, with the letter of its entry in the register of open points.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import draccus
import yaml

from .labels import CITYSCAPES_CLASSES, LABEL_SPACES, THING_CLASSES


def _require(condition: bool, key: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{key} must be {rule}, got {value!r}.")


@dataclass(frozen=True)
class DomainConfig:
    """Where the images of one domain come from and how their labels are read."""

    # A name of data.sources.DRAWN, a parquet file or folder, a folder of images (with label_path, or as imagefolder
    # with metadata), a list of pairs (.txt, .csv, .tsv), a video, a data set of the Hub, or the root of a layout.
    path: str = ""
    split: str = "train"
    layout: str = ""  # path is an unpacked official download: a name of data.layouts.LAYOUTS
    label_path: str = ""  # folder of label maps for a folder of images: same relative names, any extension
    image_suffix: str = ""  # endings of the names before the extension that do not count when the two are matched
    label_suffix: str = ""
    image_column: str = "image"
    label_column: str = "label"
    # Of parquet or the Hub, without having all of it first: the first num_images are fetched; of a target without
    # num_images, images as they come, from a buffer of so many. After a resume these come in another order.
    streaming: bool = False
    shuffle_buffer: int = 128
    frame_step: int = 1  # of a video: every so many frames
    label_space: str = "cityscapes"  # what the ids on disk mean: a name of labels.LABEL_SPACES ...
    class_names: tuple[str, ...] = ()  # ... or the names themselves, position = id ...
    label_ids: dict[int, str] = field(default_factory=dict)  # ... or id: name, where ids have gaps ...
    label_colors: dict[str, str] = field(default_factory=dict)  # ... or "R,G,B" or "#RRGGBB": name, for coloured maps
    ignore_id: int | None = None  # an id on disk without a class; 255 is always one
    label_map: dict[str, str] = field(default_factory=dict)  # data set's class name: run's class name
    crop_box: tuple[int, int, int, int] | None = None  # (top, left, height, width) of the file that is used at all
    resize: tuple[int, int] | None = None  # (height, width) before cropping; None keeps the size
    resize_mode: Literal["keep_ratio", "exact"] = "keep_ratio"  # [D] GTA5 "1280x720" is really 1280x704
    valid_mask: str = ""  # picture of any size: where it is black, a target is never trusted and a label is ignored
    max_pixels: int = 2**25  # larger files are refused before they are decoded; 8192x4096 is allowed
    num_images: int | None = None  # the first so many; None takes all
    drawing_seed: int = 0  # for the drawn streets: another seed is another city

    def __post_init__(self) -> None:
        given = [key for key in ("class_names", "label_ids", "label_colors") if getattr(self, key)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: each says what labels mean. Keep one.")
        if not given and self.label_space not in LABEL_SPACES:
            raise ValueError(
                f"label_space must be one of {', '.join(sorted(LABEL_SPACES))}, got {self.label_space!r}. "
                "For your own ids list their names in class_names, label_ids or label_colors instead."
            )
        for label_id in [*self.label_ids, *([] if self.ignore_id is None else [self.ignore_id])]:
            _require(0 <= label_id <= 255, "label_ids and ignore_id", "ids in 0..255", label_id)
        if self.resize is not None:
            _require(min(self.resize) >= 1, "resize", "two positive numbers (height, width)", self.resize)
        if self.crop_box is not None:
            good = min(self.crop_box) >= 0 and min(self.crop_box[2:]) >= 1
            _require(good, "crop_box", "(top, left, height, width) with a positive height and width", self.crop_box)
        _require(self.shuffle_buffer >= 1, "shuffle_buffer", "at least 1", self.shuffle_buffer)
        _require(self.frame_step >= 1, "frame_step", "at least 1", self.frame_step)
        _require(1 <= self.max_pixels <= 178_956_970, "max_pixels", "in 1..178956970 (Pillow's limit)", self.max_pixels)
        _require(self.num_images is None or self.num_images >= 1, "num_images", "at least 1", self.num_images)


@dataclass(frozen=True)
class ModelConfig:
    size: str = "mit_b5"  # [P] mit_b0 ... mit_b5, resnet50c or resnet101c
    # Encoder weights: Hub id or folder of any SegFormer; of a ResNet v1c also a file; None starts at random.
    pretrained: str | None = "nvidia/mit-b5"
    head: Literal["daformer", "all_mlp", "deeplabv2"] = "daformer"  # [P]
    head_dilations: tuple[int, ...] | None = None  # [D] None: 1, 6, 12, 18 for daformer, 6, 12 for deeplabv2
    decoder_hidden_size: int | None = None  # [D] None: 256, but 768 for all_mlp on mit_b2 to mit_b5
    head_dropout: float = 0.1  # [D]
    drop_path_rate: float = 0.1  # [D]
    encoder_ln_eps_fix: bool = True  # block and stage LayerNorm eps 1e-6 as in the original MiT
    activation_checkpointing: bool = False  # less memory, one more encoder forward
    depths: tuple[int, ...] | None = None  # the next three make an encoder of your own size
    hidden_sizes: tuple[int, ...] | None = None
    num_attention_heads: tuple[int, ...] | None = None

    @property
    def logits_stride(self) -> int:
        """Pixels of the network's input per cell of its logits."""
        return 4 if self.head != "deeplabv2" else 8 if self.size.startswith("resnet") else 32


@dataclass(frozen=True)
class HrdaConfig:
    """[D] HRDA: the whole crop at half size (the context) and a part of it at full size (the detail)."""

    enabled: bool = False
    crop_size: tuple[int, int] = (512, 512)  # (height, width) of the detail, in pixels of data.crop_size
    detail_weight: float = 0.1  # λ_d: losses are (1-λ_d)·fused + λ_d·detail
    crops_at_once: int | None = None  # memory limit where crops cover an image: 9 per image of 1024x1024; None is all

    def __post_init__(self) -> None:
        _require(min(self.crop_size) >= 32, "hrda.crop_size", "at least 32 x 32", self.crop_size)
        _require(0 <= self.detail_weight <= 1, "hrda.detail_weight", "in [0, 1]", self.detail_weight)
        _require(
            self.crops_at_once is None or self.crops_at_once >= 1,
            "hrda.crops_at_once",
            "at least 1, or null for all",
            self.crops_at_once,
        )


@dataclass(frozen=True)
class ProjectorConfig:
    # [O A3] Encoder levels, resized to the finest and concatenated. None: all of a MiT, the last of a ResNet.
    in_index: tuple[int, ...] | None = None
    kernel: int = 1  # [O A2]
    hidden: int = 256  # [O A2]
    dim: int = 256  # [O A2]
    final_relu: bool = True  # [P] "two Conv-BN-ReLU blocks"

    def __post_init__(self) -> None:
        _require(self.kernel in (1, 3), "projector.kernel", "1 or 3", self.kernel)
        levels = self.in_index
        _require(
            levels is None or (levels != () and levels == tuple(sorted(set(levels) & {0, 1, 2, 3}))),
            "projector.in_index",
            "some of the encoder's levels 0 to 3, ascending: the pull compares what the projector makes of them. "
            "null takes the encoder's usual ones; for a run without a pull set loss_weights.pull to 0",
            levels,
        )
        for name in ("hidden", "dim"):
            _require(getattr(self, name) >= 1, f"projector.{name}", "at least 1", getattr(self, name))


@dataclass(frozen=True)
class DataConfig:
    crop_size: tuple[int, int] = (512, 512)  # [P] (height, width)
    outer_crop: Literal["auto", "true", "false"] = "auto"  # [O A10] auto: only when the run translates
    outer_crop_size: tuple[int, int] = (512, 1024)  # [P] the window in which FDA works
    cat_max_ratio: float = 0.75  # [D] no class may cover more of a source crop
    flip: bool = True  # [D] probability 1/2, source and target on their own
    num_workers: int = 0

    def __post_init__(self) -> None:
        _require(min(self.crop_size) >= 32, "data.crop_size", "at least 32 x 32", self.crop_size)
        _require(
            all(s % 32 == 0 for s in self.crop_size),
            "data.crop_size",
            "multiples of 32 (the encoder's coarsest stride)",
            self.crop_size,
        )
        _require(
            all(o >= i for o, i in zip(self.outer_crop_size, self.crop_size, strict=True))
            or self.outer_crop == "false",
            "data.outer_crop_size",
            f"at least data.crop_size {self.crop_size}",
            self.outer_crop_size,
        )
        _require(0 < self.cat_max_ratio <= 1, "data.cat_max_ratio", "in (0, 1]", self.cat_max_ratio)
        _require(self.num_workers >= 0, "data.num_workers", "at least 0", self.num_workers)


@dataclass(frozen=True)
class RareClassSamplingConfig:
    """[D] Source images are drawn by class, rare classes more often."""

    enabled: bool = True
    temperature: float = 0.01
    min_pixels: int = 3000  # at the label's own resolution
    min_crop_ratio: float = 0.5  # a crop must show more than min_pixels * min_crop_ratio pixels of the class

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "rcs.temperature", "positive", self.temperature)
        _require(self.min_pixels >= 0, "rcs.min_pixels", "at least 0", self.min_pixels)


@dataclass(frozen=True)
class UdaConfig:
    """[P] Mean-teacher self-training."""

    source_ce_on: Literal["source", "ptarget"] = "source"  # [P] what L_source sees (Tables 7, 11: "CE on p. target")
    ema_momentum: float = 0.999
    pseudo_threshold: float = 0.968
    weight_scope: Literal["batch", "image"] = "batch"  # [O A6] one trust for the batch, or one per image
    ignore_top: int = 15  # [D] rows of the target crop that are not trusted: rectification border ...
    ignore_bottom: int = 120  # [D] ... and the car's own bonnet, in Cityscapes
    ignore_left: int = 0  # [D] columns of the target *image*, after resizing, wherever the crop lies; HRDA has 30
    ignore_right: int = 0

    def __post_init__(self) -> None:
        _require(0 <= self.ema_momentum <= 1, "uda.ema_momentum", "in [0, 1]", self.ema_momentum)
        _require(0 <= self.pseudo_threshold <= 1, "uda.pseudo_threshold", "in [0, 1]", self.pseudo_threshold)
        _require(self.ignore_top >= 0, "uda.ignore_top", "at least 0", self.ignore_top)
        _require(self.ignore_bottom >= 0, "uda.ignore_bottom", "at least 0", self.ignore_bottom)
        _require(self.ignore_left >= 0, "uda.ignore_left", "at least 0", self.ignore_left)
        _require(self.ignore_right >= 0, "uda.ignore_right", "at least 0", self.ignore_right)


@dataclass(frozen=True)
class MixConfig:
    classes_from: Literal["batch", "image"] = "batch"  # [D] DACS draws per image; DAFormer's slip is kept
    source: Literal["source", "pseudo_target"] = "source"  # [O A7] which version of the source is pasted


@dataclass(frozen=True)
class AugmentConfig:
    """[D] Strong augmentation of the mixed image."""

    jitter_probability: float = 0.8
    jitter_strength: float = 0.2
    blur_probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("jitter_probability", "blur_probability", "jitter_strength"):
            _require(0 <= getattr(self, name) <= 1, f"augment.{name}", "in [0, 1]", getattr(self, name))


@dataclass(frozen=True)
class PatchMaskConfig:
    """[D] MIC: squares of the target image are hidden from the student. Weight: loss_weights.masked_consistency."""

    block_size: int = 64  # pixels, for crops of 1024; 32 for 512
    ratio: float = 0.7  # of the squares is hidden

    def __post_init__(self) -> None:
        _require(self.block_size >= 1, "patch_mask.block_size", "at least 1", self.block_size)
        _require(0 <= self.ratio <= 1, "patch_mask.ratio", "in [0, 1]", self.ratio)


@dataclass(frozen=True)
class FdaConfig:
    beta: float = 0.01  # [O A1] half side of the swapped square, as a share of the shorter image side
    window: Literal["square", "rect"] = "square"  # [O A12]
    clip: bool = False  # FDA does not clip

    def __post_init__(self) -> None:
        _require(0 <= self.beta <= 0.5, "translate.fda.beta", "in [0, 0.5]", self.beta)


@dataclass(frozen=True)
class ColorJitterConfig:
    """[P] "the same with SimCLR"."""

    probability: float = 0.8  # [O A13]
    strength: float = 1.0

    def __post_init__(self) -> None:
        for name in ("probability", "strength"):
            _require(0 <= getattr(self, name) <= 1, f"translate.color_jitter.{name}", "in [0, 1]", getattr(self, name))


@dataclass(frozen=True)
class GaussianBlurConfig:
    """[P] "the same with SimCLR"."""

    probability: float = 0.5  # [O A13]
    sigma: tuple[float, float] = (0.1, 2.0)  # pixels

    def __post_init__(self) -> None:
        _require(0 <= self.probability <= 1, "translate.gaussian_blur.probability", "in [0, 1]", self.probability)
        _require(0 < self.sigma[0] <= self.sigma[1], "translate.gaussian_blur.sigma", "0 < low <= high", self.sigma)


STYLES = ("fda", "randomization", "adain", "weather", "cartoon")


@dataclass(frozen=True)
class StyleConfig:
    """[P] Domain generalisation draws one of five styles per image. Those without their files are left out."""

    styles: tuple[str, ...] = STYLES
    images: str = ""  # folder of style images (paintings), for fda and adain
    adain: str = ""  # folder or Hub repository: vgg_normalised and decoder, .safetensors or .pth
    randomization: str = ""  # the same: checkpoint_transformer, checkpoint_stylepredictor, checkpoint_embeddings
    random_share: float = 0.5  # [D] of the drawn style; the rest is the image's own

    def __post_init__(self) -> None:
        known = bool(self.styles) and set(self.styles) <= set(STYLES) and len(set(self.styles)) == len(self.styles)
        _require(known, "translate.style.styles", f"some of {', '.join(STYLES)}, each once", self.styles)
        _require(0 <= self.random_share <= 1, "translate.style.random_share", "in [0, 1]", self.random_share)


@dataclass(frozen=True)
class TrainedConfig:
    """A translator that was trained beforehand: a network, or a folder of the images it made."""

    model: str = ""  # folder or Hub repository with config.json and model.safetensors
    architecture: str = "t2sda_hf.translate.generator:TranslationGenerator"  # the class of its nn.Module
    folder: str = ""  # one image per source image, and manifest.json


NEEDS_TARGET = ("fda", "trained")  # engines that look, or whose training looked, at target images


@dataclass(frozen=True)
class TranslateConfig:
    engine: Literal["fda", "color_jitter", "gaussian_blur", "style", "trained", "none"] = "fda"  # [P]
    reference: Literal["paired", "random"] = "paired"  # [O A9] the target image of the pair, or another one
    hrda_scale: Literal["context", "full"] = "context"  # [O A23] with hrda.enabled: before or after halving
    fda: FdaConfig = FdaConfig()
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    gaussian_blur: GaussianBlurConfig = GaussianBlurConfig()
    style: StyleConfig = StyleConfig()
    trained: TrainedConfig = TrainedConfig()

    def __post_init__(self) -> None:
        _require(
            self.engine != "trained" or bool(self.trained.model) != bool(self.trained.folder),
            "translate.trained",
            "given with engine trained: either model (a network) or folder (translated images)",
            self.trained,
        )


@dataclass(frozen=True)
class PullConfig:
    """[P] The pull loss. The letters are the paper's."""

    query_domain: Literal["source", "ptarget", "target"] = "ptarget"  # what is pulled (Table 7) ...
    key_domain: Literal["source", "ptarget", "target"] = "source"  # ... to the prototypes of what
    temperature: float = 0.2  # τ
    num_queries: int = 128  # n, per class on average
    num_negatives: int = 1024  # m, per query
    unreliable_ratio: float = 0.5  # α
    objective: Literal["infonce", "mse"] = "infonce"
    query_sampling: Literal["cbqs", "ceqs", "uniform"] = "cbqs"  # [O A17]
    negatives: Literal["denps", "pooled"] = "denps"
    share_negatives: Literal["class", "query"] = "class"  # [O A19]
    reduction: Literal["mean_w", "sum_paper", "mean_paper"] = "mean_w"  # [O A20]
    label_downscale: Literal["nearest", "ratio"] = "nearest"  # [O A14]
    ignore_as_negative: bool = False  # [O A15]
    class_set: tuple[str, ...] = ()  # [O A16] the C classes of the benchmark; () is all
    gamma_scope: Literal["batch", "image"] = "batch"  # [O A18]
    target_min_conf: float = 0.0  # [O A24] pseudo-labels below it neither pull nor are pulled to, see query_domain
    sync_stats: bool = True  # [O A8] prototypes, class shares and confidences over all processes
    teacher_forward: Literal["separate", "joint"] = "separate"  # [O A5]
    start_step: int = 0  # [O A31]
    augment: bool = False  # [O A33] colour-augment the pseudo-target image
    bn_track_ptarget: bool = True  # whether pseudo-target images count in the running statistics of a ResNet
    proto_momentum: float = 0.0  # [O A34] memory of prototypes across steps
    proto_prenorm: bool = False  # [O A35] unit length before averaging

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "pull.temperature", "positive", self.temperature)
        _require(self.num_queries >= 1, "pull.num_queries", "at least 1", self.num_queries)
        _require(self.num_negatives >= 2, "pull.num_negatives", "at least 2", self.num_negatives)
        for name in ("unreliable_ratio", "target_min_conf"):
            _require(0 <= getattr(self, name) <= 1, f"pull.{name}", "in [0, 1]", getattr(self, name))
        _require(0 <= self.proto_momentum < 1, "pull.proto_momentum", "in [0, 1)", self.proto_momentum)


@dataclass(frozen=True)
class DrwConfig:
    """[P] Dynamic re-weighting of classes by the teacher's confidence on the target."""

    apply_to: Literal["pull", "target", "none"] = "pull"
    beta: float = 0.5
    absent_conf: Literal["zero", "one", "mean", "ema"] = "zero"  # [O A21]
    use_valid_mask: bool = False
    normalise_over: Literal["all", "queried"] = "all"

    def __post_init__(self) -> None:
        _require(self.beta >= 0, "drw.beta", "at least 0", self.beta)


@dataclass(frozen=True)
class FeatureDistanceConfig:
    """[D] Distance to the frozen ImageNet encoder on thing classes. Its weight is loss_weights.feature_distance."""

    classes: tuple[str, ...] = THING_CLASSES  # those the run does not have are left out; () takes every pixel
    min_ratio: float = 0.75


@dataclass(frozen=True)
class LossWeights:
    """The only place of weights. A weight of 0 costs nothing: its forward passes are not run."""

    source: float = 1.0
    feature_distance: float = 0.005  # [D]
    target: float = 1.0
    pull: float = 0.1  # [P] λ
    masked_consistency: float = 0.0  # [D] 1 in MIC

    def __post_init__(self) -> None:
        for name in ("source", "feature_distance", "target", "pull", "masked_consistency"):
            _require(getattr(self, name) >= 0, f"loss_weights.{name}", "at least 0", getattr(self, name))


@dataclass(frozen=True)
class OptimConfig:
    """[P] AdamW, linear warm-up times linear decay."""

    lr: float = 6e-5  # encoder
    head_lr_multiplier: float = 10.0  # head and projector
    weight_decay: float = 0.01
    warmup_steps: int = 1500
    warmup_ratio: float = 1e-6  # [D]
    power: float = 1.0
    max_grad_norm: float | None = None  # [D] no clipping

    def __post_init__(self) -> None:
        _require(self.lr > 0, "optim.lr", "positive", self.lr)
        _require(self.warmup_steps >= 0, "optim.warmup_steps", "at least 0", self.warmup_steps)


@dataclass(frozen=True)
class TrainConfig:
    max_steps: int = 40_000  # [P]
    batch_size: int = 2  # [P] source images and as many target images, per process and micro-batch
    micro_batches: int = 1  # per step and process; statistics stay per micro-batch
    # [O A4] Of matrix products and convolutions; weights and losses are float32. tf32, on GPUs that have it, was the
    # default at the paper's time. bf16 is also what `accelerate launch --mixed_precision bf16` asks for.
    precision: Literal["tf32", "float32", "bf16"] = "tf32"
    # Backend of torch.compile for encoder, heads and projector; eager captures graphs, but runs them as written.
    compile: Literal["none", "inductor", "eager"] = "none"
    overfit_batch: bool = False  # for debugging: every update sees the batch of the first
    log_every: int = 50
    evaluate_every: int = 4_000
    save_every: int = 4_000
    keep_checkpoints: int = 2  # the newest so many; older ones are deleted
    non_finite: Literal["stop", "skip"] = "stop"  # what to do with an update whose losses or gradients are not finite
    max_skipped_steps: int = 10  # of the whole run; one more stops it
    timeout_seconds: float = 60.0  # how long a process waits for the others, also while one of them writes a checkpoint
    num_threads: int | None = None  # CPU threads of torch; None leaves torch's choice
    log_with: tuple[str, ...] = ("tensorboard",)  # trackers of accelerate; () is none

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "micro_batches",
            "log_every",
            "evaluate_every",
            "save_every",
            "keep_checkpoints",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        _require(self.max_skipped_steps >= 0, "train.max_skipped_steps", "at least 0", self.max_skipped_steps)
        _require(self.timeout_seconds > 0, "train.timeout_seconds", "positive", self.timeout_seconds)


@dataclass(frozen=True)
class EvaluationConfig:
    mode: Literal["whole", "slide"] = "whole"  # [D]
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None
    limit: int | None = None  # only the first so many images
    source_images: int = 32  # also score so many images of the source, evenly spread; they are seen in training

    def __post_init__(self) -> None:
        _require(self.source_images >= 0, "evaluation.source_images", "at least 0", self.source_images)
        if self.mode == "slide" and (self.window is None or self.stride is None):
            raise ValueError("evaluation.mode slide needs evaluation.window and evaluation.stride (height, width).")


@dataclass(frozen=True)
class PushConfig:
    """Publish the student when the run is done. There is no key for the token: `hf auth login`, or HF_TOKEN."""

    repo_id: str = ""  # user/name; "" publishes nothing
    private: bool = False
    create_pr: bool = False  # offer the files as a pull request instead of writing to the main branch
    license: str = ""  # of the weights, an id of the Hub; "" is worked out where nothing but drawn streets was used
    terms: dict[str, str] = field(default_factory=dict)  # source, target and test: under which terms the images come
    source_only: str = ""  # <run>/source_only to compare with, if this run has no baseline
    start: str = ""  # what the weights are, if model.pretrained is a folder or file of yours
    note: str = ""  # a sentence for readers of the scores, for example how the settings were chosen
    picture: Literal["images", "predictions"] = "images"  # on the card; some data sets' images must not be passed on

    def __post_init__(self) -> None:
        unknown = sorted(set(self.terms) - {"source", "target", "test"})
        _require(not unknown, "push_to_hub.terms", "a mapping with the keys source, target and test", unknown)


@dataclass(frozen=True)
class RunConfig:
    """One run: `method` learns `classes` from `source` and `target`, and is measured on `test`."""

    method: Literal["t2sda", "source_only", "generalization"] = "t2sda"
    baseline: Literal["none", "source_only"] = "none"  # train this first from the same initial weights, and compare
    seed: int = 0
    output_dir: str = "outputs/run"
    resume: str | None = None  # auto: go on with the run in output_dir, if there is one; or the path of a checkpoint
    # Which weights are offered beside the last: those of the evaluation with the best proxy, see evaluation/watch.py.
    select: Literal[
        "last",
        "proxy:confidence",
        "proxy:coverage",
        "proxy:agreement",
        "proxy:stability",
        "proxy:prior",
        "proxy:source",
        "proxy:combined",
    ] = "last"
    allow_changes: tuple[str, ...] = ()  # keys that may differ from the resumed run, though they change the result
    classes: tuple[str, ...] = CITYSCAPES_CLASSES
    source: DomainConfig = DomainConfig()
    target: DomainConfig = DomainConfig()
    test: DomainConfig = DomainConfig(split="validation")  # labelled, read by evaluation only
    model: ModelConfig = ModelConfig()
    hrda: HrdaConfig = HrdaConfig()
    projector: ProjectorConfig = ProjectorConfig()
    data: DataConfig = DataConfig()
    rcs: RareClassSamplingConfig = RareClassSamplingConfig()
    uda: UdaConfig = UdaConfig()
    mix: MixConfig = MixConfig()
    augment: AugmentConfig = AugmentConfig()
    patch_mask: PatchMaskConfig = PatchMaskConfig()
    translate: TranslateConfig = TranslateConfig()
    pull: PullConfig = PullConfig()
    drw: DrwConfig = DrwConfig()
    feature_distance: FeatureDistanceConfig = FeatureDistanceConfig()
    loss_weights: LossWeights = LossWeights()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    push_to_hub: PushConfig = PushConfig()

    def __post_init__(self) -> None:
        _require(self.seed >= 0, "seed", "at least 0", self.seed)
        _require(len(self.classes) >= 2, "classes", "at least 2 names", self.classes)
        _require(len(set(self.classes)) == len(self.classes), "classes", "without repetition", self.classes)
        unknown = [name for name in self.pull.class_set if name not in self.classes]
        _require(not unknown, "pull.class_set", f"names of classes {self.classes}", unknown)
        rows = self.uda.ignore_top + self.uda.ignore_bottom
        _require(
            rows < self.data.crop_size[0],
            "uda.ignore_top + uda.ignore_bottom",
            f"less than the crop's {self.data.crop_size[0]} rows, or no target pixel is left",
            rows,
        )
        _require(
            self.model.pretrained is not None or not self.loss_weights.feature_distance,
            "loss_weights.feature_distance",
            "0 when model.pretrained is null: the encoder to stay near would be a random one",
            self.loss_weights.feature_distance,
        )
        _require(
            not (self.model.activation_checkpointing and self.model.size.startswith("resnet")),
            "model.activation_checkpointing",
            "false for a ResNet: run twice, its batch norm would count every batch twice",
            self.model.activation_checkpointing,
        )
        self._check_weights()
        if self.hrda.enabled:
            self._check_hrda()
        if self.method == "generalization":
            self._check_generalization()

    def _check_weights(self) -> None:
        """Every run learns something, and what is switched on has something to act on."""
        weights = self.loss_weights
        used = {"source_only": ("source",), "generalization": ("source", "feature_distance", "pull")}
        names = used.get(self.method, tuple(vars(weights)))
        _require(
            any(getattr(weights, name) > 0 for name in names),
            " or ".join(f"loss_weights.{name}" for name in names),
            f"positive with method {self.method}, or nothing is learned",
            tuple(getattr(weights, name) for name in names),
        )
        _require(
            self.drw.apply_to != "target" or weights.target > 0,
            "drw.apply_to",
            "pull or none when loss_weights.target is 0: there is no target loss to weigh. Or give that a weight",
            self.drw.apply_to,
        )
        _require(
            self.pull.start_step < self.train.max_steps or not weights.pull,
            "pull.start_step",
            f"below train.max_steps {self.train.max_steps}. For a run without a pull set loss_weights.pull to 0",
            self.pull.start_step,
        )

    def _check_hrda(self) -> None:
        crop, detail, grid = self.data.crop_size, self.hrda.crop_size, 2 * self.model.logits_stride
        _require(
            all(side % 64 == 0 for side in crop),
            "data.crop_size",
            "multiples of 64 with hrda.enabled (the encoder's coarsest stride, at half size)",
            crop,
        )
        _require(
            all(side % grid == 0 for side in detail),
            "hrda.crop_size",
            f"multiples of {grid}, twice the stride of the logits, so that the detail lies on the grid of the context",
            detail,
        )
        _require(
            all(inner <= outer for inner, outer in zip(detail, crop, strict=True)),
            "hrda.crop_size",
            f"at most data.crop_size {crop}, of which it is a part",
            detail,
        )
        if self.translate.hrda_scale == "full":
            return
        _require(
            not self.translates or all(side % 2 == 0 for side in self.data.outer_crop_size),
            "data.outer_crop_size",
            "even with hrda.enabled: it is translated at half size",
            self.data.outer_crop_size,
        )
        for key, given in (("mix.source", self.mix.source), ("uda.source_ce_on", self.uda.source_ce_on)):
            _require(
                given == "source",
                key,
                "'source' with hrda.enabled: images are translated at half size, and mixed and learned from at full "
                "size. Or set translate.hrda_scale to full",
                given,
            )

    def _check_generalization(self) -> None:
        _require(
            not self.target.path,
            "target.path",
            "empty with method generalization: it learns without any target. Set method t2sda to adapt to one",
            self.target.path,
        )
        _require(
            self.translate.engine not in NEEDS_TARGET,
            "translate.engine",
            f"none of {', '.join(NEEDS_TARGET)} with method generalization: they know the target. Take style",
            self.translate.engine,
        )
        _require(
            self.drw.apply_to == "none",
            "drw.apply_to",
            "none with method generalization: there is no confidence on a target to weigh classes by",
            self.drw.apply_to,
        )
        _require(
            "target" not in (self.pull.query_domain, self.pull.key_domain),
            "pull.query_domain and pull.key_domain",
            "source or ptarget with method generalization",
            (self.pull.query_domain, self.pull.key_domain),
        )

    @property
    def translates(self) -> bool:
        """Whether the objective needs pseudo-target images."""
        if self.method == "source_only" or self.translate.engine == "none":
            return False
        pulls = self.loss_weights.pull > 0 and "ptarget" in (self.pull.query_domain, self.pull.key_domain)
        if self.method == "generalization":
            return pulls
        return pulls or self.mix.source == "pseudo_target" or self.uda.source_ce_on == "ptarget"

    @property
    def uses_outer_crop(self) -> bool:
        translates_windows = self.translates and self.method == "t2sda"
        return translates_windows if self.data.outer_crop == "auto" else self.data.outer_crop == "true"


def load_config(path: str | Path | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file of differences and apply command line overrides (`--optim.lr 1e-4`, `--seed=3`).

    Both use the same keys, nested or dotted, and values in YAML's form (`--data.crop_size "[64, 128]"`).

    Raises:
        ValueError: for a missing file, an unknown key (naming the nearest known one), a wrong type or a value out
            of range. The message names the key, the rule and the value.
    """
    tree: dict[str, Any] = draccus.encode(RunConfig())  # a section that is given in part keeps the rest of its default
    if path is not None:
        if not Path(path).is_file():
            raise ValueError(f"config file {str(path)!r} does not exist. Give the path of a YAML file, see configs/.")
        content = _parse_yaml(Path(path).read_text(encoding="utf-8"), str(path))
        if content is not None and not isinstance(content, dict):
            raise ValueError(f"{path} must map keys to values, got a {type(content).__name__}.")
        _merge(tree, content or {}, "", str(path))
    arguments = list(overrides)
    while arguments:
        key, equals, value = arguments.pop(0).partition("=")
        if not key.startswith("--") or not (equals or arguments):
            raise ValueError(
                f"expected --key value on the command line, got {key!r}{'' if equals else ' and no value'}."
            )
        text = value if equals else arguments.pop(0)
        _merge(tree, {key[2:]: _parse_yaml(text, key)}, "", "the command line")
    for item in fields(RunConfig):  # first, because a domain does not know which of the three it is
        if item.type is DomainConfig:
            _decode(DomainConfig, tree[item.name], f"{item.name}.")
    return _decode(RunConfig, tree)


def dump_config(config: RunConfig) -> str:
    """The whole resolved run as YAML that `load_config` reads back to an equal RunConfig."""
    return str(draccus.dump(config))


def _decode(cls: type, tree: Mapping[str, Any], prefix: str = "") -> Any:
    try:
        return draccus.decode(cls, tree)
    except draccus.ParsingError as error:  # a wrapped error of a __post_init__, whose text is ours
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ValueError(f"{prefix}{root}") from error


def _dotted_keys(cls: type, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for item in fields(cls):
        if is_dataclass(item.type):
            keys += _dotted_keys(item.type, f"{prefix}{item.name}.")  # type: ignore[arg-type]
        else:
            keys.append(prefix + item.name)
    return keys


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error


def _merge(tree: dict[str, Any], values: Mapping[str, Any], prefix: str, where: str) -> None:
    """Put `values` (nested or dotted keys) into the nested `tree`, refusing what RunConfig does not have."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        kind: Any = RunConfig
        node = tree
        *sections, leaf = key.split(".")
        for position, part in enumerate([*sections, leaf]):
            types = {item.name: item.type for item in fields(kind)} if is_dataclass(kind) else {}
            if part not in types:
                while isinstance(value, dict) and value:  # "traget: {path: x}" is about traget.path
                    inner, value = next(iter(value.items()))
                    key += f".{inner}"
                raise ValueError(_unknown_key(key, where))
            kind = types[part]
            if position < len(sections):
                node = node[part]
        if is_dataclass(kind):
            if not isinstance(value, dict):
                inside = ", ".join(known for known in _dotted_keys(RunConfig) if known.startswith(f"{key}."))
                raise ValueError(
                    f"{key} in {where} is a section, got the value {value!r}. Set one of its keys: {inside}."
                )
            _merge(tree, value, f"{key}.", where)
        else:
            if isinstance(value, bool) and str(value).lower() in get_args(kind):
                value = str(value).lower()  # a choice between the words "true" and "false" and others
            if not _fits(value, kind):
                raise ValueError(f"{key} in {where} must be {_in_words(kind)}, got {value!r}.")
            node[leaf] = value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value, as YAML reads it, has the type of a field. draccus makes text of lists and 1.0 of true."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and isinstance(value, list):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    if origin is dict and isinstance(value, dict):
        return all(_fits(name, inner[0]) and _fits(part, inner[1]) for name, part in value.items())
    if kind is float:  # 6e-5 is a text to YAML 1.1; neither true nor .nan looks like a number
        return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", str(value).lower()) is not None
    return type(value) is kind


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return " or ".join(_in_words(one) for one in inner)
    if origin is Literal:
        return f"one of {', '.join(inner)}"
    if origin is tuple:
        items = "whole numbers" if inner[0] is int else "texts"
        return f"a list like [a, b] of {items if inner[-1] is Ellipsis else f'{len(inner)} {items}'}"
    if origin is dict:
        return "a mapping like {a: b} of texts"
    words = {str: "text (a number in quotes)", int: "a whole number", float: "a number", bool: "true or false"}
    return words.get(kind, "null")


def _unknown_key(key: str, where: str) -> str:
    known = _dotted_keys(RunConfig)
    leaf = key.rsplit(".", 1)[-1]
    # The right name under the wrong section is nearer than another name that merely looks alike.
    same = [k for k in known if k.rsplit(".", 1)[-1] == leaf]
    near = difflib.get_close_matches(key, same, 1, 0.0) or difflib.get_close_matches(key, known, 1, 0.75)
    if not near:
        near = [k for k in known if difflib.get_close_matches(leaf, [k.rsplit(".", 1)[-1]], 1, 0.7)]
    inside = [k for k in known if k.startswith(f"{key.split('.')[0]}.")]
    if near:
        hint = f"Did you mean {near[0]!r}?"
    elif inside:
        hint = f"Keys there are {', '.join(inside)}."
    else:
        hint = f"Sections are {', '.join(sorted({k.split('.')[0] for k in known}))}."
    return f"unknown key {key!r} in {where}. {hint}"
