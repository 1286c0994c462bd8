"""Train a translation network, compare translation engines in a picture, or translate all source images.

    t2sda translator train --config mine.yaml --output outputs/translators/mine
    t2sda translator train --source streets-source --target streets-target --steps 2000 --crop 96 128 --output streets
    t2sda translator preview --config demo --engine fda color_jitter gaussian_blur
    t2sda translator preview --config demo --engine trained --translate.trained.model outputs/translators/streets
    t2sda translator apply --config demo --engine trained --translate.trained.model streets --output outputs/translated

A translation engine is a method that gives a source image the style of the target. The two domains are those of the
config, with all their keys. --source and --target replace their paths, and keys such as --source.resize are also flags.
No label is read. As the target, use only images that you may train with.

train     trains a CycleGAN (Zhu et al. 2017), which learns to translate between the two domains. One process runs for
          each GPU. It writes config.json and model.safetensors (from source to target; translate.trained.model reads
          them), backward/ (from target to source), training.json (domains, settings, losses) and preview.png.

preview   writes one picture with a column for each source image. A column shows the image, the target image of its
          pair, and one row for each engine.

apply     writes the translation of every source image, at its size after source.resize, and manifest.json.
          translate.trained.folder reads this folder.

For train and apply, --output must be an empty folder or must not exist.
"""

import math
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import DistributedDataParallelKwargs
from PIL import Image, ImageDraw
from torch import Generator, Tensor
from tqdm import tqdm

from ..config import RunConfig, differences, load_config, only
from ..data.domains import Domain, load_domain
from ..data.transforms import resize_image
from ..data.translated import open_translated, write_manifest
from ..device import make_accelerator
from ..launching import words_of
from ..storage import outputs, refuse_inside
from ..training.translator import TranslatorSettings, train_translator
from ..translate import TranslationEngine, build_engine

CAPTION = 16  # pixels above each row
_ONE = "t2sda translator takes one source and one target"


def run(args: Namespace) -> int:
    if args.action == "train":
        train(args)
    elif words_of(args):
        raise ValueError(f"{' '.join(words_of(args))} is for `t2sda translator train`: the rest is one process.")
    elif args.action == "preview":
        preview(args)
    else:
        apply(args)
    return 0


def train(args: Namespace) -> None:
    for name in ("steps", "batch_size", "width", "blocks"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if min(args.crop) < 32:
        raise ValueError(f"--crop must be at least 32 32, got {args.crop}.")
    if not 0 < args.lr < math.inf:
        raise ValueError(f"--lr must be a positive number, got {args.lr}.")
    cfg: RunConfig = args.cfg
    folder = empty(args.output, cfg)
    both = (only(cfg.source, _ONE), only(cfg.target, _ONE))
    source, target = (load_domain(domain, cfg.classes, labelled=False) for domain in both)
    settings = TranslatorSettings(
        args.steps,
        args.batch_size,
        tuple(args.crop),
        args.lr,
        args.width,
        args.blocks,
        cfg.seed,
        cfg.data.num_workers or 0,
    )
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    accelerator = make_accelerator(cfg.train.precision, kwargs_handlers=handlers)
    given = {key: value for key, (_, value) in differences({}, asdict(cfg)).items()}
    read = {key: value for key, value in given.items() if key.startswith(("source.", "target."))}
    train_translator(settings, source, target, folder, accelerator, {"domains": read})
    accelerator.end_training()


def preview(args: Namespace) -> None:
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}.")
    configs, source, target = asked(args)
    output = args.output or Path("outputs/translation.png")
    with outputs("translator", output, inputs=[one.path for one in (*args.cfg.sources, *args.cfg.targets)]):
        sheet(configs, source, target, args.count).save(output)
    print(f"picture in {output}")


def apply(args: Namespace) -> None:
    folder = empty(args.output, args.cfg)
    configs, source, target = asked(args)
    if len(configs) > 1:
        raise ValueError(f"apply takes one --engine, got {' '.join(args.engine)}.")
    print(f"{translate_all(configs[0], source, target, folder)} images and manifest.json in {folder}")


def empty(folder: Path | None, cfg: RunConfig) -> Path:
    """--output, which must be given, be empty or not exist, and be no place in the data."""
    if folder is None:
        raise ValueError("--output must name a folder to write.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--output {str(folder)!r} is not empty. Nothing is overwritten: give another.")
    refuse_inside(folder, [path for one in (*cfg.sources, *cfg.targets) for path in (one.path, one.label_path)])
    return folder


def asked(args: Namespace) -> tuple[list[RunConfig], Domain, Domain | None]:
    """The config with each of the engines, and the domains, of which there may be no target."""
    engines = args.engine or [args.cfg.translate.engine]
    configs = [load_config(args.config, [*args.overrides, f"--translate.engine={engine}"]) for engine in engines]
    cfg = configs[0]
    source = load_domain(only(cfg.source, _ONE), cfg.classes, labelled=False)
    style = only(cfg.target, _ONE)
    target = load_domain(style, cfg.classes, labelled=False) if style.path else None
    if target is None and "fda" in engines:
        raise ValueError("fda takes its style from a target: give --config with one, or --target PATH.")
    return configs, source, target


def images(domain: Domain, index: int, size: tuple[int, int] | None = None) -> Tensor:
    """(1,3,h,w) in [0,1], at the working size or at `size`."""
    image = domain.resized_image(index)
    image = image if size is None else resize_image(image, size)
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def translate_one(
    engine: TranslationEngine, cfg: RunConfig, source: Domain, target: Domain | None, index: int
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(1,3,h,w) source, style and translation number `index`; the draws are a function of the config's seed and it."""
    image = images(source, index)
    size = (image.shape[-2], image.shape[-1])
    style = images(target, index % len(target), size) if target is not None else None
    reference = style
    if cfg.translate.engine == "trained" and cfg.translate.trained.folder:
        folder = open_translated(cfg.translate.trained.folder, len(source), source.config.max_pixels)
        translated = folder.image(index)
        reference = torch.from_numpy(resize_image(translated, size)).permute(2, 0, 1)[None].float() / 255
    generator = Generator().manual_seed(cfg.seed * 1_000_003 + index)
    return image, style, engine(image, reference, generator).clamp(0, 1)


def sheet(configs: Sequence[RunConfig], source: Domain, target: Domain | None, count: int) -> Image.Image:
    """One column per source image: the image, the target image of its pair, and a row for each config's engine."""
    rows: dict[str, list[Tensor]] = {"source": []}
    for cfg in configs:
        engine = build_engine(cfg.translate)
        for index in range(min(count, len(source))):
            image, style, translated = translate_one(engine, cfg, source, target, index)
            if cfg is configs[0]:
                rows["source"].append(image)
                if style is not None:
                    rows.setdefault("target", []).append(style)
            rows.setdefault(cfg.translate.engine, []).append(translated)
    size = rows["source"][0].shape[-2:]
    stripes = [
        torch.cat([torch.nn.functional.interpolate(image, size, mode="bilinear") for image in row], 3)
        for row in rows.values()
    ]
    height, width = stripes[0].shape[-2:]
    picture = Image.new("RGB", (width, (height + CAPTION) * len(rows)), "white")
    draw = ImageDraw.Draw(picture)
    for number, (name, stripe) in enumerate(zip(rows, stripes, strict=True)):
        top = number * (height + CAPTION)
        draw.text((2, top + 2), name, fill="black")
        picture.paste(Image.fromarray(to_bytes(stripe)), (0, top + CAPTION))
    return picture


def to_bytes(image: Tensor) -> np.ndarray:
    return (image[0] * 255).round().byte().permute(1, 2, 0).numpy()


def translate_all(cfg: RunConfig, source: Domain, target: Domain | None, folder: Path) -> int:
    """Translate the whole source domain into `folder`; the number of images."""
    engine = build_engine(cfg.translate)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in tqdm(range(len(source)), desc=f"translating {source.name}"):
        *_, translated = translate_one(engine, cfg, source, target, index)
        files.append(f"{index:06d}.png")
        Image.fromarray(to_bytes(translated)).save(folder / files[-1])
    facts = {"engine": cfg.translate.engine, "weights": cfg.translate.trained.model or None, "seed": cfg.seed}
    facts |= {"source": source.name, "target": target.name if target is not None else None}
    write_manifest(folder, files, facts)
    return len(files)
