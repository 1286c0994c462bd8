"""What a config leaves null, worked out from the images and the length of the run, and said in words.

A value that suits one data set ruins another: DAFormer's temperature of 0.01 draws three images of a hundred where
classes are few, and a crop of 512 pads a picture of 320x240. So the defaults of such keys are null, and one function
puts numbers in their place, before anything else reads the config.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import DomainConfig, DomainConfigs, RunConfig, role_of, several, shares_of
from ..data.domains import ImageStream
from ..data.rare_class_sampling import RareClasses, joint_rare_classes, joint_shares_of_pixels, shares_of_pixels
from ..data.transforms import Size, resized_size, sized
from ..translate.fda import beta_for
from .optim import peak_factor

# Keys that may be null until `derive` has seen the data.
DERIVED = (
    "data.crop_size",
    "data.outer_crop_size",
    "hrda.crop_size",
    "rcs.temperature",
    "rcs.min_pixels",
    "rcs.min_crop_ratio",
    "uda.ema_momentum",
    "patch_mask.block_size",
    "translate.fda.beta",
    "optim.warmup_steps",
    "train.evaluate_every",
    "train.save_every",
    "data.num_workers",
)
_TEMPERATURES = [float(f"{temperature:.2g}") for temperature in np.geomspace(0.01, 10, 61)]  # 0.01 is DAFormer's
_SHARE_OF_IMAGE = 0.0015  # 3,000 pixels of GTA5's 1914x1052, the floor of DAFormer
_SMALL = 10  # per cent of the images that may be smaller than a derived crop, in either side
_MOST_WORKERS = 8  # they read 18 batches of the paper a second from the raw files (444 CPU-ms each)
_REACHED = 0.5  # share of its base that the learning rate must reach


@dataclass(frozen=True)
class Facts:
    """What is known of the images of a run.

    Attributes:
        counts: (images, K) pixels per class of the domain whose labels are learned, at the labels' own resolution.
        source_sizes: (images, 2) height and width of its files.
        target_sizes: the same of the target, in its own number of images; None without a target.
        labelled_target: (images, K) and (images, 2), counts and sizes of the target images whose labels are learned
            beside the source's; None without any.
        source_lengths, target_lengths: of several domains, whose images are counted through above, how many each has;
            () of one.
    """

    counts: np.ndarray
    source_sizes: np.ndarray
    target_sizes: np.ndarray | None
    labelled_target: tuple[np.ndarray, np.ndarray] | None = None
    source_lengths: tuple[int, ...] = ()
    target_lengths: tuple[int, ...] = ()

    @property
    def counts_of_each(self) -> list[np.ndarray]:
        """`counts` of each domain."""
        return _split(self.counts, self.source_lengths)

    @classmethod
    def unread(cls, cfg: RunConfig) -> "Facts":
        """For a command that reads no data: one image per domain, as large as those of Cityscapes, or as a crop."""
        given = [size for size in (cfg.data.crop_size, cfg.data.outer_crop_size) if size is not None]
        size = np.array([(1024, 2048), *given]).max(axis=0, keepdims=True)
        of_source, of_target = (
            np.repeat(size, len(several(domains)), axis=0) for domains in (cfg.labelled, cfg.target)
        )
        counts = np.zeros((len(of_source), len(cfg.classes)), np.int64)
        return cls(counts, of_source, of_target, None, (1,) * len(of_source), (1,) * len(of_target))


@dataclass(frozen=True)
class Derived:
    """A config without nulls in `DERIVED`, and what a user must know of it.

    Attributes:
        cfg: the config.
        values: key -> value, of those that were null.
        said: sentences about the crops, the schedule and what is drawn.
        warnings: sentences about values that spoil the run, whoever gave them.
    """

    cfg: RunConfig
    values: dict[str, Any]
    said: list[str]
    warnings: list[str]


def derive(
    cfg: RunConfig, facts: Facts, num_processes: int = 1, kept: Mapping[str, Any] | None = None, cores: int = 1
) -> Derived:
    """Put values in the place of nulls. A function of its arguments alone, so equal on every process.

    Args:
        cfg: as it was given.
        facts: of the domains that were checked.
        num_processes: that train.
        kept: dotted keys of the run that goes on: what it derived at its start stays, whatever would come out now,
            unless it depends on the machine.
        cores: of the machine, for each process.

    Raises:
        ValueError: if values contradict each other now that all are known, or a crop is more than twice as large as
            the images in one side.
    """
    kept = kept or {}
    values: dict[str, Any] = {}

    def put(key: str, value: Any) -> None:
        nonlocal cfg
        if _get(cfg, key) is None:
            was = kept.get(key)
            values[key] = value if was is None else tuple(was) if isinstance(was, list) else was
            cfg = _with(cfg, {key: values[key]})

    domains = _working_sizes(cfg.labels_from, cfg.labelled, facts.source_sizes, facts.source_lengths)
    source = np.concatenate(list(domains.values()))
    if facts.target_sizes is not None and cfg.method not in ("generalization", "target_only"):
        domains |= _working_sizes("target", cfg.target, facts.target_sizes, facts.target_lengths)
    if facts.labelled_target is not None and cfg.labelled_target is not None:
        domains |= _working_sizes("target_labelled", cfg.labelled_target, facts.labelled_target[1])
    crop, outer = _crops(cfg, domains)
    put("data.crop_size", crop)
    put("data.outer_crop_size", tuple(max(pair) for pair in zip(outer, cfg.data.crop_size, strict=True)))
    grid = max(2 * cfg.model.logits_stride, 32)
    put("hrda.crop_size", tuple(max(side // 2 // grid * grid, grid) for side in cfg.data.crop_size))
    put("patch_mask.block_size", max(min(cfg.data.crop_size) // 16, 4))
    put("translate.fda.beta", beta_for(_fda_side(cfg)))
    updates = cfg.train.max_steps
    put("optim.warmup_steps", min(updates // 20, 1500))
    put("uda.ema_momentum", round(1 - 1 / min(max(updates // 10, 10), 1000), 4))
    put("train.evaluate_every", max(updates // 10, 100))
    put("train.save_every", max(updates // 10, 100))
    # Counts may be of larger files than those that are read: those of a prepared domain are.
    pixels = float(np.median(np.maximum(facts.source_sizes.prod(axis=1), facts.counts.sum(axis=1))))
    put("rcs.min_pixels", _floors(facts.counts, round(_SHARE_OF_IMAGE * pixels)))
    put("rcs.min_crop_ratio", float(f"{0.5 * min(np.median(source.prod(axis=1)) / pixels, 1):.3g}"))
    put("rcs.temperature", _temperature(facts.counts_of_each, shares_of(cfg.labelled), cfg.rcs.min_pixels))
    said, warnings = [_said_of_crops(cfg, domains), _said_of_schedule(cfg)], _warnings(cfg, domains, kept, values)
    if cfg.data.num_workers is None:
        workers = loading_processes(cores)
        if cfg.targets[0].streamed:  # a number that divides its lanes: no two of them open the same row group
            workers = max(number for number in (0, 1, 2, ImageStream.LANES) if number <= workers)
        values["data.num_workers"] = workers
        cfg = _with(cfg, {"data.num_workers": workers})
        said.append(f"{workers} processes load data ahead, of {cores} cores (data.num_workers)")
    said += [
        _said_of_shares(cfg, facts, role, listed)
        for role, listed in {cfg.labels_from: cfg.labelled, "target": cfg.target}.items()
        if isinstance(listed, tuple) and role in map(role_of, domains)
    ]
    if facts.labelled_target is not None:
        said.append(_said_of_target_labels(cfg, facts.labelled_target[0]))
    if cfg.rcs.enabled and facts.counts.any():
        derived = {"rcs.temperature", "rcs.min_pixels"} <= values.keys()
        text, spoils = _said_of_draws(cfg, facts, num_processes, derived)
        (warnings if spoils else said).append(text)
    if cfg.method == "target_only" and cfg.labelled != cfg.target:
        said.append("target does not say how its labels are read, so they are read as those of test, of the same place")
    return Derived(cfg, values, said, warnings)


def joint_frequencies(cfg: RunConfig, facts: Facts) -> np.ndarray | None:
    """(K,) shares of classes among labelled pixels as a run draws them: of the sources, and of labelled target images.

    None for a single source without such images.
    """
    if facts.labelled_target is None and not isinstance(cfg.labelled, tuple):
        return None
    of_source = joint_shares_of_pixels(facts.counts_of_each, shares_of(cfg.labelled))
    if facts.labelled_target is None:
        return of_source
    share = cfg.data.target_labelled_share
    return (1 - share) * of_source + share * shares_of_pixels(facts.labelled_target[0])


def source_rare_classes(cfg: RunConfig, facts: Facts) -> RareClasses:
    """What images are drawn by of the domains whose labels are learned."""
    how = cfg.rcs.temperature, cfg.rcs.min_pixels, joint_frequencies(cfg, facts)
    return joint_rare_classes(facts.counts_of_each, shares_of(cfg.labelled), *how)


def even_draws(lengths: Sequence[int], shares: Sequence[float]) -> np.ndarray:
    """(images,) probability of each image in one draw that is even in each domain."""
    return np.concatenate([np.full(number, share / number) for number, share in zip(lengths, shares, strict=True)])


def draw_probabilities(rare: RareClasses, num_images: int) -> np.ndarray:
    """(images,) probability of each image in one draw of rare class sampling: Σ_c P(c) / |images of c|."""
    shares = np.zeros(num_images)
    for probability, images in zip(rare.probabilities, rare.images, strict=True):
        if len(images):
            shares[images] += probability / len(images)
    return shares


def expected_distinct(probabilities: np.ndarray, draws: int) -> float:
    """How many different images come up in so many independent draws: Σ 1 - (1 - p_i)^draws."""
    return float((1 - (1 - probabilities) ** draws).sum())


def rate_is_too_low(cfg: RunConfig) -> str:
    """A sentence if the learning rate stays below half of its base; "" if it does not."""
    peak = peak_factor(cfg.optim, cfg.train.max_steps)
    if peak >= _REACHED:
        return ""
    return (
        f"the learning rate never reaches its base: at most {peak:.1%} of optim.lr, because optim.warmup_steps is "
        f"{cfg.optim.warmup_steps:,} and train.max_steps {cfg.train.max_steps:,}. Set the warm-up to null for 5 %"
    )


def _get(cfg: RunConfig, key: str) -> Any:
    found: Any = cfg
    for part in key.split("."):
        found = getattr(found, part)
    return found


def _with(node: Any, values: Mapping[str, Any]) -> Any:
    """The config with dotted keys replaced."""
    for key, value in values.items():
        name, _, rest = key.partition(".")
        node = replace(node, **{name: _with(getattr(node, name), {rest: value}) if rest else value})
    return node


def _split(rows: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    return np.split(rows, np.cumsum(lengths)[:-1]) if lengths else [rows]


def _working_sizes(
    role: str, listed: DomainConfigs, sizes: np.ndarray, lengths: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """By role, or "role place" of several domains, (images, 2) after crop box and resize."""
    configs = several(listed)
    titles = [role] if len(configs) == 1 else [f"{role} {place}" for place in range(1, len(configs) + 1)]
    parts = zip(titles, configs, _split(sizes, lengths), strict=True)
    return {title: _working_sizes_of(config, part) for title, config, part in parts}


def _working_sizes_of(config: DomainConfig, sizes: np.ndarray) -> np.ndarray:
    if config.crop_box is not None:
        sizes = np.broadcast_to(np.array(config.crop_box[2:]), sizes.shape)
    if config.resize is None:
        return sizes
    different, position = np.unique(sizes, axis=0, return_inverse=True)
    resized = [resized_size((int(h), int(w)), config.resize, config.resize_mode) for h, w in different]
    return np.array(resized)[position.reshape(-1)]


def _usual(sizes: np.ndarray) -> tuple[int, int]:
    """(height, width) that nine of ten images have at least."""
    height, width = np.percentile(sizes, _SMALL, axis=0, method="lower")
    return int(height), int(width)


def _crops(cfg: RunConfig, domains: Mapping[str, np.ndarray]) -> tuple[Size, Size]:
    """Crop and outer window that fit into the images, at most those of the paper, or of HRDA."""
    scale, step = (2, 64) if cfg.hrda.enabled else (1, 32)
    usual = {role: _usual(sizes) for role, sizes in domains.items()}
    room = [min(size[side] for size in usual.values()) for side in (0, 1)]
    if cfg.data.outer_crop_size is not None and cfg.data.outer_crop != "false":
        room = [min(pair) for pair in zip(room, cfg.data.outer_crop_size, strict=True)]
    crop = tuple(max(min(512 * scale, side) // step * step, step) for side in room)
    learned = [size for title, size in usual.items() if role_of(title) == cfg.labels_from]
    labelled = [min(size[side] for size in learned) for side in (0, 1)]
    outer = tuple(min(most * scale, side) // 2 * 2 for most, side in zip((512, 1024), labelled, strict=True))
    return (crop[0], crop[1]), (outer[0], outer[1])


def _fda_side(cfg: RunConfig) -> int:
    """Pixels of the shorter side of what FDA sees."""
    window = cfg.data.outer_crop_size if cfg.uses_outer_crop else cfg.data.crop_size
    halved = cfg.hrda.enabled and cfg.translate.hrda_scale == "context"
    return min(window) // (2 if halved else 1)


def _floors(counts: np.ndarray, usual: int) -> int | tuple[int, ...]:
    """For each class the usual floor, or so much less that half of the images that show the class count."""
    floors = []
    for of_class in counts.T:
        shown = np.sort(of_class[of_class > 0])[::-1]
        floors.append(min(usual, int(shown[(len(shown) - 1) // 2]) - 1) if len(shown) else usual)
    return usual if set(floors) == {usual} else tuple(floors)


def _temperature(counts: Sequence[np.ndarray], shares: Sequence[float], floors: int | tuple[int, ...]) -> float:
    """The smallest with which the draws are worth half of the images (1/Σp² >= images/2) and no class dominates them.

    Where no temperature does it, the one with which the draws are worth most. Of several domains the images are those
    that even draws by the shares are worth.
    """
    best = (0.0, _TEMPERATURES[0])
    pixels = sum(one.sum(axis=0) for one in counts)
    largest = min(2 / max((pixels > 0).sum(), 1), 0.75)  # share of the draws that one class may have
    lengths = [len(one) for one in counts]
    number = worth_of_even_draws(lengths, shares)
    for temperature in _TEMPERATURES:
        if not pixels.any():
            break
        rare = joint_rare_classes(counts, shares, temperature, floors)
        worth = 1 / float((draw_probabilities(rare, sum(lengths)) ** 2).sum())
        if worth >= number / 2 and rare.of_classes.max() <= largest:
            return temperature
        best = max(best, (worth, temperature), key=lambda pair: pair[0])
    return best[1]


def worth_of_even_draws(lengths: Sequence[int], shares: Sequence[float]) -> float:
    """How many images draws are worth that are even in each domain, 1/Σp²: of one domain all of them."""
    return lengths[0] if len(lengths) == 1 else 1 / float((even_draws(lengths, shares) ** 2).sum())


def _said_of_crops(cfg: RunConfig, domains: Mapping[str, np.ndarray]) -> str:
    """The crop, what it is cut out of, and which rows of it are not trusted."""
    images = [f"{role} images of {sized(np.median(sizes, axis=0).astype(int))}" for role, sizes in domains.items()]
    window = f" in windows of {sized(cfg.data.outer_crop_size)}" if cfg.uses_outer_crop else ""
    rows = [f"{side} {n}" for side in ("top", "bottom") if (n := getattr(cfg.uda, f"ignore_{side}"))]
    untrusted = f"the {' and '.join(rows)} rows of a target crop are ignored" if rows else "no rows ignored"
    said = f"crops of {sized(cfg.data.crop_size)}{window}, from {' and '.join(images)} (height x width); {untrusted}"
    if cfg.translates and cfg.translate.engine == "fda":
        frequencies = "1 frequency" if _frequencies(cfg) == 1 else f"{_frequencies(cfg)} frequencies"
        said += f"; FDA swaps {frequencies} (translate.fda.beta {cfg.translate.fda.beta:g})"
    return said


def _said_of_schedule(cfg: RunConfig) -> str:
    updates, warm_up = cfg.train.max_steps, cfg.optim.warmup_steps
    said = f"warm-up {warm_up:,} of {updates:,} updates ({warm_up / updates:.0%})"
    if cfg.self_trains:
        said += f"; the teacher keeps {cfg.uda.ema_momentum:g} of itself"
    return f"{said}; evaluated every {cfg.train.evaluate_every:,}, saved every {cfg.train.save_every:,}"


def _frequencies(cfg: RunConfig) -> int:
    return math.floor(_fda_side(cfg) * cfg.translate.fda.beta)


def loading_processes(cores: int) -> int:
    """Processes that load data ahead: none where they would take a core that computes."""
    return 0 if cores <= 2 else min(cores - 1, _MOST_WORKERS)


def _warnings(
    cfg: RunConfig, domains: Mapping[str, np.ndarray], kept: Mapping[str, Any], derived: Mapping[str, Any]
) -> list[str]:
    """What given and `derived` values do to these images.

    Raises:
        ValueError: if a crop is more than twice as large as the images, unless the run that goes on has `kept` it
            since its start; if its masking hides all of it; or if nothing of any target image is trusted.
    """
    found = []
    for role, sizes in domains.items():
        windowed = role_of(role) in (cfg.labels_from, "target_labelled") and cfg.uses_outer_crop
        key = "data.outer_crop_size" if windowed else "data.crop_size"
        crop = np.array(cfg.data.outer_crop_size if windowed else cfg.data.crop_size)
        small = (sizes < crop).any(axis=1)
        if not small.any():
            continue
        usual = np.median(sizes[small], axis=0).astype(int)
        empty = 1 - np.minimum(usual, crop).prod() / crop.prod()
        middle = f"in the middle {sized(usual)}" if small.sum() > 1 else sized(usual)
        text = f"{small.sum():,} of {len(sizes):,} {role} images ({middle}) are smaller than {key}"
        resize = f"{role}.resize" if role == role_of(role) else f"resize of {role}"
        goes_on = kept.get(key) is not None and tuple(kept[key]) == tuple(crop)
        if (2 * np.median(sizes, axis=0) < crop).any() and min(crop) > 32 and not goes_on:
            raise ValueError(
                f"{text} {sized(crop)} (height x width): {empty:.0%} of a crop would be padding. Set {key}: null, and "
                f"it is made to fit, or set {resize} to enlarge the images."
            )
        advice = "" if key in derived else f". With {key}: null it is made to fit"
        found.append(
            f"{text} {sized(crop)} (height x width): {empty:.0%} of such a crop is padding, from which nothing is "
            f"learned{advice}"
        )
    columns = cfg.uda.ignore_left + cfg.uda.ignore_right
    hidden = {role: (sizes[:, 1] <= columns).mean() for role, sizes in domains.items() if role_of(role) == "target"}
    for role, share in hidden.items() if cfg.self_trains and columns else ():
        text = f"uda.ignore_left and uda.ignore_right leave out {columns} columns, which is all of {share:.0%} of the "
        if share == 1:
            raise ValueError(f"{text}{role} images: nothing would be learned from them. Lower them.")
        if share:
            found.append(f"{text}{role} images: nothing is learned from these")
    if (text := rate_is_too_low(cfg)) != "":
        found.append(text)
    rows, height = cfg.uda.ignore_top + cfg.uda.ignore_bottom, cfg.data.crop_size[0]
    if cfg.self_trains and 2 * rows > height:
        found.append(
            f"uda.ignore_top and uda.ignore_bottom leave out {rows} of the {height} rows of every target crop. They "
            "are for cameras that film their own car; for other images set both to 0"
        )
    if cfg.translates and cfg.translate.engine == "fda" and not _frequencies(cfg):
        found.append(
            f"translate.fda.beta {cfg.translate.fda.beta:g} swaps no frequency of windows whose shorter side has "
            f"{_fda_side(cfg)} pixels: the translation changes the mean colour alone. Set it to null, or to at least "
            f"{1 / _fda_side(cfg):.3g}"
        )
    if cfg.self_trains and cfg.loss_weights.masked_consistency:
        squares = math.prod(max(round(side / cfg.patch_mask.block_size), 1) for side in cfg.data.crop_size)
        if squares < 2:
            raise ValueError(
                f"patch_mask.block_size must be at most half of data.crop_size {sized(cfg.data.crop_size)}, or the "
                f"whole crop is hidden, got {cfg.patch_mask.block_size}. Set it to null for a sixteenth of the crop."
            )
    return found


def _said_of_shares(cfg: RunConfig, facts: Facts, role: str, listed: DomainConfigs) -> str:
    pairs = zip(shares_of(listed), several(listed), strict=True)
    each = [f"{share:.0%} of {domain.name or domain.path} ({domain.split})" for share, domain in pairs]
    said = f"{role} images in the batches: {', '.join(each)}"
    if role != cfg.labels_from or not facts.counts.any():
        return said
    together = joint_shares_of_pixels(facts.counts_of_each, shares_of(listed))
    shown = ", ".join(f"{name} {share:.2%}" for name, share in zip(cfg.classes, together, strict=True))
    return f"{said}. Together their labelled pixels are {shown}"


def _said_of_target_labels(cfg: RunConfig, counts: np.ndarray) -> str:
    absent = [name for name, pixels in zip(cfg.classes, counts.sum(axis=0), strict=True) if not pixels]
    return (
        f"{cfg.data.target_labelled_share:.0%} of the labelled images in the batches are of the target, drawn from "
        f"{len(counts):,}, {'of which none shows ' + ', '.join(absent) if absent else 'which show every class'}"
    )


def _said_of_draws(cfg: RunConfig, facts: Facts, num_processes: int, derived: bool) -> tuple[str, bool]:
    """Which images the run will draw, and whether these are too few: less than a third of what even draws would reach,
    or draws that are worth less than even ones from a third of the images (1/Σp² < images/3).

    `derived`: nobody has given the temperature or the floors.
    """
    counts, lengths = facts.counts, [len(one) for one in facts.counts_of_each]
    rare, of_sources = source_rare_classes(cfg, facts), shares_of(cfg.labelled)
    draws = cfg.train.max_steps * cfg.train.batch_size * cfg.train.micro_batches * num_processes
    if facts.labelled_target is not None:
        draws = max(round(draws * (1 - cfg.data.target_labelled_share)), 1)
    shares = draw_probabilities(rare, len(counts))
    distinct = expected_distinct(shares, draws)
    evenly = expected_distinct(even_draws(lengths, of_sources), draws)
    first = int(rare.of_classes.argmax())
    text = (
        f"rare-class sampling (rcs.temperature {cfg.rcs.temperature:g}) will draw about {distinct:,.0f} of the "
        f"{len(counts):,} {cfg.labels_from} images in {draws:,} draws, {rare.of_classes[first]:.0%} of them for "
        f"{cfg.classes[first]}"
    )
    few = distinct < evenly / 3
    if not few and 1 / (shares**2).sum() >= worth_of_even_draws(lengths, of_sources) / 3:
        return text, False
    if not few:
        each = [rare.probabilities[c] / len(images) if len(images) else 0 for c, images in enumerate(rare.images)]
        images = rare.images[int(np.argmax(each))]
        text += (
            f"; {shares[images].sum():.0%} of all draws are of the {len(images):,} images that show "
            f"{cfg.classes[int(np.argmax(each)) % len(cfg.classes)]}"
        )
    if derived:
        return f"{text}. No temperature does better: add images of that class, or set rcs.enabled: false", True
    return f"{text}. The other images are hardly learned from: set rcs.temperature and rcs.min_pixels to null", True


def without_data(cfg: RunConfig) -> RunConfig:
    """A config without nulls for a command that reads no data: crops are those that large images have."""
    return derive(cfg, Facts.unread(cfg)).cfg
