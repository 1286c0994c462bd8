"""Segment an image, a video or all of a folder, at their own size: python scripts/predict.py MODEL photos --output DIR

photo.jpg gives photo_ids.png (grey value = class id), photo_color.png (with a palette) and photo_overlay.png; with
--confidence also photo_confidence.png (grey value 255 = sure). drive.mp4 gives drive_overlay.mp4 and a folder
drive_ids/ with one PNG for each frame; with --confidence also drive_confidence/.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageOps
from tqdm import tqdm

from t2sda_hf.evaluation.inference import load_model, predict, saved_image_size, to_pixel_values
from t2sda_hf.labels import palette
from t2sda_hf.masking import run_masked

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm")
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = {"type": int, "nargs": 2, "metavar": ("HEIGHT", "WIDTH")}
    parser.add_argument("model", help="folder or Hub id of a T2S-DA model or a SegFormer")
    parser.add_argument("images", type=Path, help=f"a file or a folder: {', '.join(SUFFIXES + VIDEOS)}")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist in DIR")
    parser.add_argument("--confidence", action="store_true", help="also how sure the model is of every pixel")
    parser.add_argument("--mode", choices=("whole", "slide"), default="whole")
    parser.add_argument("--window", **size, help="for --mode slide")
    parser.add_argument("--stride", **size, help="for --mode slide")
    parser.add_argument("--image_size", **size, help="network input; default: what is saved with MODEL")
    return parser.parse_args(arguments)


def find_images(path: Path) -> list[Path]:
    """`path` itself, or the images and videos directly in the folder `path`."""
    if path.is_file():
        return [path]
    found = sorted(file for file in path.glob("*") if file.suffix.lower() in SUFFIXES + VIDEOS)
    if not found:
        raise ValueError(f"{path} is neither an image nor a folder with images ({', '.join(SUFFIXES + VIDEOS)}).")
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


def open_video(path: Path) -> Any:
    """A container of PyAV with at least one frame of video."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path} is a video: install PyAV to read it (pip install 't2sda_hf[video]').") from error
    try:
        container = av.open(path)
    except (OSError, ValueError) as error:  # PyAV's errors are both of these
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not container.streams.video:
        container.close()
        raise ValueError(f"{path} has no pictures, only sound.")
    return container


def output_files(images: Sequence[Path], folder: Path, overwrite: bool, confidence: bool) -> list[dict[str, Path]]:
    """What is written for each file; an error if one of them would replace an image or anything else."""
    originals = {image.resolve() for image in images}
    writers: dict[str, Path] = {}
    for image in images:
        if writers.setdefault(image.stem, image) != image:
            raise ValueError(f"{writers[image.stem]} and {image} would get the same output files: rename one.")
    files = []
    for image in images:
        if image.suffix.lower() in VIDEOS:
            kinds = {"overlay": ".mp4", "ids": ""} | ({"confidence": ""} if confidence else {})
        else:
            kinds = dict.fromkeys(["ids", "color", "overlay", *(["confidence"] if confidence else [])], ".png")
        files.append({kind: folder / f"{image.stem}_{kind}{suffix}" for kind, suffix in kinds.items()})
    for file in (file for one in files for file in one.values()):
        if file.resolve() in originals or (file.exists() and not overwrite):
            raise ValueError(f"{file} exists: choose another --output, or --overwrite earlier predictions.")
    return files


def blend(image: np.ndarray, labels: np.ndarray, colors: np.ndarray) -> Image.Image:
    return Image.blend(Image.fromarray(image), Image.fromarray(colors[labels]), 0.5)


def save_grey(confidence: np.ndarray | None, path: Path | None) -> None:
    if confidence is not None and path is not None:
        Image.fromarray((255 * confidence).round().astype(np.uint8)).save(path)


def predict_image(path: Path, files: dict[str, Path], see: Predict, colors: np.ndarray) -> None:
    image = read_image(path)
    labels, confidence = see(image)
    picture = Image.fromarray(labels)
    picture.save(files["ids"])
    picture.putpalette(colors.tobytes())
    picture.save(files["color"])
    blend(image, labels, colors).save(files["overlay"])
    save_grey(confidence, files.get("confidence"))


def predict_video(path: Path, files: dict[str, Path], see: Predict, colors: np.ndarray) -> None:
    """Frame by frame, so memory does not grow with the length."""
    import av

    for folder in (files[kind] for kind in ("ids", "confidence") if kind in files):
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
    with open_video(path) as source, av.open(files["overlay"], "w") as target:
        stream = source.streams.video[0]
        out = target.add_stream("libx264", rate=stream.average_rate or 25)
        # That format stores colours of 2 x 2 pixels, so it has no odd sides.
        out.width, out.height = stream.width + stream.width % 2, stream.height + stream.height % 2
        out.pix_fmt = "yuv420p"
        for number, frame in enumerate(tqdm(source.decode(stream), desc=path.name, total=stream.frames or None)):
            image = frame.to_ndarray(format="rgb24")
            labels, confidence = see(image)
            Image.fromarray(labels).save(files["ids"] / f"{number:06}.png")
            save_grey(confidence, files["confidence"] / f"{number:06}.png" if "confidence" in files else None)
            pixels = np.asarray(blend(image, labels, colors))
            pixels = np.pad(pixels, ((0, out.height - len(pixels)), (0, out.width - pixels.shape[1]), (0, 0)), "edge")
            target.mux(out.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(out.encode(None))


def run(args: argparse.Namespace) -> None:
    images = find_images(args.images)
    files = output_files(images, args.output, args.overwrite, args.confidence)
    for path in images:  # a broken one must not end the run halfway
        if path.suffix.lower() in VIDEOS:
            open_video(path).close()
        else:
            read_image(path)
    device = Accelerator().device
    model, classes = load_model(args.model)
    model.to(device)
    image_size = tuple(args.image_size) if args.image_size else saved_image_size(args.model)
    window, stride = (tuple(side) if side else None for side in (args.window, args.stride))

    def see(image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        pixel_values = to_pixel_values(image, image_size, device)
        seen = predict(model, pixel_values, image.shape[:2], args.mode, window, stride, args.confidence)
        return seen.labels[0].cpu().numpy(), None if seen.confidence is None else seen.confidence[0].cpu().numpy()

    args.output.mkdir(parents=True, exist_ok=True)
    for path, own in zip(tqdm(images, desc="predict"), files, strict=True):
        kind = predict_video if path.suffix.lower() in VIDEOS else predict_image
        kind(path, own, see, palette(classes))


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(arguments))
    except ValueError as error:
        print(f"ValueError: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_masked(main))
