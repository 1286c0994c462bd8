"""The run as a tree of frozen dataclasses: every key with its default, its meaning, its source and what it changes.

A default serves any data, or is a value of the paper that no data set owns. Where the right value depends on the images
or on the length of the run, the default is null, and `training.derive` puts a number in its place before anything reads
it. What only Cityscapes needs, or only one network, stands in the recipes of configs/. [P] marks a value that the paper
states, [D] one of the public DAFormer code that it builds on, [O] a choice that the paper leaves open, with its entry
in the register of open points.
"""

import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from ..labels import CITYSCAPES_CLASSES, IGNORE_INDEX, LABEL_SPACES, VOID
from .keys import Changes, Derived, Flag, Key, Number, Section, Size, Stages, Whole, key, require, walk


@dataclass(frozen=True)
class DomainConfig(Section):
    """Where the images of one domain come from and how their labels are read."""

    path: str = key(
        "",
        "a parquet file or folder, a folder of images (with label_path, or as imagefolder with metadata), a list of "
        "pairs (.txt, .csv, .tsv), a video (target), a data set of the Hub, the root of a layout, or generated toy "
        "streets: streets-source, streets-simulator, streets-target, streets-night",
        changes="placement",
    )
    name: str = key(
        "",
        'what the domain is called in cards and tables; "" takes the last folder of path that says something',
        changes="nothing",
    )
    split: str = key("train", "split of the data set that is read")
    layout: str = key("", "path is an unpacked official download of this name; `t2sda prepare --help` lists them")
    label_path: str = key(
        "",
        "folder of label maps for a folder of images: same relative names, any extension",
        changes="placement",
    )
    image_suffix: str = key("", "ending of image names, before the extension, that does not count in the matching")
    label_suffix: str = key("", "ending of label map names, before the extension, that does not count in the matching")
    image_column: str = key("image", "column of the images in a data set")
    label_column: str = key("label", "column of the label maps in a data set")
    streaming: Flag = key(
        False,
        "parquet or a data set of the Hub without having all of it first: the first num_images are fetched; without "
        "num_images, images of a target as they are drawn, and of a source that `t2sda prepare` wrote",
    )
    shuffle_buffer: Whole = key(
        128, "images of a streamed target that are held at least, to draw from several row groups", at_least=1
    )
    frame_step: Whole = key(1, "of a video, every so many frames", at_least=1)
    label_space: str = key(
        "",
        f'what ids in label maps mean: {", ".join(LABEL_SPACES)}; "" is cityscapes for its 19 classes, and must be '
        "said for others",
    )
    class_names: tuple[str, ...] = key((), "names of the ids in label maps, position = id; instead of label_space")
    label_ids: dict[Whole, str] = key({}, "names of ids in label maps as {id: name}; instead of label_space")
    label_colors: dict[str, str] = key(
        {}, 'names of colours in label maps as {"R,G,B", "#RRGGBB" or "transparent": name}'
    )
    ignore_id: Whole | None = key(
        None, "one more id in label maps that has no class; so are -1, and 255 unless it is named"
    )
    label_map: dict[str, str] = key({}, "{class name of the data set: class name of the run}, where names differ")
    crop_box: tuple[Whole, Whole, Whole, Whole] | None = key(
        None, "(top, left, height, width) in pixels of the file that are used at all; null uses all", at_least=0
    )
    resize: Size | None = key(None, "(height, width) in pixels before cropping; null keeps the size", at_least=1)
    resize_mode: Literal["keep_ratio", "exact"] = key(
        "keep_ratio",
        'how resize is reached; keep_ratio fits every image into it in its own shape: in "1280x720" GTA5 has 1280x704',
        "D",
    )
    valid_mask: str = key(
        "",
        "a picture of any size: where it is black, a target is never trusted and a label is ignored",
        changes="placement",
    )
    max_pixels: Whole = key(
        2**25, "larger files are refused before they are decoded; 8192x4096 is allowed", at_least=1, at_most=178_956_970
    )
    num_images: Whole | None = key(None, "the first so many images; null takes all", at_least=1)
    share: Number = key(
        1.0,
        "of a domain in a list of sources or of targets: how often it is drawn, in proportion to the shares of the "
        "others",
        above=0,
    )

    @property
    def streamed(self) -> bool:
        """Whether images are read while a run trains, and not all of them are there before."""
        return self.streaming and self.num_images is None

    def check(self) -> None:
        given = [name for name in ("class_names", "label_ids", "label_colors") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} contradict each other: each says what labels mean. Keep one.")
        if not given and self.label_space and self.label_space not in LABEL_SPACES:
            raise ValueError(
                f"label_space must be one of {', '.join(sorted(LABEL_SPACES))}, got {self.label_space!r}. "
                "For your own ids list their names in class_names, label_ids or label_colors instead."
            )
        require(len(self.class_names) <= 256, "class_names", "at most 256 names: ids are 0..255", len(self.class_names))
        named = len(set(self.label_colors.values()))
        require(named <= 256, "label_colors", "colours of at most 256 names", named)
        for label_id in [*self.label_ids, *([] if self.ignore_id is None else [self.ignore_id])]:
            require(-1 <= label_id <= 255, "label_ids and ignore_id", "ids in 0..255, or -1", label_id)
        none = self.label_ids.get(-1, VOID)
        require(none == VOID, "label_ids", f"{VOID!r} for -1, which stands for pixels without a class", none)
        if self.resize is not None:
            most = max(self.max_pixels, 2**25)
            require(self.resize[0] * self.resize[1] <= most, "resize", f"at most {most} pixels", self.resize)
        if self.crop_box is not None:
            good = min(self.crop_box[2:]) >= 1
            require(good, "crop_box", "(top, left, height, width) with a positive height and width", self.crop_box)


def _one_or_several(given: Any) -> str:
    return "several" if isinstance(given, list | tuple) else "one"


# A domain, or two and more of one role; `load_config` makes a single domain of a list of one.
DomainConfigs = Annotated[
    Annotated[DomainConfig, Tag("one")] | Annotated[tuple[DomainConfig, ...], Tag("several")],
    Discriminator(_one_or_several),
]


def several(domains: DomainConfigs) -> tuple[DomainConfig, ...]:
    """The domains of a role in their order; one that has no path counts, too."""
    return domains if isinstance(domains, tuple) else (domains,)


def shares_of(domains: DomainConfigs) -> tuple[float, ...]:
    """What share of the draws each domain has; they sum to 1."""
    total = sum(domain.share for domain in several(domains))
    return tuple(domain.share / total for domain in several(domains))


def only(domains: DomainConfigs, what: str) -> DomainConfig:
    """The domain, for those that can do with one alone, or ValueError. `what` begins the sentence: "t2sda push takes".

    Raises:
        ValueError: if there are several.
    """
    if isinstance(domains, tuple):
        paths = ", ".join(domain.path for domain in domains)
        raise ValueError(f"{what}, and the config lists {len(domains)}: {paths}. Give a config with one of them.")
    return domains


@dataclass(frozen=True)
class ModelConfig(Section):
    """The network: an encoder, and a head."""

    section = "model"
    size: str = key(
        "mit_b5",
        "mit_b0 ... mit_b5, resnet50c or resnet101c; auto is the encoder that model.pretrained names, any backbone of "
        "transformers",
        "P",
    )
    pretrained: str | None = key(
        "nvidia/mit-b5",
        "encoder weights: Hub id or folder of any SegFormer, with size auto of any backbone, of a ResNet v1c also a "
        "file; null starts at random",
    )
    random_start: Flag = key(False, "with size auto: take the sizes alone of model.pretrained, and random weights")
    out_layers: tuple[Whole, ...] | None = key(
        None,
        "of a plain ViT the four layers that are read, or one, counted from 1; null is the ends of its four quarters",
        at_least=1,
    )
    head: Literal["daformer", "all_mlp", "linear", "deeplabv2"] = key("daformer", "what makes classes of features", "P")
    head_dilations: tuple[Whole, ...] | None = key(
        None,
        "of the head's branches; null is 1, 6, 12, 18 for daformer and 6, 12 for deeplabv2",
        "D",
        at_least=1,
        at_most=256,
    )
    decoder_hidden_size: Whole | None = key(
        None, "channels of the head; null is 256, but 768 for all_mlp on mit_b2 to mit_b5", "D", at_least=1
    )
    head_dropout: Number = key(0.1, "share of channels that the head drops in training", "D", at_least=0, below=1)
    drop_path_rate: Number = key(
        0.1, "probability with which the last block of the encoder is skipped", "D", at_least=0, below=1
    )
    activation_checkpointing: Flag = key(
        False, "keep less for backward and compute it once more: less memory, more time", changes="nothing"
    )
    depths: Stages | None = key(
        None, "blocks of the four stages, for an encoder of your own size", at_least=1, at_most=256
    )
    hidden_sizes: Stages | None = key(None, "channels of the four stages, for an encoder of your own size", at_least=1)
    num_attention_heads: Stages | None = key(
        None, "attention heads of the stages, which divide their channels", at_least=1
    )

    def check(self) -> None:
        automatic = self.size == "auto"
        require(
            not automatic or self.pretrained is not None,
            "model.pretrained",
            "a Hub id or a folder with model.size auto, which takes the encoder's sizes from it. For random weights "
            "set model.random_start",
            self.pretrained,
        )
        require(automatic or not self.random_start, "model.random_start", "false unless model.size is auto", True)
        require(
            automatic or self.out_layers is None, "model.out_layers", "null unless model.size is auto", self.out_layers
        )
        given = {name: getattr(self, name) for name in ("depths", "hidden_sizes", "num_attention_heads")}
        given = {f"model.{name}": value for name, value in given.items() if value is not None}
        require(
            not automatic or not given,
            " and ".join(given),
            "null with model.size auto: model.pretrained has them",
            given,
        )
        require(
            not automatic or self.head != "deeplabv2",
            "model.head",
            "daformer, all_mlp or linear with model.size auto",
            self.head,
        )
        branches = self.head_dilations
        require(branches is None or 1 <= len(branches) <= 16, "model.head_dilations", "1 to 16 numbers", branches)
        heads, channels = self.num_attention_heads, self.hidden_sizes
        require(
            not heads or not channels or all(size % head == 0 for size, head in zip(channels, heads, strict=True)),
            "model.hidden_sizes",
            f"multiples of model.num_attention_heads {heads}",
            channels,
        )

    @property
    def logits_stride(self) -> int:
        """Pixels of the network's input per cell of its logits."""
        return 4 if self.head != "deeplabv2" else 8 if self.size.startswith("resnet") else 32


@dataclass(frozen=True)
class HrdaConfig(Section):
    """HRDA: the whole crop at half size (the context) and a part of it at full size (the detail)."""

    section = "hrda"
    enabled: Flag = key(False, "train and predict at two resolutions", "D")
    crop_size: Derived[Size] = key(
        None,
        "(height, width) of the detail, in pixels of data.crop_size; null is half of that, HRDA's share",
        "D",
        at_least=32,
    )
    detail_weight: Number = key(
        0.1, "λ_d: losses are (1-λ_d) of the fused logits' and λ_d of the detail's", "D", at_least=0, at_most=1
    )
    crops_at_once: Whole | None = key(
        None,
        "how many crops a forward takes where crops cover an image, 9 per image of 1024x1024; null is all",
        changes="nothing",
        at_least=1,
    )


@dataclass(frozen=True)
class ProjectorConfig(Section):
    """The projector g: two convolutions that turn features into the embeddings that are pulled."""

    section = "projector"
    in_index: tuple[Whole, ...] | None = key(
        None,
        "encoder levels, resized to the finest and concatenated; null is all of a MiT, the last of a ResNet",
        "O A3",
        at_least=0,
        at_most=3,
    )
    kernel: Whole = key(1, "side of its convolutions, 1 or 3", "O A2", at_least=1, at_most=3)
    hidden: Whole = key(256, "channels between its convolutions", "O A2", at_least=1)
    dim: Whole = key(256, "channels of the embeddings", "O A2", at_least=1)
    final_relu: Flag = key(True, 'whether the second block ends in a ReLU: "two Conv-BN-ReLU blocks"', "P")

    def check(self) -> None:
        require(self.kernel in (1, 3), "projector.kernel", "1 or 3", self.kernel)
        levels = self.in_index
        require(
            levels is None or (levels != () and levels == tuple(sorted(set(levels) & {0, 1, 2, 3}))),
            "projector.in_index",
            "some of the encoder's levels 0 to 3, ascending: the pull compares what the projector makes of them. "
            "null takes the encoder's usual ones; for a run without a pull set loss_weights.pull to 0",
            levels,
        )


@dataclass(frozen=True)
class DataConfig(Section):
    """Crops, and how they are loaded."""

    section = "data"
    crop_size: Derived[Size] = key(
        None,
        "(height, width) of the crops that the student sees; null is what fits into the images, at most the paper's "
        "512x512, or 1024x1024 with hrda.enabled",
        at_least=32,
    )
    outer_crop: Literal["auto", "true", "false"] = key(
        "auto", "whether crops come out of a larger window; auto: only when the run translates", "O A10"
    )
    outer_crop_size: Derived[Size] = key(
        None,
        "(height, width) of the window in which FDA works; null is what fits into the source images, at most the "
        "paper's 512x1024, twice that with hrda.enabled",
        "O A40",
        at_least=32,
    )
    cat_max_ratio: Number = key(
        0.75, "largest share of a source crop that one class may cover", "D", above=0, at_most=1
    )
    target_labelled_share: Number = key(
        0.5,
        "share of the labelled images of a run that are those of target_labelled, spread evenly over the batches",
        above=0,
        below=1,
    )
    flip: Flag = key(True, "mirror with probability 1/2, source and target on their own", "D")
    num_workers: Derived[Whole] = key(
        None,
        "processes that load ahead; 0 loads in the training process; null is one less than its cores, at most 8, and 0 "
        "for two cores or fewer",
        changes="nothing",
        at_least=0,
        at_most=1024,
    )

    def check(self) -> None:
        if self.crop_size is None:
            return
        require(
            all(side % 32 == 0 for side in self.crop_size),
            "data.crop_size",
            "multiples of 32 (the encoder's coarsest stride)",
            self.crop_size,
        )
        require(
            self.outer_crop_size is None
            or all(outer >= inner for outer, inner in zip(self.outer_crop_size, self.crop_size, strict=True))
            or self.outer_crop == "false",
            "data.outer_crop_size",
            f"at least data.crop_size {self.crop_size}",
            self.outer_crop_size,
        )


@dataclass(frozen=True)
class RareClassSamplingConfig(Section):
    """Source images are drawn by class, rare classes more often."""

    section = "rcs"
    enabled: Flag = key(True, "draw a class first and then an image that shows it; false draws images evenly", "D")
    temperature: Derived[Number] = key(
        None,
        "small draws rare classes nearly always, large draws classes evenly; null is the smallest from DAFormer's 0.01 "
        "on with which the draws spread over the images",
        above=0,
    )
    min_pixels: Derived[Whole | tuple[Whole, ...]] = key(
        None,
        "pixels of a class that an image must show, at the label's own resolution, or a list of one number for each "
        "class; null is DAFormer's share, 0.15 % of an image, and less for a class that most images show less of",
        at_least=0,
    )
    min_crop_ratio: Derived[Number] = key(
        None,
        "a crop must show more than min_pixels times this of the class; ten tries are made; null is a half of "
        "min_pixels after the source's resize",
        at_least=0,
    )


@dataclass(frozen=True)
class UdaConfig(Section):
    """Mean-teacher self-training."""

    section = "uda"
    source_ce_on: Literal["source", "ptarget", "both"] = key(
        "source", 'what L_source sees (Tables 7, 11: "CE on p. target"); both takes turns, update by update', "O A7"
    )
    ema_momentum: Derived[Number] = key(
        None,
        "share of the old teacher that an update keeps; null averages over a tenth of the run, at most the paper's "
        "1,000 updates (0.999)",
        at_least=0,
        at_most=1,
    )
    pseudo_threshold: Number = key(
        0.968, "confidence from which a pseudo-label counts as sure", "P", at_least=0, at_most=1
    )
    pseudo_labels: Literal["hard", "soft"] = key(
        "hard",
        "what is learned of the target: the likeliest class of each pixel, or with soft the probabilities of all "
        "classes, so that thin classes which the teacher is never sure of are not unlearned (arXiv 1503.02531)",
    )
    weight_scope: Literal["batch", "image", "class"] = key(
        "batch",
        "the share of sure pixels weighs pseudo-labels: one share for the batch, or one per image; or class: those of "
        "the surest class_share of every class weigh 1, and so do sure pixels, all others 0",
        "O A6",
    )
    class_share: Number = key(
        0.5,
        "with weight_scope class, share of the pixels of each pseudo-class in a batch that are learned, so that no "
        "class is left out because the teacher is less sure of it (CBST, arXiv 1810.07911)",
        above=0,
        at_most=1,
    )
    target_statistics: Whole = key(
        0,
        "crops of the target, evenly spread, of which the evaluated and saved student has its batch norm statistics "
        "(AdaBN), and the evaluated teacher, too: better on the target, worse on the source; 0 keeps the running ones, "
        "which are of both",
        at_least=0,
    )
    source_phase: Number = key(
        0.0,
        "share of the updates, at the start, that learn from the source's labels alone, without target losses and pull",
        at_least=0,
        below=1,
    )
    ignore_top: Whole = key(
        0, "rows at the top of the target crop whose pseudo-labels are not trusted; Cityscapes: 15", at_least=0
    )
    ignore_bottom: Whole = key(
        0,
        "rows at the bottom of the target crop whose pseudo-labels are not trusted; Cityscapes: 120",
        at_least=0,
    )
    ignore_left: Whole = key(
        0,
        "columns at the left of the resized target image whose pseudo-labels are not trusted",
        at_least=0,
    )
    ignore_right: Whole = key(
        0,
        "columns at the right of the resized target image whose pseudo-labels are not trusted",
        at_least=0,
    )


@dataclass(frozen=True)
class BalanceConfig(Section):
    """For rare classes: weights of labelled pixels, also where these are pasted, and a doubt about pseudo-labels."""

    section = "balance"
    labelled: Literal["none", "inverse_root"] = key(
        "none",
        "weights of labelled pixels: all 1; or by class the inverse square root of its share of all labelled pixels so "
        "far, those of all processes together with pull.sync_stats, scaled to 1 on average",
    )
    cap: Number = key(10.0, "largest weight, after the scaling", at_least=1)
    doubt: Number = key(
        0.0,
        "the losses of target and masked_consistency learn a pseudo-label only if it is still the likeliest class when "
        "the teacher's probabilities are multiplied by the weights of inverse_root (and cap) to this power: where a "
        "rarer class is nearly as likely, nothing is learned, so that large classes do not take its pixels; 0: all are "
        "learned (after arXiv 2007.07314)",
        at_least=0,
        at_most=2,
    )


@dataclass(frozen=True)
class MixConfig(Section):
    """ClassMix: source classes are pasted into target images."""

    section = "mix"
    classes_from: Literal["batch", "image"] = key(
        "batch", "where the pasted classes are drawn: DACS draws per image, DAFormer's release from the batch", "D"
    )
    source: Literal["source", "pseudo_target"] = key("source", "which version of the source is pasted", "O A7")


@dataclass(frozen=True)
class AugmentConfig(Section):
    """Strong augmentation of the mixed image."""

    section = "augment"
    jitter_probability: Number = key(0.8, "of colour jitter", "D", at_least=0, at_most=1)
    jitter_strength: Number = key(
        0.2, "largest relative change of brightness, contrast, saturation, and of the hue", "D", at_least=0, at_most=1
    )
    blur_probability: Number = key(0.5, "of a Gaussian blur", "D", at_least=0, at_most=1)
    source: Literal["none", "photometric"] = key(
        "none", "distortion of the source's colours in L_source under t2sda; the other methods have it always"
    )


@dataclass(frozen=True)
class PatchMaskConfig(Section):
    """MIC: squares of the target image are hidden from the student. Weight: loss_weights.masked_consistency."""

    section = "patch_mask"
    block_size: Derived[Whole] = key(
        None, "side of a square in pixels; null is a sixteenth of the crop: 64 for crops of 1024", "D", at_least=1
    )
    ratio: Number = key(0.7, "share of the squares that is hidden", "D", at_least=0, at_most=1)


@dataclass(frozen=True)
class FdaConfig(Section):
    """Fourier domain adaptation: low frequencies of the amplitude are taken from the target."""

    section = "translate.fda"
    beta: Derived[Number] = key(
        None,
        "half side of the swapped square, as a share of the shorter side of the window; null is 0.01, and more where "
        "that would be less than the 5 frequencies of the paper's window",
        "O A1",
        at_least=0,
        at_most=0.5,
    )
    window: Literal["square", "rect"] = key(
        "square", "the swapped frequencies: as many in both directions, or in proportion to the sides", "O A12"
    )
    clip: Flag = key(False, "clip the result to [0, 1]; FDA's code does not")


@dataclass(frozen=True)
class ColorJitterConfig(Section):
    """Colour jitter instead of a style: "the same with SimCLR"."""

    section = "translate.color_jitter"
    probability: Number = key(0.8, "that an image is changed", "O A13", at_least=0, at_most=1)
    strength: Number = key(1.0, "1 is SimCLR's", "P", at_least=0, at_most=1)


@dataclass(frozen=True)
class GaussianBlurConfig(Section):
    """Blur instead of a style: "the same with SimCLR"."""

    section = "translate.gaussian_blur"
    probability: Number = key(0.5, "that an image is blurred", "O A13", at_least=0, at_most=1)
    sigma: tuple[Number, Number] = key((0.1, 2.0), "lowest and highest deviation, in pixels", "P", above=0)

    def check(self) -> None:
        low, high = self.sigma
        require(low <= high, "translate.gaussian_blur.sigma", "the lower one and then the higher", self.sigma)


STYLES = ("fda", "randomization", "adain", "weather", "cartoon")


@dataclass(frozen=True)
class StyleConfig(Section):
    """Domain generalisation draws one of five styles per image. Those without their files are left out."""

    section = "translate.style"
    styles: tuple[str, ...] = key(STYLES, f"some of {', '.join(STYLES)}", "P")
    images: str = key("", "folder of style images (paintings), for fda and adain")
    adain: str = key("", "folder or Hub repository with vgg_normalised and decoder, .safetensors or .pth")
    randomization: str = key(
        "", "folder or Hub repository with checkpoint_transformer, checkpoint_stylepredictor and checkpoint_embeddings"
    )

    def check(self) -> None:
        known = bool(self.styles) and set(self.styles) <= set(STYLES) and len(set(self.styles)) == len(self.styles)
        require(known, "translate.style.styles", f"some of {', '.join(STYLES)}, each once", self.styles)


@dataclass(frozen=True)
class TrainedConfig(Section):
    """A translator that was trained beforehand: a network, or a folder of the images it made."""

    section = "translate.trained"
    model: str = key(
        "", "folder or Hub repository with config.json and model.safetensors; `t2sda translator` trains it"
    )
    architecture: str = key(
        "t2sda_hf.translate.generator:TranslationGenerator",
        "class of its nn.Module in an installed package, as module:name; another one only as a flag, never in a file",
    )
    folder: str = key("", "folder with one translated image per source image, and manifest.json")


NEEDS_TARGET = ("fda", "trained")  # engines that look, or whose training looked, at target images


@dataclass(frozen=True)
class TranslateConfig(Section):
    """How source images are drawn in the style of the target."""

    section = "translate"
    engine: Literal["fda", "color_jitter", "gaussian_blur", "style", "trained", "none"] = key(
        "fda", "what translates (Table 11); style is for runs without a target", "P"
    )
    reference: Literal["paired", "random"] = key(
        "paired", "whose style is taken: that of the target image of the pair, or of another one", "O A9"
    )
    hrda_scale: Literal["context", "full"] = key(
        "context", "with hrda.enabled: translate after halving, or before", "O A23"
    )
    fda: FdaConfig = FdaConfig()
    color_jitter: ColorJitterConfig = ColorJitterConfig()
    gaussian_blur: GaussianBlurConfig = GaussianBlurConfig()
    style: StyleConfig = StyleConfig()
    trained: TrainedConfig = TrainedConfig()

    def check(self) -> None:
        require(
            self.engine != "trained" or bool(self.trained.model) != bool(self.trained.folder),
            "translate.trained",
            "given with engine trained: either model (a network) or folder (translated images)",
            self.trained,
        )


Side = Literal["source", "ptarget", "target"]


@dataclass(frozen=True)
class PullConfig(Section):
    """The pull loss. The letters are the paper's. Its weight is loss_weights.pull."""

    section = "pull"
    query_domain: Side = key("ptarget", "what is pulled (Table 7); ptarget is the source in target style", "P")
    key_domain: Side = key("source", "to the prototypes of what", "P")
    prototypes: Literal["source", "both"] = key(
        "source", "labelled images whose pixels make prototypes: the source's, or those of target_labelled, too"
    )
    temperature: Number = key(0.2, "τ of the softmax over similarities; small values sharpen", "P", at_least=1e-3)
    num_queries: Whole = key(128, "n, queries per class on average", "P", at_least=1)
    num_negatives: Whole = key(1024, "m, negatives per query", "P", at_least=2)
    unreliable_ratio: Number = key(
        0.5, "α, share of target pixels that count as unreliable, the least sure ones", "P", at_least=0, at_most=1
    )
    objective: Literal["infonce", "mse"] = key("infonce", "contrast with negatives, or distance alone (Table 10)", "P")
    query_sampling: Literal["cbqs", "ceqs", "uniform"] = key(
        "cbqs", "queries per class: by its share, equally many, or pixels at random (Table 8)", "O A17"
    )
    negatives: Literal["denps", "pooled"] = key(
        "denps", "negatives of both domains apart, the target's among unreliable pixels, or of one pool (Table 8)", "P"
    )
    share_negatives: Literal["class", "query"] = key(
        "class", "one draw of negatives for all queries of a class, or one for each query", "O A19"
    )
    reduction: Literal["mean_w", "sum_paper", "mean_paper"] = key(
        "mean_w",
        "mean over the queries of a class and weighted sum over classes; sum_paper is equation 5 as printed, a sum "
        "over queries and a mean over classes; mean_paper a mean over both",
        "O A20",
    )
    label_downscale: Literal["nearest", "ratio"] = key(
        "nearest", "how labels come to the features' size; ratio leaves out cells without a class of 75 %", "O A14"
    )
    ignore_as_negative: Flag = key(False, "whether ignored pixels may be negatives", "O A15")
    class_set: tuple[str, ...] = key((), "the C classes of the benchmark, by name; [] is all of the run", "O A16")
    gamma_scope: Literal["batch", "image"] = key("batch", "region over which α is a quantile", "O A18")
    target_min_conf: Number = key(
        0.0,
        "pseudo-labels that are less sure neither pull nor are pulled to, where the target takes part",
        "O A24",
        at_least=0,
        at_most=1,
    )
    sync_stats: Flag = key(True, "prototypes, class shares and confidences are those of all processes together", "O A8")
    teacher_forward: Literal["separate", "joint"] = key(
        "separate", "whether the teacher sees source and target in two batches or in one", "O A5"
    )
    start_step: Whole = key(0, "updates before the first pull", "O A31", at_least=0)
    augment: Flag = key(False, "colour-augment the pseudo-target image", "O A33")
    bn_track_ptarget: Flag = key(True, "whether pseudo-target images count in the running statistics of a ResNet")
    proto_momentum: Number = key(0.0, "memory of prototypes across steps; 0 is none", "O A34", at_least=0, below=1)
    proto_prenorm: Flag = key(False, "bring keys to unit length before they are averaged", "O A35")


@dataclass(frozen=True)
class DrwConfig(Section):
    """Dynamic re-weighting of classes by the teacher's confidence on the target."""

    section = "drw"
    apply_to: Literal["pull", "target", "none"] = key("pull", "which loss is weighed (Table 9)", "P")
    beta: Number = key(0.5, "β, how strongly unsure classes gain weight (Table 14)", "P", at_least=0)
    absent_conf: Literal["zero", "one", "mean", "ema"] = key(
        "zero", "confidence of a class that no pseudo-label of the batch has", "O A21"
    )
    use_valid_mask: Flag = key(False, "leave out target pixels whose pseudo-labels are never trusted", "O A22")
    normalise_over: Literal["all", "queried"] = key(
        "all", "weights sum to 1 over all classes, or over those with queries", "O A22"
    )


@dataclass(frozen=True)
class FeatureDistanceConfig(Section):
    """Distance to the frozen encoder that the student started from. Its weight is loss_weights.feature_distance."""

    section = "feature_distance"
    classes: tuple[str, ...] = key(
        (), "classes whose pixels count, DAFormer: things, which ImageNet has; [] is every pixel"
    )
    min_ratio: Number = key(
        0.75, "share of its pixels that must be of one class for a cell to count", "D", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class LossWeights(Section):
    """The only place of weights. A weight of 0 costs nothing: its forward passes are not run."""

    section = "loss_weights"
    source: Number = key(1.0, "cross-entropy on the source", "P", at_least=0)
    feature_distance: Number = key(
        0.0, "distance to the pretrained encoder; DAFormer: 0.005, on thing classes of street scenes", at_least=0
    )
    target: Number = key(1.0, "cross-entropy on mixed images with pseudo-labels", "P", at_least=0)
    pull: Number = key(0.1, "λ, the pull loss (Table 12)", "P", at_least=0)
    anchor: Number = key(
        0.0,
        "of source_free: half the squared distance of all weights to those it starts from (L2-SP, arXiv 1802.01483)",
        at_least=0,
    )
    distil: Number = key(
        1.0,
        "of distil: divergence of the student's classes from those of start_model, on source and target",
        at_least=0,
    )
    masked_consistency: Number = key(0.0, "cross-entropy on masked target images; 1 in MIC", "D", at_least=0)


@dataclass(frozen=True)
class OptimConfig(Section):
    """AdamW; the rate is linear warm-up times linear decay."""

    section = "optim"
    lr: Number = key(6e-5, "learning rate of the encoder after the warm-up", "P", above=0)
    head_lr_multiplier: Number = key(10.0, "head and projector learn so many times as fast", "P", above=0)
    weight_decay: Number = key(0.01, "of AdamW, not on norms and biases", "P", at_least=0)
    warmup_steps: Derived[Whole] = key(
        None, "updates in which the rate rises; null is 5 % of train.max_steps, at most the paper's 1,500", at_least=0
    )
    warmup_ratio: Number = key(1e-6, "share of the rate at the first update", "D", at_least=0, at_most=1)
    power: Number = key(1.0, "of the decay; 1 is linear", "P", at_least=0)
    layer_decay: Number = key(
        1.0,
        "the encoder's blocks learn at optim.lr times this to the power of how many lie between them and the head; "
        "1 is the same for all",
        above=0,
        at_most=1,
    )
    max_grad_norm: Number | None = key(
        None, "longer gradients are shortened to this norm; null clips nothing", "D", above=0
    )


@dataclass(frozen=True)
class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), with train.encoder lora. student/ has them merged into its weights."""

    section = "lora"
    rank: Whole = key(16, "r, of the two matrices that are learned beside each layer; 16 in SoMA", at_least=1)
    alpha: Whole = key(16, "what they add counts alpha / rank times", at_least=1)
    dropout: Number = key(0.0, "share of their input that is dropped in training", at_least=0, below=1)
    targets: tuple[str, ...] = key(
        ("all-linear",), "names of the linear layers, [q_proj, v_proj] for example; [all-linear] is all of the encoder"
    )

    def check(self) -> None:
        require(bool(self.targets), "lora.targets", "names of layers, or [all-linear]", self.targets)


@dataclass(frozen=True)
class TrainConfig(Section):
    """The loop: how long, how large, how precise, and what is kept on the way."""

    section = "train"
    max_steps: Whole = key(40_000, "updates", "P", at_least=1, at_most=10**9)
    encoder: Literal["full", "frozen", "lora"] = key(
        "full",
        "what of the pretrained encoder learns: all of it, nothing, or low-rank adapters beside its layers, see lora",
    )
    batch_size: Whole = key(2, "source images and as many target images, per process and micro-batch", "P", at_least=1)
    micro_batches: Whole = key(1, "per update and process; prototypes and class weights stay those of each", at_least=1)
    precision: Literal["tf32", "float32", "bf16"] = key(
        "tf32", "of matrix products and convolutions; weights and losses are float32", "O A4"
    )
    deterministic: Flag = key(
        False, "on a GPU, only algorithms that give the same result every time; slower", changes="nothing"
    )
    compile: Literal["none", "inductor", "cuda_graphs", "eager"] = key(
        "none",
        "backend of torch.compile for encoder, heads and projector; cuda_graphs is inductor whose kernels a GPU "
        "launches all at once; eager only captures graphs",
    )
    overfit_batch: Flag = key(False, "for debugging: every update sees the batch of the first")
    log_every: Whole = key(50, "updates between two lines of losses", changes="nothing", at_least=1)
    evaluate_every: Derived[Whole] = key(
        None,
        "updates between two evaluations; null is a tenth of train.max_steps, at least 100",
        changes="nothing",
        at_least=1,
    )
    save_every: Derived[Whole] = key(
        None,
        "updates between two checkpoints; null is a tenth of train.max_steps, at least 100",
        changes="nothing",
        at_least=1,
    )
    keep_checkpoints: Whole = key(
        2, "the newest so many are kept, older ones are deleted", changes="nothing", at_least=1
    )
    stop_after_falls: Whole = key(
        0,
        "stop when the proxy of select has fallen in so many evaluations in a row, as it does when predictions "
        "collapse to a few classes; 0 never stops",
        at_least=0,
    )
    non_finite: Literal["stop", "skip"] = key(
        "stop", "what to do with an update whose losses or gradients are not finite", changes="nothing"
    )
    max_skipped_steps: Whole = key(
        10, "of the whole run with non_finite skip; one more stops it", changes="nothing", at_least=0
    )
    timeout_seconds: Number = key(
        60.0,
        "how long a process waits for the others; one that writes a checkpoint may take longer",
        changes="nothing",
        above=0,
        at_most=864_000,
    )
    num_threads: Whole | None = key(
        None, "CPU threads of torch; null leaves torch's choice", changes="nothing", at_least=1, at_most=1024
    )
    log_with: tuple[str, ...] = key(("tensorboard",), "trackers of accelerate; [] is none", changes="nothing")


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """How a model is scored on the test domain."""

    section = "evaluation"
    mode: Literal["whole", "slide"] = key("whole", "whole images, or windows that overlap", "D", changes="scoring")
    window: Size | None = key(None, "(height, width) of a window, for mode slide", changes="scoring", at_least=1)
    stride: Size | None = key(
        None, "(height, width) between windows, for mode slide; at most the window", changes="scoring", at_least=1
    )
    limit: Whole | None = key(None, "only the first so many images; null is all", changes="scoring", at_least=1)
    source_images: Whole = key(
        32,
        "score so many images of the source, too, evenly spread; they are seen in training",
        changes="scoring",
        at_least=0,
    )

    def check(self) -> None:
        if self.mode == "slide" and (self.window is None or self.stride is None):
            raise ValueError("evaluation.mode slide needs evaluation.window and evaluation.stride (height, width).")
        require(
            not self.window or not self.stride or all(s <= w for s, w in zip(self.stride, self.window, strict=True)),
            "evaluation.stride",
            f"at most evaluation.window {self.window}, to miss no pixel",
            self.stride,
        )

    @property
    def windows(self) -> dict[str, Any]:
        """The arguments mode, window and stride of `evaluation.inference.predict`."""
        return {"mode": self.mode, "window": self.window, "stride": self.stride}


@dataclass(frozen=True)
class PushConfig(Section):
    """Publish the student when the run is done. There is no key for the token: `hf auth login`, or HF_TOKEN."""

    section = "push_to_hub"
    repo_id: str = key("", 'user/name; "" publishes nothing', changes="nothing")
    private: Flag = key(False, "if the repository is made now", changes="nothing")
    create_pr: Flag = key(False, "offer a pull request instead of writing to the main branch", changes="nothing")
    license: str = key(
        "",
        'of the weights, an id of the Hub; "" is worked out where nothing but the toy streets was used',
        changes="nothing",
    )
    terms: dict[str, str] = key({}, "{source, target, test: under which terms its images come}", changes="nothing")
    source_only: str = key("", "<run>/source_only to compare with, if this run has no baseline", changes="nothing")
    start: str = key("", "what the weights are, if model.pretrained is a folder or file of yours", changes="nothing")
    note: str = key("", "a sentence for readers of the scores: how the settings were chosen", changes="nothing")
    picture: Literal["images", "predictions"] = key(
        "images", "what the card shows; the images of some data sets must not be passed on", changes="nothing"
    )

    def check(self) -> None:
        unknown = sorted(set(self.terms) - {"source", "target", "target_labelled", "test"})
        rule = "a mapping with the keys source, target, target_labelled and test"
        require(not unknown, "push_to_hub.terms", rule, unknown)


SUPERVISED = ("source_only", "target_only")  # methods that learn from labels alone
# Keys of a domain: what its labels mean, and where they are.
LABEL_MEANING = ("label_space", "class_names", "label_ids", "label_colors", "label_map", "ignore_id")
LABEL_PLACES = ("label_path", "label_suffix", "label_column")


@dataclass(frozen=True)
class RunConfig(Section):
    """One run: `method` learns `classes` from `source` and `target`, and is measured on `test`."""

    method: Literal["t2sda", "source_only", "target_only", "generalization", "source_free", "distil"] = key(
        "t2sda",
        "the objective; DACS, DAFormer, HRDA and MIC are t2sda with other weights; source_only is the lower bound, and "
        "target_only, which learns the labels of the target, the upper one; source_free adapts a finished model "
        "(start_model) to the target without any source; distil teaches a smaller one what it says of both",
    )
    start_model: str = key(
        "",
        "of source_free, t2sda and distil: folder or Hub id of a finished T2S-DA model or SegFormer. source_free and "
        "t2sda start from it, with its sizes, so that model and projector say nothing; distil learns from it",
        changes="placement",
    )
    baseline: Literal["none", "source_only"] = key(
        "none", "train this first from the same initial weights, and compare", changes="nothing"
    )
    seed: Whole = key(0, "of everything that is drawn", at_least=0)
    output_dir: str = key(
        "outputs/run", "folder that the run writes; an existing one is never overwritten", changes="nothing"
    )
    resume: str | None = key(
        None,
        "auto: go on with the run in output_dir, if there is one; or the path of a checkpoint",
        changes="nothing",
    )
    select: Literal[
        "last",
        "proxy:confidence",
        "proxy:coverage",
        "proxy:agreement",
        "proxy:stability",
        "proxy:prior",
        "proxy:source",
        "proxy:combined",
    ] = key(
        "last",
        "which weights are offered beside the last: those of the evaluation with the best proxy, which needs no label",
        changes="scoring",
    )
    allow_changes: tuple[str, ...] = key(
        (), "keys that may differ from the resumed run, though they change the result", changes="nothing"
    )
    classes: tuple[str, ...] = key(CITYSCAPES_CLASSES, "names of the classes that are learned, position = id", "O A38")
    source: DomainConfigs = DomainConfig()
    target: DomainConfigs = DomainConfig()
    target_labelled: DomainConfig = DomainConfig()  # a few labelled images of the target, learned beside the source
    target_labels: Whole | str | None = key(
        None,
        "how many images of target_labelled are learned, chosen by the seed so that they show as many classes as they "
        "can: a number, or a share like 1/16; null is all. Without target_labelled.path the labels of target are read",
    )
    test: DomainConfigs = DomainConfig(split="validation")  # labelled, read by evaluation only
    model: ModelConfig = ModelConfig()
    hrda: HrdaConfig = HrdaConfig()
    projector: ProjectorConfig = ProjectorConfig()
    data: DataConfig = DataConfig()
    rcs: RareClassSamplingConfig = RareClassSamplingConfig()
    uda: UdaConfig = UdaConfig()
    balance: BalanceConfig = BalanceConfig()
    mix: MixConfig = MixConfig()
    augment: AugmentConfig = AugmentConfig()
    patch_mask: PatchMaskConfig = PatchMaskConfig()
    translate: TranslateConfig = TranslateConfig()
    pull: PullConfig = PullConfig()
    drw: DrwConfig = DrwConfig()
    feature_distance: FeatureDistanceConfig = FeatureDistanceConfig()
    loss_weights: LossWeights = LossWeights()
    optim: OptimConfig = OptimConfig()
    lora: LoraConfig = LoraConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    push_to_hub: PushConfig = PushConfig()

    def check(self) -> None:
        require(len(self.classes) >= 2, "classes", "at least 2 names", self.classes)
        require(len(set(self.classes)) == len(self.classes), "classes", "without repetition", self.classes)
        require(
            len(self.classes) <= IGNORE_INDEX,
            "classes",
            f"at most {IGNORE_INDEX} names: label maps of a run have 8 bits, and {IGNORE_INDEX} is the ignored id",
            len(self.classes),
        )
        odd = [name for name in self.classes if not name.strip() or not name.isprintable()]
        require(not odd, "classes", "names of printable letters, without line breaks", odd)
        require("mIoU" not in self.classes, "classes", "other names than mIoU, which tables call the mean", "mIoU")
        self._check_lists()
        unknown = [name for name in self.pull.class_set if name not in self.classes]
        require(not unknown, "pull.class_set", f"names of classes {self.classes}", unknown)
        floors = self.rcs.min_pixels
        require(
            not isinstance(floors, tuple) or len(floors) == len(self.classes),
            "rcs.min_pixels",
            f"one number, or one for each of the {len(self.classes)} classes",
            floors,
        )
        rows = self.uda.ignore_top + self.uda.ignore_bottom
        require(
            self.data.crop_size is None or rows < self.data.crop_size[0],
            "uda.ignore_top + uda.ignore_bottom",
            f"less than the crop's {self.data.crop_size and self.data.crop_size[0]} rows, or no target pixel is left "
            "(a recipe for Cityscapes sets them, for the bonnet of its car: for other images set both to 0)",
            rows,
        )
        require(
            (self.model.pretrained is not None and not self.model.random_start)
            or not self.loss_weights.feature_distance,
            "loss_weights.feature_distance",
            "0 when model.pretrained is null or model.random_start true: the encoder to stay near would be random",
            self.loss_weights.feature_distance,
        )
        require(
            self.train.encoder == "full" or (self.model.pretrained is not None and not self.model.random_start),
            "train.encoder",
            "full with a random start (model.pretrained null or model.random_start true), of which nothing is known",
            self.train.encoder,
        )
        require(
            self.train.encoder != "frozen" or not self.loss_weights.feature_distance,
            "loss_weights.feature_distance",
            "0 with train.encoder frozen: an encoder that does not move has no distance to itself",
            self.loss_weights.feature_distance,
        )
        require(
            not (self.model.activation_checkpointing and self.model.size.startswith("resnet")),
            "model.activation_checkpointing",
            "false for a ResNet: run twice, its batch norm would count every batch twice",
            self.model.activation_checkpointing,
        )
        require(
            self.method != "target_only" or self.baseline == "none",
            "baseline",
            "none with method target_only, which is a bound to compare with itself. Train the baseline in another run",
            self.baseline,
        )
        self._check_weights()
        self._check_target_labels()
        if self.hrda.enabled:
            self._check_hrda()
        require(
            not self.train.stop_after_falls or self.select != "last",
            "train.stop_after_falls",
            "0 with select last. Set select to the proxy that is watched, such as proxy:combined",
            self.train.stop_after_falls,
        )
        if self.method == "source_free":
            self._check_source_free()
        require(
            not self.start_model or self.method in ("t2sda", "source_free", "distil", "source_only"),
            "start_model",
            f"empty with method {self.method}: only t2sda, source_free and distil begin with a finished model",
            self.start_model,
        )
        require(
            self.baseline == "none" or not self.start_model or self.method == "distil",
            "baseline",
            f"none with method {self.method} and a start_model, which is scored itself at the end",
            self.baseline,
        )
        require(
            not self.loss_weights.anchor or self.method == "source_free",
            "loss_weights.anchor",
            f"0 with method {self.method}",
            self.loss_weights.anchor,
        )
        if self.method == "distil":
            require(
                bool(self.start_model) and not self.hrda.enabled,
                "start_model and hrda.enabled",
                "a finished model and false with method distil, whose student is a plain one",
                (self.start_model, self.hrda.enabled),
            )
        if self.method == "generalization":
            self._check_generalization()

    def _check_lists(self) -> None:
        """Every domain of a list is another one, and lies somewhere."""
        for role in ("source", "target", "test"):
            listed = several(getattr(self, role))
            for place, domain in enumerate(listed, 1):
                named = f"{role} {place} of {len(listed)}"
                require(len(listed) == 1 or bool(domain.path), f"{named}", "a domain with a path", domain.path)
                first = [replace(other, share=domain.share) for other in listed].index(domain) + 1
                if first < place:
                    raise ValueError(
                        f"{named} ({domain.path}) is {role} {first} again. Give it once; to have it more often, with a "
                        "larger share."
                    )
            alone = len(listed) == 1
            require(not alone or listed[0].share == 1, f"{role}.share", "left out for a single domain", listed[0].share)
        for role, domain in [("target_labelled", self.target_labelled), *(("test", test) for test in self.tests)]:
            require(domain.share == 1, f"{role}.share", "left out: it is for sources and targets", domain.share)

    def _check_target_labels(self) -> None:
        asked = self.target_labels
        share = re.fullmatch(r"1/([1-9]\d*)", asked) if isinstance(asked, str) else None
        require(
            asked is None or share is not None or (isinstance(asked, int) and asked >= 0),
            "target_labels",
            "a number of images, a share like 1/16, or null for all",
            asked,
        )
        require(
            asked in (None, 0)
            or bool(self.target_labelled.path or self.targets[0].path)
            or self.method == "generalization",
            "target_labels",
            "null or 0 without target_labelled.path and target.path: there is nothing that it could be a part of",
            asked,
        )

    def _check_weights(self) -> None:
        """Every run learns something, and what is switched on has something to act on."""
        weights = self.loss_weights
        supervised = dict.fromkeys(SUPERVISED, ("source",))
        used: dict[str, tuple[str, ...]] = supervised | {
            "generalization": ("source", "feature_distance", "pull"),
            "source_free": ("target", "masked_consistency", "pull"),
            "distil": ("distil", "source", "pull"),
        }
        names = used.get(self.method, tuple(name for name in vars(weights) if name not in ("anchor", "distil")))
        require(
            any(getattr(weights, name) > 0 for name in names),
            " or ".join(f"loss_weights.{name}" for name in names),
            f"positive with method {self.method}, or nothing is learned",
            tuple(getattr(weights, name) for name in names),
        )
        require(
            self.drw.apply_to != "target" or weights.target > 0,
            "drw.apply_to",
            "pull or none when loss_weights.target is 0: there is no target loss to weigh. Or give that a weight",
            self.drw.apply_to,
        )
        require(
            not self.balance.doubt or self.method == "t2sda" or self.supervised,
            "balance.doubt",
            f"0 with method {self.method}, which has no labelled source to know rare classes by, or learns no "
            "pseudo-labels",
            self.balance.doubt,
        )
        learned = weights.target > 0 or weights.masked_consistency > 0 or self.supervised
        unused = "when loss_weights.target and loss_weights.masked_consistency are 0: no pseudo-labels are learned"
        require(not self.balance.doubt or learned, "balance.doubt", f"0 {unused}", self.balance.doubt)
        hard = self.uda.pseudo_labels == "hard"
        require(hard or learned, "uda.pseudo_labels", f"hard {unused}", self.uda.pseudo_labels)
        require(
            self.pull.start_step < self.train.max_steps or not weights.pull,
            "pull.start_step",
            f"below train.max_steps {self.train.max_steps}. For a run without a pull set loss_weights.pull to 0",
            self.pull.start_step,
        )
        require(
            not self.uda.source_phase or weights.source > 0 or self.supervised,
            "uda.source_phase",
            "0 when loss_weights.source is 0: nothing would be learned in it",
            self.uda.source_phase,
        )
        require(
            not self.self_trains
            or not self.uda.target_statistics
            or not any(target.streamed for target in self.targets),
            "uda.target_statistics",
            "0 with a target that is streamed without num_images: always the same crops are needed. Give num_images",
            self.uda.target_statistics,
        )
        for role in ("test", "target_labelled"):
            require(
                not any(domain.streamed for domain in several(getattr(self, role))),
                f"{role}.streaming",
                "false, or num_images be given: all of its images are read before the first step",
                True,
            )

    def _check_hrda(self) -> None:
        require(
            not self.uda.target_statistics or self.hrda.crops_at_once is None,
            "uda.target_statistics",
            "0 with hrda.crops_at_once, which must not change what is saved",
            self.uda.target_statistics,
        )
        crop, detail, grid = self.data.crop_size, self.hrda.crop_size, 2 * self.model.logits_stride
        require(
            crop is None or all(side % 64 == 0 for side in crop),
            "data.crop_size",
            "multiples of 64 with hrda.enabled (the encoder's coarsest stride, at half size)",
            crop,
        )
        require(
            detail is None or all(side % grid == 0 for side in detail),
            "hrda.crop_size",
            f"multiples of {grid}, twice the stride of the logits, so that the detail lies on the grid of the context",
            detail,
        )
        require(
            crop is None or detail is None or all(inner <= outer for inner, outer in zip(detail, crop, strict=True)),
            "hrda.crop_size",
            f"at most data.crop_size {crop}, of which it is a part",
            detail,
        )
        if self.translate.hrda_scale == "full":
            return
        require(
            not self.translates or all(side % 2 == 0 for side in self.data.outer_crop_size or ()),
            "data.outer_crop_size",
            "even with hrda.enabled: it is translated at half size",
            self.data.outer_crop_size,
        )
        for name, given in (("mix.source", self.mix.source), ("uda.source_ce_on", self.uda.source_ce_on)):
            require(
                given == "source",
                name,
                "'source' with hrda.enabled: images are translated at half size, and mixed and learned from at full "
                "size. Or set translate.hrda_scale to full",
                given,
            )

    def _check_source_free(self) -> None:
        require(
            not self.sources[0].path and not self.target_labelled.path and self.target_labels in (None, 0),
            "source.path, target_labelled.path and target_labels",
            "empty with method source_free: it learns without labels. Set method t2sda to use them",
            (self.sources[0].path, self.target_labelled.path, self.target_labels),
        )
        require(
            bool(self.start_model),
            "start_model",
            "the folder or Hub id of a finished model with method source_free: outputs/demo/source_only/student, say",
            self.start_model,
        )
        require(
            self.baseline == "none",
            "baseline",
            "none with method source_free, which has no source. What it starts from is scored by `t2sda evaluate`",
            self.baseline,
        )
        require(
            not self.uda.source_phase and not self.loss_weights.feature_distance,
            "uda.source_phase and loss_weights.feature_distance",
            "0 with method source_free. loss_weights.anchor keeps it near the weights that it starts from",
            (self.uda.source_phase, self.loss_weights.feature_distance),
        )
        require(
            not self.loss_weights.target or self.train.batch_size > 1,
            "train.batch_size",
            "at least 2 with method source_free: classes of one image of a batch are pasted into another",
            self.train.batch_size,
        )
        if self.loss_weights.pull:
            pulled = (self.pull.query_domain, self.pull.key_domain)
            require(
                pulled == ("target", "source") and not self.pull.proto_momentum,
                "pull.query_domain, pull.key_domain and pull.proto_momentum",
                "target, source and 0 with method source_free: the target is pulled to the classifier's weights",
                (*pulled, self.pull.proto_momentum),
            )

    def _check_generalization(self) -> None:
        require(
            not self.targets[0].path,
            "target.path",
            "empty with method generalization: it learns without any target. Set method t2sda to adapt to one",
            self.targets[0].path,
        )
        require(
            not self.target_labelled.path and self.target_labels in (None, 0),
            "target_labelled.path and target_labels",
            "empty with method generalization: it learns without any target",
            (self.target_labelled.path, self.target_labels),
        )
        require(
            self.translate.engine not in NEEDS_TARGET,
            "translate.engine",
            f"none of {', '.join(NEEDS_TARGET)} with method generalization: they know the target. Take style",
            self.translate.engine,
        )
        require(
            self.drw.apply_to == "none",
            "drw.apply_to",
            "none with method generalization: there is no confidence on a target to weigh classes by",
            self.drw.apply_to,
        )
        require(
            "target" not in (self.pull.query_domain, self.pull.key_domain),
            "pull.query_domain and pull.key_domain",
            "source or ptarget with method generalization",
            (self.pull.query_domain, self.pull.key_domain),
        )

    @property
    def supervised(self) -> bool:
        """Whether labels alone teach: no teacher, no translation, no image without labels."""
        return self.method in SUPERVISED

    @property
    def labels_from(self) -> str:
        """The domain whose labels are learned; of source_free the one whose images are."""
        return "target" if self.method in ("target_only", "source_free") else "source"

    @property
    def self_trains(self) -> bool:
        """Whether a teacher labels images of a target."""
        return self.method in ("t2sda", "source_free", "distil")

    @property
    def sources(self) -> tuple[DomainConfig, ...]:
        return several(self.source)

    @property
    def targets(self) -> tuple[DomainConfig, ...]:
        return several(self.target)

    @property
    def tests(self) -> tuple[DomainConfig, ...]:
        return several(self.test)

    @property
    def from_finished(self) -> bool:
        """Whether the student is start_model at first, with its sizes."""
        return self.method == "source_free" or (self.method == "t2sda" and bool(self.start_model))

    @property
    def labelled(self) -> DomainConfigs:
        """Those of `labels_from`, with labels."""
        return self.source if self.labels_from == "source" else self.target_with_labels

    @property
    def labelled_target(self) -> DomainConfig | None:
        """Of the images in `target_labels` of this domain the labels are learned beside the source's; None: of none."""
        if self.target_labels == 0 or self.method not in ("t2sda", "source_only", "distil"):
            return None
        if self.target_labelled.path:
            return self.target_labelled
        return None if self.target_labels is None else only(self.target_with_labels, "target_labels takes one target")

    @property
    def target_with_labels(self) -> DomainConfigs:
        """The target; one that says nothing of its labels has those of the test, if both lie in one place."""
        found = tuple(self._with_labels(target) for target in self.targets)
        return found if isinstance(self.target, tuple) else found[0]

    def _with_labels(self, target: DomainConfig) -> DomainConfig:
        usual, beside = DomainConfig(), [test for test in self.tests if test.path == target.path]
        test = beside[0] if beside else self.tests[0]
        if not beside and not (target.layout and target.layout == test.layout):
            return target
        found = [name for name in LABEL_PLACES if beside and getattr(target, name) == getattr(usual, name)]
        if all(getattr(target, name) == getattr(usual, name) for name in LABEL_MEANING):
            found += LABEL_MEANING
        return replace(target, **{name: getattr(test, name) for name in found})

    @property
    def adapts_from(self) -> int:
        """The first update that does not learn from the source alone, from 0."""
        return 0 if self.supervised else round(self.uda.source_phase * self.train.max_steps)

    @property
    def full_from(self) -> int:
        """The first update with all losses, from 0."""
        return max(self.adapts_from, self.pull.start_step if self.loss_weights.pull and not self.supervised else 0)

    @property
    def translates(self) -> bool:
        """Whether the objective needs pseudo-target images."""
        if self.supervised or self.translate.engine == "none" or self.method == "source_free":
            return False
        pulls = self.loss_weights.pull > 0 and "ptarget" in (self.pull.query_domain, self.pull.key_domain)
        if self.method in ("generalization", "distil"):
            return pulls
        return pulls or self.mix.source == "pseudo_target" or self.uda.source_ce_on != "source"

    @property
    def uses_outer_crop(self) -> bool:
        translates_windows = self.translates and self.method in ("t2sda", "distil")
        return translates_windows if self.data.outer_crop == "auto" else self.data.outer_crop == "true"


@cache
def keys() -> dict[str, Key]:
    """Every key of a run by its dotted name. Those of a list of domains have the names of a single one."""
    of_test = (
        replace(found, changes="nothing" if found.name == "test.share" else "scoring")
        if found.name.startswith("test.")
        else found
        for found in walk(RunConfig())
    )
    return {found.name: found for found in of_test}


def without_place(dotted: str) -> str:
    """A key of `flatten` by its name in `keys`: of source.2.path, the second of a list, source.path."""
    return re.sub(r"^(source|target|test)\.\d+\.", r"\1.", dotted)


def changes(dotted: str) -> Changes:
    """What a key of `flatten` changes: also one below a mapping (source.label_map.wall), or one that is gone."""
    dotted = without_place(dotted)
    while dotted not in keys() and "." in dotted:
        dotted = dotted.rpartition(".")[0]
    return keys()[dotted].changes if dotted in keys() else "learning"
