"""Names, ids and colours of Cityscapes, and the map from a data set's ids to a run's."""

import numpy as np
import pytest

from t2sda_hf.labels import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_COLORS,
    IGNORE_INDEX,
    LABEL_SPACES,
    THING_CLASSES,
    VOID,
    id_map,
    palette,
)

# Train id, name, colour, thing (cityscapesScripts and DAFormer).
TABLE = [
    (0, "road", (128, 64, 128), False),
    (1, "sidewalk", (244, 35, 232), False),
    (2, "building", (70, 70, 70), False),
    (3, "wall", (102, 102, 156), False),
    (4, "fence", (190, 153, 153), False),
    (5, "pole", (153, 153, 153), False),
    (6, "traffic light", (250, 170, 30), True),
    (7, "traffic sign", (220, 220, 0), True),
    (8, "vegetation", (107, 142, 35), False),
    (9, "terrain", (152, 251, 152), False),
    (10, "sky", (70, 130, 180), False),
    (11, "person", (220, 20, 60), True),
    (12, "rider", (255, 0, 0), True),
    (13, "car", (0, 0, 142), True),
    (14, "truck", (0, 0, 70), True),
    (15, "bus", (0, 60, 100), True),
    (16, "train", (0, 80, 100), True),
    (17, "motorcycle", (0, 0, 230), True),
    (18, "bicycle", (119, 11, 32), True),
]


@pytest.mark.parametrize(("train_id", "name", "color", "thing"), TABLE)
def test_cityscapes_classes(train_id, name, color, thing):
    assert CITYSCAPES_CLASSES[train_id] == name
    assert CITYSCAPES_COLORS[name] == color
    assert (name in THING_CLASSES) == thing


def test_there_are_nineteen_classes_and_ten_things():
    assert len(CITYSCAPES_CLASSES) == 19
    assert len(THING_CLASSES) == 10
    assert IGNORE_INDEX == 255


# Train id: the ids on disk (cityscapesScripts, which GTA5 follows; SYNTHIA-RAND-CITYSCAPES).
CITYSCAPES_IDS = dict(enumerate([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]))
SYNTHIA_IDS = dict(enumerate([3, 4, 2, 21, 5, 7, 15, 9, 6, 16, 1, 10, 17, 8, 18, 19, 20, 12, 11]))


@pytest.mark.parametrize(
    ("space", "ids"), [("cityscapes_ids", CITYSCAPES_IDS), ("gta5", CITYSCAPES_IDS), ("synthia", SYNTHIA_IDS)]
)
def test_ids_on_disk_become_train_ids_and_all_others_are_ignored(space, ids):
    table = id_map(LABEL_SPACES[space], CITYSCAPES_CLASSES, {})
    expected = [255] * 256
    for train_id, label_id in ids.items():
        expected[label_id] = train_id
    assert table.tolist() == expected


# ------------------------------------------------------------------------------------------------------------- map


def test_a_space_on_itself_is_the_identity_and_the_rest_is_ignored():
    table = id_map(CITYSCAPES_CLASSES, CITYSCAPES_CLASSES, {})
    assert table.dtype == np.uint8
    assert table.tolist() == [*range(19)] + [255] * (256 - 19)


def test_classes_are_joined_by_name_not_by_position():
    assert id_map(["sky", "road", "cow"], ["road", "car", "sky"], {})[:4].tolist() == [2, 0, 255, 255]


def test_renames_join_and_merge():
    table = id_map(
        ["wall", "building", "tree", "lamp"], ["building", "vegetation"], {"wall": "building", "tree": "vegetation"}
    )
    assert table[:4].tolist() == [0, 0, 1, 255]


def test_a_rename_wins_over_the_own_name():
    assert id_map(["truck", "car"], ["car", "truck"], {"truck": "car"})[:2].tolist() == [0, 0]


def test_void_is_ignored_even_where_the_run_has_every_class():
    table = id_map(LABEL_SPACES["camvid"], ("sky", "building"), {})
    assert table[LABEL_SPACES["camvid"].index(VOID)] == 255
    assert table[:2].tolist() == [0, 1]


def test_camvid_on_cityscapes_names():
    renames = {
        "pavement": "sidewalk",
        "tree": "vegetation",
        "sign": "traffic sign",
        "pedestrian": "person",
        "bicyclist": "rider",
    }
    table = id_map(LABEL_SPACES["camvid"], CITYSCAPES_CLASSES, renames)
    assert table[:12].tolist() == [10, 2, 5, 0, 1, 8, 7, 4, 13, 11, 12, 255]


def test_a_table_maps_a_label_image():
    table = id_map(["b", "a"], ["a", "b"], {})
    assert table[np.array([[0, 1], [255, 7]], dtype=np.uint8)].tolist() == [[1, 0], [255, 255]]


@pytest.mark.parametrize(
    ("renames", "words"),
    [
        ({"bilding": "building"}, ["'bilding'", "the data set", "Did you mean 'building'?"]),
        ({"wall": "biulding"}, ["'biulding'", "the run's classes", "Did you mean 'building'?"]),
        ({"xyz": "building"}, ["'xyz'", "the data set", "wall, building"]),
    ],
)
def test_a_rename_of_an_unknown_name_is_refused_with_the_nearest(renames, words):
    with pytest.raises(ValueError, match="label_map names") as caught:
        id_map(["wall", "building"], ["building", "sky"], renames)
    for word in words:
        assert word in str(caught.value)


def test_no_shared_class_is_refused():
    with pytest.raises(ValueError, match=r"no class is shared.* cat, dog; .* road, sky\. Set label_map"):
        id_map(["cat", "dog"], ["road", "sky"], {})


def test_256_classes_do_not_fit_beside_the_ignored_id():
    names = [f"k{index}" for index in range(256)]
    assert id_map(names[:255], names[:255], {})[:255].tolist() == list(range(255))
    assert id_map(names, names[:255], {})[255] == IGNORE_INDEX
    with pytest.raises(ValueError, match="at most 255 classes, got 256: label maps have 8 bits, and 255 is"):
        id_map(names, names, {})


# --------------------------------------------------------------------------------------------------------- colours


def test_known_classes_keep_their_color_in_any_order():
    colors = palette(["sky", "road"])
    assert colors.dtype == np.uint8
    assert colors.tolist() == [[70, 130, 180], [128, 64, 128]]


def test_unknown_classes_get_colors_of_their_own():
    colors = palette([f"class {number}" for number in range(12)])
    assert colors.shape == (12, 3)
    assert len({tuple(color) for color in colors.tolist()}) == 12
