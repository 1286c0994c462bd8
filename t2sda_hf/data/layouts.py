"""How the public data sets lie on disk after unpacking (method 3.2)."""

import difflib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Layout:
    """Patterns are relative to the root; {split} is the folder's word for a split.

    Attributes:
        splits: split -> (the folder's word, number of images of the complete download).
        images: glob pattern.
        ending: what ends the name of every image; the rest is its stem.
        labels: (pattern, label space) in order of preference. {parent} and {stem} are those of the image, {parent}
            without the first folder of the image's path.
        space: label space in which labels are prepared.
    """

    splits: dict[str, tuple[str, int]]
    images: str
    ending: str
    labels: tuple[tuple[str, str], ...]
    space: str = "cityscapes"


ROLES = ("source", "target")  # of a config, which `t2sda prepare` takes in the place of a layout
_CITY = "leftImg8bit/{split}/*/*_leftImg8bit.png", "_leftImg8bit.png"
LAYOUTS: dict[str, Layout] = {
    "gta5": Layout({"train": ("", 24_966)}, "images/*.png", ".png", (("labels/{stem}.png", "gta5"),)),
    "synthia": Layout({"train": ("", 9_400)}, "RGB/*.png", ".png", (("GT/LABELS/{stem}.png", "synthia"),)),
    "cityscapes": Layout(
        {"train": ("train", 2_975), "validation": ("val", 500)},
        *_CITY,
        (
            ("gtFine/{parent}/{stem}_gtFine_labelIds.png", "cityscapes_ids"),
            ("gtFine/{parent}/{stem}_gtFine_labelTrainIds.png", "cityscapes"),
        ),
    ),
    "acdc": Layout(
        {"train": ("train", 1_600), "validation": ("val", 406)},
        "rgb_anon/*/{split}/*/*_rgb_anon.png",
        "_rgb_anon.png",
        (
            ("gt/{parent}/{stem}_gt_labelTrainIds.png", "cityscapes"),
            ("gt/{parent}/{stem}_gt_labelIds.png", "cityscapes_ids"),
        ),
    ),
    "dark_zurich": Layout(
        {"train": ("train", 2_416), "validation": ("val", 50)},
        "rgb_anon/{split}/night/*/*_rgb_anon.png",
        "_rgb_anon.png",
        (
            ("gt/{parent}/{stem}_gt_labelTrainIds.png", "cityscapes"),
            ("gt/{parent}/{stem}_gt_labelIds.png", "cityscapes_ids"),
        ),
    ),
    "bdd100k": Layout(
        {"train": ("train", 7_000), "validation": ("val", 1_000)},
        "images/10k/{split}/*.jpg",
        ".jpg",
        (("labels/sem_seg/masks/{split}/{stem}.png", "cityscapes"),),
    ),
    "mapillary": Layout(
        {"train": ("training", 18_000), "validation": ("validation", 2_000)},
        "{split}/images/*.jpg",
        ".jpg",
        (("{split}/v1.2/labels/{stem}.png", "mapillary"), ("{split}/labels/{stem}.png", "mapillary")),
    ),
    "camvid": Layout(  # the 11-class form of the SegNet tutorial
        {"train": ("train", 367), "validation": ("val", 101), "test": ("test", 233)},
        "{split}/*.png",
        ".png",
        (("{split}annot/{stem}.png", "camvid"),),
        "camvid",
    ),
    "idd_lite": Layout(
        {"train": ("train", 1_403), "validation": ("val", 204)},
        "leftImg8bit/{split}/*/*_image.jpg",
        "_image.jpg",
        (("gtFine/{parent}/{stem}_label.png", "idd_lite"),),
        "idd_lite",
    ),
}


def find_files(name: str, root: str, split: str, labelled: bool) -> tuple[list[tuple[Path, Path | None]], str]:
    """The images of one split with their label files, sorted by name, and the label space of those files.

    Args:
        name: of `LAYOUTS`.
        labelled: False: label files are neither needed nor looked for.

    Raises:
        ValueError: for an unknown name or split, a root without such files, or an image without its label.
    """
    if name not in LAYOUTS:
        near = difflib.get_close_matches(name, LAYOUTS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no layout {name!r}: known are {', '.join(LAYOUTS)}.{hint}")
    layout, base = LAYOUTS[name], Path(root)
    if split not in layout.splits:
        raise ValueError(f"{name} has no split {split!r}: it has {', '.join(layout.splits)}.")
    word = layout.splits[split][0]
    found = base.glob(layout.images.format(split=word))
    images = sorted(file for file in found if not file.name.startswith("."))  # macOS puts ._x.png beside x.png
    if not images:
        raise ValueError(
            f"{root} does not look like {name}: no file matches {layout.images.format(split=word)}. Give the folder "
            "that holds the unpacked download."
        )
    if not labelled:
        return [(image, None) for image in images], layout.space
    tried = []
    for pattern, space in layout.labels:
        labels = [base / _label_of(image.relative_to(base), pattern, word, layout.ending) for image in images]
        missing = [label for label in labels if not label.is_file()]
        if not missing:
            return list(zip(images, labels, strict=True)), space
        tried.append((len(missing), missing[0]))
    number, first = min(tried)
    raise ValueError(
        f"{name} ({split}) lacks the labels of {number} of {len(images)} images, first {first}. Unpack the label "
        "archive into the same root. A target needs no labels."
    )


def _label_of(image: Path, pattern: str, word: str, ending: str) -> str:
    return pattern.format(split=word, parent="/".join(image.parts[1:-1]), stem=image.name.removesuffix(ending))
