"""Segment an image or all images of a folder, at their own size: python scripts/predict.py MODEL photos --output DIR

photo.jpg gives photo_ids.png (grey value = class id), photo_color.png (with a palette) and photo_overlay.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageOps
from tqdm import tqdm

from t2sda_hf.evaluation.inference import load_model, predict_labels, saved_image_size, to_pixel_values
from t2sda_hf.labels import palette

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("model", help="folder or Hub id of a T2S-DA model or a SegFormer")
    parser.add_argument("images", type=Path, help=f"an image, or a folder of {', '.join(SUFFIXES)} files")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist in DIR")
    parser.add_argument("--mode", choices=("whole", "slide"), default="whole")
    parser.add_argument("--window", **size, help="for --mode slide")
    parser.add_argument("--stride", **size, help="for --mode slide")
    parser.add_argument("--image_size", **size, help="network input; default: what is saved with MODEL")
    return parser.parse_args(arguments)


def find_images(path: Path) -> list[Path]:
    """`path` itself, or the image files directly in the folder `path`."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"{path} is neither an image nor a folder with images ({', '.join(SUFFIXES)}).")
    return found


def read_image(path: Path) -> np.ndarray:
    """(H,W,3) uint8 RGB, turned upright if its EXIF data says so."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # Pillow's conversion would cut everything above 255 to white
                raise ValueError(f"{path} has more than 8 bits per channel ({picture.mode}): save it with 8.")
            return np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def output_files(images: Sequence[Path], folder: Path, overwrite: bool) -> list[dict[str, Path]]:
    """The three files of each image; an error if one of them would replace an image or anything else."""
    originals = {image.resolve() for image in images}
    writers: dict[str, Path] = {}
    for image in images:
        if writers.setdefault(image.stem, image) != image:
            raise ValueError(f"{writers[image.stem]} and {image} would get the same output files: rename one.")
    files = [{kind: folder / f"{image.stem}_{kind}.png" for kind in ("ids", "color", "overlay")} for image in images]
    for file in (file for three in files for file in three.values()):
        if file.resolve() in originals or (file.exists() and not overwrite):
            raise ValueError(f"{file} exists: choose another --output, or --overwrite earlier predictions.")
    return files


def run(args: argparse.Namespace) -> None:
    images = find_images(args.images)
    files = output_files(images, args.output, args.overwrite)
    for path in images:  # a broken one must not end the run halfway
        read_image(path)
    device = Accelerator().device
    model, classes = load_model(args.model)
    model.to(device)
    image_size = tuple(args.image_size) if args.image_size else saved_image_size(args.model)
    window, stride = (tuple(side) if side else None for side in (args.window, args.stride))
    args.output.mkdir(parents=True, exist_ok=True)
    for path, three in zip(tqdm(images, desc="predict"), files, strict=True):
        image = read_image(path)
        pixel_values = to_pixel_values(image, image_size, device)
        labels = predict_labels(model, pixel_values, image.shape[:2], args.mode, window, stride)[0].cpu().numpy()
        picture = Image.fromarray(labels)
        picture.save(three["ids"])
        picture.putpalette(palette(classes).tobytes())
        picture.save(three["color"])
        Image.blend(Image.fromarray(image), picture.convert("RGB"), 0.5).save(three["overlay"])


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
