"""Label spaces: what a class id of a data set means, and how it looks.

Everything is matched by class *name*: a data set gives names to its ids, a run names the classes it trains, and
`id_map` joins the two. Ids, colours and class sets are those of Cityscapes' train ids (method 3.1).
"""

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

IGNORE_INDEX = 255
VOID = "void"  # the name of ids that carry no class; they become IGNORE_INDEX

# name: (R, G, B). The order is the train id.
CITYSCAPES_COLORS: dict[str, tuple[int, int, int]] = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
CITYSCAPES_CLASSES: tuple[str, ...] = tuple(CITYSCAPES_COLORS)
THING_CLASSES: tuple[str, ...] = (
    "traffic light",
    "traffic sign",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)


def _ids(count: int, names: Mapping[int, str]) -> tuple[str, ...]:
    return tuple(names.get(label_id, VOID) for label_id in range(count))


def _cityscapes_at(*ids: int) -> dict[int, str]:
    """`ids` in the order of the train ids, -1 for a class that is not there."""
    return {label_id: name for label_id, name in zip(ids, CITYSCAPES_CLASSES, strict=True) if label_id >= 0}


# The label ids of Cityscapes and GTA5 (method 3.1).
_CITYSCAPES_IDS = _ids(35, _cityscapes_at(7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))

# The names of a data set's ids, in the order of the ids. Several ids may have one name.
LABEL_SPACES: dict[str, tuple[str, ...]] = {
    "cityscapes": CITYSCAPES_CLASSES,  # train ids: also ACDC, Dark Zurich, BDD100K
    "cityscapes_ids": _CITYSCAPES_IDS,
    "gta5": _CITYSCAPES_IDS,
    "synthia": _ids(23, _cityscapes_at(3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11)),
    # Vistas 1.2 by Cityscapes' names, as benchmarks of generalisation map it (RobustNet, datasets/mapillary.py).
    "mapillary": _ids(
        66,
        {24: "road", 41: "road", 2: "sidewalk", 47: "pole", 20: "rider", 21: "rider"}
        | _cityscapes_at(13, 15, 17, 6, 3, 45, 48, 50, 30, 29, 27, 19, 22, 55, 61, 54, 58, 57, 52),
    ),
    "camvid": (
        "sky",
        "building",
        "pole",
        "road",
        "pavement",
        "tree",
        "sign",
        "fence",
        "car",
        "pedestrian",
        "bicyclist",
        VOID,
    ),
    "idd_lite": (
        "drivable",
        "non-drivable",
        "living things",
        "vehicles",
        "roadside objects",
        "far objects",
        "sky",
    ),
}

# Colours of masks that were saved as pictures, (R, G, B): class name, for spaces that have standard colours.
# Cityscapes' polegroups look like poles and its licence plates like cars, so they become those (method 3.1).
_CITYSCAPES_BY_COLOR = {color: name for name, color in CITYSCAPES_COLORS.items()} | dict.fromkeys(
    [
        (0, 0, 0),
        (20, 20, 20),
        (111, 74, 0),
        (81, 0, 81),
        (250, 170, 160),
        (230, 150, 140),
        (180, 165, 180),
        (150, 100, 100),
        (150, 120, 90),
        (0, 0, 90),
        (0, 0, 110),
    ],
    VOID,
)
SPACE_COLORS: dict[str, dict[tuple[int, int, int], str]] = dict.fromkeys(
    ("cityscapes", "cityscapes_ids", "gta5"), _CITYSCAPES_BY_COLOR
)


def id_map(names: Sequence[str], classes: Sequence[str], renames: Mapping[str, str]) -> "np.ndarray":
    """Look-up table from the ids of a data set to the class ids of a run.

    Args:
        names: the data set's class names, position = id on disk. `VOID` marks ids without a class.
        classes: the run's class names, position = class id.
        renames: data set name -> run name, for classes that are called or split differently. A name that stands
            neither here nor in `classes` is ignored in training and evaluation.

    Returns:
        (256,) uint8. IGNORE_INDEX for ignored ids and for ids the data set does not define.

    Raises:
        ValueError: for a rename from or to an unknown name (with the nearest known one), or if no class is shared.
    """
    import numpy as np  # here, because the command line reads the names without it

    if len(classes) > IGNORE_INDEX:
        raise ValueError(
            f"there may be at most {IGNORE_INDEX} classes, got {len(classes)}: label maps have 8 bits, and "
            f"{IGNORE_INDEX} is the ignored id."
        )
    for given, known, where in [(k, names, "the data set") for k in renames] + [
        (v, classes, "the run's classes") for v in renames.values()
    ]:
        if given not in known:
            near = difflib.get_close_matches(given, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"label_map names {given!r}, which {where} does not have: {', '.join(known)}.{hint}")
    table = np.full(256, IGNORE_INDEX, dtype=np.uint8)
    for label_id, name in enumerate(names):
        name = renames.get(name, name)
        if name in classes:
            table[label_id] = classes.index(name)
    if (table == IGNORE_INDEX).all():
        raise ValueError(
            f"no class is shared: the data set has {', '.join(names)}; the run trains {', '.join(classes)}. "
            "Set label_map (data set name: class name), or the domain's label_space."
        )
    return table


def shortened(name: str, length: int = 24) -> str:
    """A name as it fits beside a picture or into a table: with an ellipsis in the middle if it is longer."""
    return name if len(name) <= length else f"{name[: length - length // 3 - 1]}…{name[-(length // 3) :]}"


def palette(classes: Sequence[str]) -> "np.ndarray":
    """Display colours of `classes`: Cityscapes' own where the name is known, otherwise evenly spread hues.

    Returns:
        (K, 3) uint8 RGB.
    """
    import matplotlib
    import numpy as np

    hues = matplotlib.colormaps["hsv"]
    colors = [
        CITYSCAPES_COLORS.get(name, tuple(int(255 * v) for v in hues(position / len(classes))[:3]))
        for position, name in enumerate(classes)
    ]
    return np.array(colors, dtype=np.uint8)
