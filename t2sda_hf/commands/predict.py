"""Segment an image, a video, or all images and videos of a folder. Or segment a labelled domain and show the errors.

    t2sda predict outputs/run photos --output out
    t2sda predict USER/streets-t2sda drive.mp4 --output out --confidence
    t2sda predict outputs/run --compare --config mine.yaml --output out     the test domain of a config
    t2sda predict outputs/run --compare --domain data/city --label_map "{human: person}" --output out

Of the folder of a run, the command takes the student that was adapted, which is outputs/run/t2sda/student here. It sees
images in the windows that the run was scored with, unless --mode or a config says otherwise.
Predictions have the size of the original images. For photo.jpg the command writes:

photo_ids.png          the grey value of a pixel is its class id
photo_color.png        each class has a colour
photo_overlay.png      these colours on top of the image
photo_confidence.png   with --confidence: how sure the model is (the grey value 255 means sure)

For drive.mp4 it writes drive_overlay.mp4 and a folder drive_ids/ with one PNG for each frame. With --confidence it also
writes a folder drive_confidence/.

legend.png shows the colour of every class. A file that cannot be read is left out and named at the end, as is a video
that is cut, of which the frames that are there are segmented. The exit code is 1 then.

With --compare the command reads a labelled domain, as `t2sda evaluate` does, instead of images. For the image with
index 7 it writes 000007_NAME_ids.png and so on. It also writes 000007_NAME_compare.png, which shows the image, the
true labels, the prediction and the errors side by side.
"""

import os
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.domains import Domain
from ..data.transforms import InputSize, Size, sized
from ..device import advised, make_accelerator
from ..errors import OutOfMemory
from ..evaluation.evaluator import Part
from ..evaluation.inference import (
    Mode,
    load_model,
    naming,
    needing_less,
    predict,
    saved_image_size,
    smaller_windows,
    to_pixel_values,
)
from ..evaluation.models import model_of
from ..evaluation.pictures import Column, draw_legend, errors, save_grid
from ..files import VideoFrames, read_image
from ..labels import IGNORE_INDEX, palette
from ..listing import IMAGE_SUFFIXES, VIDEO_SUFFIXES, account, list_files
from ..models import T2SDAForSemanticSegmentation
from ..storage import refuse_inside
from .domains import look_as_in_run, open_labelled, readable, test_domain

SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
LEGEND = "legend.png"
Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]


class Unreadable(ValueError):
    """One file is no picture; the others may be."""


def run(args: Namespace) -> int:
    args.model = model_of(args.model)
    if args.compare:
        if args.images is not None:
            raise ValueError(f"--compare reads a labelled domain instead of images: leave out {args.images}.")
        return predict_domain(args)
    if args.images is None:
        raise ValueError("there is nothing to segment: give an image, a video or a folder of them, or --compare.")
    about_labels = ("--test.", "--evaluation.limit")
    unread = [
        word for word in args.overrides if word.startswith(about_labels) and not word.startswith("--test.max_pixels")
    ]
    if args.domain or unread:
        key = unread[0].partition("=")[0] if unread else "--domain"
        flag = f"--{key.rpartition('.')[2]}" if "." in key else key
        raise ValueError(f"{flag} is about labelled images, which only --compare reads.")
    return predict_files(args)


def predict_files(args: Namespace) -> int:
    if os.path.realpath(args.output) == os.path.realpath(args.images):  # folders in it are not read
        raise ValueError(f"{args.output} is read as data: pass another --output.")
    images = find_images(args.images)
    files = files_for(images, args.output, args.confidence)
    refuse_existing(files, args.overwrite, images)
    look_as_in_run(args)
    model, classes = load_model(args.model)
    legend = legend_for(args, classes, images)
    see, colors = seeing(model, args), palette(classes)
    unread: list[str] = []
    in_part: list[str] = []
    most = max(test.max_pixels for test in args.cfg.tests)
    with ThreadPoolExecutor(2) as beside:  # reads the next image and writes the one before, while a GPU sees this one
        written: deque[Future[None]] = deque()
        for path, own, image in zip(tqdm(images, desc="predict"), files, _ahead(beside, images, most), strict=True):
            try:
                with naming(str(path)):
                    if image is None:
                        cut = predict_video(path, own, see, colors, most)
                        in_part += [cut] if cut else []
                        continue
                    pixels = image.result()
                    own["ids"].parent.mkdir(parents=True, exist_ok=True)
                    written.append(beside.submit(save_pictures, pixels, *see(pixels), own, colors))
            except Unreadable as error:
                unread.append(str(error))
            while len(written) > 1:
                written.popleft().result()
        for one in written:
            one.result()
    if len(unread) == len(images):
        raise ValueError(f"{unread[0]}{f' So are all {len(unread)} files.' if len(unread) > 1 else ''}")
    return report(f"{len(images) - len(unread)} of {len(images)} files", unread, args.output, legend, in_part)


def _ahead(
    beside: ThreadPoolExecutor, images: Sequence[Path], max_pixels: int
) -> Iterator["Future[np.ndarray] | None"]:
    """The pixels of each image, to be waited for, while the next one is read, too; None for a video."""
    asked: deque[Future[np.ndarray] | None] = deque()
    for path in images:
        is_video = path.suffix.lower() in VIDEO_SUFFIXES
        asked.append(None if is_video else beside.submit(read_picture, path, max_pixels))
        if len(asked) > 1:
            yield asked.popleft()
    yield from asked


def predict_domain(args: Namespace) -> int:
    config = test_domain(args)
    refuse_inside(args.output, [config.path, config.label_path])
    model, classes = load_model(args.model)
    domain = open_labelled(config, classes, "To segment images without labels, give them instead of --compare.")
    asked = range(len(domain))[: args.cfg.evaluation.limit]
    part = readable(Part(domain, asked, domain.name))
    files = [picture_files(args.output / stem_of(domain, row), args.confidence, "compare") for row in part.indices]
    refuse_existing(files, args.overwrite)
    legend = legend_for(args, classes)
    see = seeing(model, args)
    args.output.mkdir(parents=True, exist_ok=True)
    for index, own in enumerate(tqdm(files, desc="predict")):
        image, truth = part.image(index), part.labels(index)
        with naming(own["ids"].stem.removesuffix("_ids")):
            labels, confidence = see(image)
        save_pictures(image, labels, confidence, own, palette(classes))
        wrong, known = errors(labels, truth), truth != IGNORE_INDEX
        right = f"{100 * (wrong[known] == 0).mean():.1f} % right" if known.any() else "nothing is labelled"
        columns = [Column("image", [image]), Column("truth", [truth], "classes")]
        columns += [Column("prediction", [labels], "classes"), Column(f"errors: {right}", [wrong], "error")]
        save_grid(own["compare"], columns, classes)
    report(f"{len(part)} images of {domain.name}", [], args.output, legend)
    return int(len(part) < len(asked))  # `readable` has named the others


def legend_for(args: Namespace, classes: Sequence[str], originals: Sequence[Path] = ()) -> bytes:
    """The legend, drawn; ValueError if another picture of its name is in the way."""
    legend, path = draw_legend(classes), args.output / LEGEND
    if not path.is_file() or path.read_bytes() != legend:  # that of an earlier prediction may stay
        refuse_existing([{"legend": path}], args.overwrite, originals)
    return legend


def report(done: str, unread: Sequence[str], folder: Path, legend: bytes, in_part: Sequence[str] = ()) -> int:
    """Write the legend, and say where everything is; the exit code."""
    (folder / LEGEND).write_bytes(legend)
    print(f"{done} in {folder}. The colours of the classes: {folder / LEGEND}")
    if unread:
        print(f"{len(unread)} could not be read and {'is' if len(unread) == 1 else 'are'} left out:", file=sys.stderr)
        print("\n".join(unread), file=sys.stderr)
    if in_part:
        print(f"{len(in_part)} could be read in part, which was segmented:", file=sys.stderr)
        print("\n".join(in_part), file=sys.stderr)
    return int(bool(unread or in_part))


def seeing(model: T2SDAForSemanticSegmentation, args: Namespace) -> Predict:
    """What gives the class ids (H,W) of an image at its own size, and the confidence if it is asked for."""
    accelerator = make_accelerator(args.cfg.train.precision)
    device, model = accelerator.device, accelerator.prepare_model(model, evaluation_mode=True)
    image_size: InputSize = tuple(args.image_size) if args.image_size else saved_image_size(args.model)
    how = args.cfg.evaluation

    windows: list[tuple[Mode, Size | None, Size | None]] = [(how.mode, how.window, how.stride)]

    def see(image: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        pixel_values = to_pixel_values(image, image_size, device)
        while True:
            mode, window, stride = windows[-1]
            size = pixel_values.shape[-2], pixel_values.shape[-1]
            less = smaller_windows(size, mode, window)
            try:
                with advised(needing_less(mode, window)):
                    seen = predict(model, pixel_values, image.shape[:2], mode, window, stride, args.confidence)
                    labels, sure = seen.labels[0].cpu().numpy(), seen.confidence
                    return labels, None if sure is None else sure[0].cpu().numpy()
            except OutOfMemory:
                if less is None:
                    raise
            # Here, where the error and what it held are gone.
            if device.type == "cuda":
                torch.cuda.empty_cache()
            windows.append(("slide", *less))
            tqdm.write(
                f"The memory does not suffice for {sized(window if mode == 'slide' and window else size)} pixels at "
                f"once: from here on in windows of {sized(less[0])}, as with --mode slide --window "
                f"{less[0][0]} {less[0][1]} --stride {less[1][0]} {less[1][1]}.",
                file=sys.stderr,
            )

    return see


def stem_of(domain: Domain, row: int) -> str:
    """How the files of a row begin: its number, and the name of its file if that is known."""
    columns = domain.table[row]
    file = columns.get("file_name") or columns["image"]["path"]
    return f"{row:06}_{Path(file).stem}" if file else f"{row:06}"


def find_images(path: Path) -> list[Path]:
    """`path` itself, or the images and videos directly in the folder `path`."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{str(path)!r} is neither a file nor a folder. Give an image, a video or a folder of them.")
    found = list_files(path, SUFFIXES, deep=False)
    told = account(len(found.files), found.ignored)
    if not found.files:
        raise ValueError(f"{path} has no image or video ({', '.join(SUFFIXES)}). {told}".rstrip())
    if told:
        print(f"{path}: {told}", file=sys.stderr)
    return found.files


def read_picture(path: Path, max_pixels: int) -> np.ndarray:
    """(H,W,3) uint8 RGB, as a domain reads it."""
    try:
        return read_image({"bytes": None, "path": str(path)}, str(path), max_pixels)
    except ValueError as error:
        raise Unreadable(str(error)) from error


def open_video(path: Path) -> VideoFrames:
    try:
        return VideoFrames(str(path))
    except ValueError as error:
        raise Unreadable(str(error)) from error


def files_for(images: Sequence[Path], folder: Path, confidence: bool) -> list[dict[str, Path]]:
    """What is written for each image or video."""
    writers: dict[str, Path] = {}
    files = []
    for image in images:
        if writers.setdefault(image.stem, image) != image:
            raise ValueError(f"{writers[image.stem]} and {image} would get the same output files: rename one.")
        if image.suffix.lower() in VIDEO_SUFFIXES:
            kinds = {"overlay": ".mp4", "ids": ""} | ({"confidence": ""} if confidence else {})
            files.append({kind: folder / f"{image.stem}_{kind}{suffix}" for kind, suffix in kinds.items()})
        else:
            files.append(picture_files(folder / image.stem, confidence))
    return files


def picture_files(stem: Path, confidence: bool, *more: str) -> dict[str, Path]:
    """Kind of picture -> its file."""
    kinds = ["ids", "color", "overlay", *(["confidence"] if confidence else []), *more]
    return {kind: stem.with_name(f"{stem.name}_{kind}.png") for kind in kinds}


def refuse_existing(files: Sequence[Mapping[str, Path]], overwrite: bool, originals: Sequence[Path] = ()) -> None:
    """ValueError if one of the files would replace an original, or anything that may not be overwritten."""
    kept = {image.resolve() for image in originals}
    for file in (file for one in files for file in one.values()):
        if file.resolve() in kept or (file.exists() and not overwrite):
            raise ValueError(f"{file} exists: choose another --output, or --overwrite earlier predictions.")


def blend(image: np.ndarray, labels: np.ndarray, colors: np.ndarray) -> Image.Image:
    return Image.blend(Image.fromarray(image), Image.fromarray(colors[labels]), 0.5)


def save_grey(confidence: np.ndarray | None, path: Path | None) -> None:
    if confidence is not None and path is not None:
        Image.fromarray((255 * confidence).round().astype(np.uint8)).save(path)


def save_pictures(
    image: np.ndarray, labels: np.ndarray, confidence: np.ndarray | None, files: Mapping[str, Path], colors: np.ndarray
) -> None:
    """Write the `picture_files` of one image."""
    picture = Image.fromarray(labels)
    picture.save(files["ids"])
    picture.putpalette(colors.tobytes())
    picture.save(files["color"])
    blend(image, labels, colors).save(files["overlay"])
    save_grey(confidence, files.get("confidence"))


def predict_video(path: Path, files: Mapping[str, Path], see: Predict, colors: np.ndarray, max_pixels: int) -> str:
    """Frame by frame, so memory does not grow with the length; a sentence if the video is cut, "" if it is whole."""
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path} is a video: install PyAV for it (pip install 't2sda_hf[video]').") from error

    frames = open_video(path)
    for folder in (files[kind] for kind in ("ids", "confidence") if kind in files):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
    with av.open(files["overlay"], "w") as target:
        out, number = target.add_stream("libx264", rate=frames.rate), 0
        # That format stores colours of 2 x 2 pixels, so it has no odd sides.
        out.height, out.width = (side + side % 2 for side in frames.size)
        out.pix_fmt = "yuv420p"
        for image in tqdm(frames, desc=path.name, total=frames.expected or None):
            labels, confidence = see(image)
            Image.fromarray(labels).save(files["ids"] / f"{number:06}.png")
            save_grey(confidence, files["confidence"] / f"{number:06}.png" if "confidence" in files else None)
            pixels = np.asarray(blend(image, labels, colors))
            sides = (0, out.height - pixels.shape[0]), (0, out.width - pixels.shape[1]), (0, 0)
            target.mux(out.encode(av.VideoFrame.from_ndarray(np.pad(pixels, sides, "edge"), format="rgb24")))
            number += 1
        target.mux(out.encode(None))
    return frames.cut(number)
