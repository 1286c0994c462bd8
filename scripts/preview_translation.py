"""Show what a translation engine does, or write a folder of translations.

    python scripts/preview_translation.py --config configs/demo.yaml --engine fda color_jitter gaussian_blur
    python scripts/preview_translation.py --config configs/demo.yaml --engine trained --output sheet.png \\
        --set translate.trained.model=outputs/translators/streets
    python scripts/preview_translation.py --config configs/demo.yaml --engine trained --export outputs/translated \\
        --set translate.trained.model=outputs/translators/streets

The sheet has one column per source image: the image, the target image it is paired with, and below them one row per
engine. --export translates every source image at its working size and writes manifest.json, for
translate.trained.folder. Domains and engines are those of the config; --set changes any of its keys.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Generator, Tensor
from tqdm import tqdm

from t2sda_hf.config import NEEDS_TARGET, RunConfig, load_config
from t2sda_hf.data.domains import Domain, load_domain
from t2sda_hf.data.transforms import resize_image
from t2sda_hf.masking import run_masked
from t2sda_hf.translate import ENGINES, TranslationEngine, build_engine
from t2sda_hf.translate.trained import open_translated, write_manifest

CAPTION = 16  # pixels above each row


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
        translated = open_translated(cfg.translate.trained.folder, len(source)).image(index)
        reference = torch.from_numpy(resize_image(translated, size)).permute(2, 0, 1)[None].float() / 255
    generator = Generator().manual_seed(cfg.seed * 1_000_003 + index)
    return image, style, engine(image, reference, generator).clamp(0, 1)


def sheet(configs: Sequence[RunConfig], source: Domain, target: Domain | None, count: int) -> Image.Image:
    """The picture described above."""
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


def export(cfg: RunConfig, source: Domain, target: Domain | None, folder: Path) -> int:
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


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of a run")
    parser.add_argument("--engine", nargs="+", choices=tuple(ENGINES), help="default: the config's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--count", type=int, default=4, help="source images in the sheet")
    parser.add_argument("--output", type=Path, default=Path("outputs/translation.png"))
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="must be empty or not exist")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 2 with one line when the input is at fault."""
    args = parse_arguments(arguments)
    try:
        changes = [f"--{change}" for change in args.set]
        engines = args.engine or [load_config(args.config, changes).translate.engine]
        configs = [load_config(args.config, [*changes, f"--translate.engine={engine}"]) for engine in engines]
        if args.count < 1:
            raise ValueError(f"--count must be at least 1, got {args.count}.")
        if args.export and (len(engines) > 1 or (args.export.exists() and any(args.export.iterdir()))):
            raise ValueError(f"--export takes one engine and an empty folder, got {engines} and {str(args.export)!r}.")
        cfg = configs[0]
        source = load_domain(cfg.source, cfg.classes, labelled=False)
        target = load_domain(cfg.target, cfg.classes, labelled=False) if cfg.target.path else None
        if target is None and set(engines) & set(NEEDS_TARGET[:1]):
            raise ValueError(f"{args.config} has no target, and fda takes its style from one.")
        if args.export:
            print(f"{export(cfg, source, target, args.export)} images and manifest.json in {args.export}")
        else:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            sheet(configs, source, target, args.count).save(args.output)
            print(f"picture in {args.output}")
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))
