import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor

from t2sda_hf.data.transforms import resize_labels
from t2sda_hf.evaluation.inference import to_pixel_values
from t2sda_hf.models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor
from t2sda_hf.models.image_processing_t2sda import keep_ratio_size

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def slow_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """OpenCV's bilinear resize by its definition: pixel centres aligned, borders repeated, four neighbours only."""
    result = np.zeros((height, width, image.shape[2]))
    for row, column in np.ndindex(height, width):
        y = np.clip((row + 0.5) * image.shape[0] / height - 0.5, 0, image.shape[0] - 1)
        x = np.clip((column + 0.5) * image.shape[1] / width - 0.5, 0, image.shape[1] - 1)
        top, left = math.floor(y), math.floor(x)
        bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
        above = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
        below = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
        result[row, column] = above * (1 - y + top) + below * (y - top)
    return result


def pixels_of(processor: T2SDAImageProcessor, image, **settings) -> np.ndarray:
    """(h,w,3) before normalisation, on the scale of the image."""
    values = processor(image, do_rescale=False, do_normalize=False, **settings)["pixel_values"][0]
    return values.transpose(1, 2, 0)


# Values


def test_normalisation_by_hand():
    """(value / 255 - mean) / std with ImageNet's statistics, which are 123.675, ... and 58.395, ... on 0..255."""
    image = np.array([[[0, 0, 0], [255, 255, 255], [124, 116, 104]]], dtype=np.uint8)

    values = T2SDAImageProcessor()(image, return_tensors="pt")["pixel_values"]

    assert values.dtype == torch.float32
    assert values.shape == (1, 3, 1, 3)
    expected = (image.astype(np.float64) - (123.675, 116.28, 103.53)) / (58.395, 57.12, 57.375)
    np.testing.assert_allclose(values[0].permute(1, 2, 0), expected, rtol=1e-5, atol=1e-6)
    assert values[0, :, 0, 0].tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])


def test_each_step_can_be_left_out_or_changed():
    image = random_image(5, 7)
    scaled = image.transpose(2, 0, 1) / 255

    def values(**settings) -> np.ndarray:
        return T2SDAImageProcessor(**settings)(image)["pixel_values"][0]

    np.testing.assert_array_equal(values(do_rescale=False, do_normalize=False), image.transpose(2, 0, 1))
    np.testing.assert_allclose(values(do_normalize=False), scaled, rtol=1e-6)
    np.testing.assert_allclose(values(do_normalize=False, rescale_factor=2.0), 2.0 * image.transpose(2, 0, 1))
    own = values(image_mean=(0.5, 0.25, 0.0), image_std=[2.0, 4.0, 1.0])
    np.testing.assert_allclose(
        own, np.stack([(scaled[0] - 0.5) / 2, (scaled[1] - 0.25) / 4, scaled[2]]), rtol=1e-5, atol=1e-6
    )


def test_every_kind_of_image_gives_the_same_pixels():
    image = random_image(9, 12)
    processor = T2SDAImageProcessor(size=(6, 8))
    expected = processor(image, return_tensors="pt")["pixel_values"]
    channels_first = image.transpose(2, 0, 1)

    for same in (
        Image.fromarray(image),
        Image.fromarray(image).convert("RGBA"),
        channels_first,
        torch.from_numpy(image),
        torch.from_numpy(channels_first.copy()),
        [image],
        image[None],
    ):
        assert torch.equal(processor(same, return_tensors="pt")["pixel_values"], expected)


def test_grey_and_palette_pictures_become_rgb():
    grey = Image.fromarray(np.array([[0, 100], [200, 255]], dtype=np.uint8))
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], dtype=np.uint8))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    processor = T2SDAImageProcessor()

    assert pixels_of(processor, grey).tolist() == [[[0] * 3, [100] * 3], [[200] * 3, [255] * 3]]
    assert pixels_of(processor, palette).tolist() == [[[10, 20, 30], [40, 50, 60]], [[40, 50, 60], [10, 20, 30]]]


def test_floats_in_0_to_1_are_taken_with_rescaling_off():
    image = random_image(4, 6)
    processor = T2SDAImageProcessor()

    values = processor((image / 255).astype(np.float32), do_rescale=False)["pixel_values"][0]

    np.testing.assert_allclose(values, processor(image)["pixel_values"][0], rtol=1e-5, atol=1e-6)


def test_the_image_is_left_as_it_was():
    image = random_image(8, 8)
    tensor = torch.from_numpy(image.copy()).float().requires_grad_()
    T2SDAImageProcessor(size=(4, 4))([image])
    T2SDAImageProcessor()(tensor)

    assert np.array_equal(image, random_image(8, 8))
    assert np.array_equal(tensor.detach(), image)


# Sizes


@pytest.mark.parametrize("new", [(4, 6), (5, 9), (20, 33), (9, 14), (1, 1), (13, 3)])
def test_resizing_is_bilinear_without_antialiasing(new):
    image = random_image(9, 14)

    floats = pixels_of(T2SDAImageProcessor(size=new), image.astype(np.float32))
    integers = pixels_of(T2SDAImageProcessor(size=new), image)

    expected = slow_resize(image, *new)
    assert floats.shape == (*new, 3)
    np.testing.assert_allclose(floats, expected, atol=1e-3)
    np.testing.assert_array_equal(integers, integers.round())
    assert np.abs(integers - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("size", [None, (6, 8), (20, 33)])
def test_pixels_and_labels_are_those_of_training_and_evaluation(size):
    """Which prepare their images elsewhere. `pipeline` and the demo must not show the network other pictures."""
    image, labels = random_image(9, 14), np.random.default_rng(1).integers(0, 19, (9, 14)).astype(np.uint8)

    inputs = T2SDAImageProcessor(size=size)(image, labels, return_tensors="pt")

    torch.testing.assert_close(inputs["pixel_values"], to_pixel_values(image, size, torch.device("cpu")))
    assert np.array_equal(inputs["labels"][0], resize_labels(labels, size or (9, 14)))


def test_halving_averages_four_pixels_and_no_more():
    """A line of one pixel keeps half of its brightness; a filter as wide as PIL's would smear it over two rows."""
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[3] = 200

    small = pixels_of(T2SDAImageProcessor(size=(4, 4)), image)

    assert small[:, 0, 0].tolist() == [0, 100, 0, 0]


def test_an_image_of_the_wanted_size_and_one_without_a_size_keep_their_pixels():
    image = random_image(6, 10)

    assert np.array_equal(pixels_of(T2SDAImageProcessor(), image), image)
    assert np.array_equal(pixels_of(T2SDAImageProcessor(size=(6, 10)), image), image)
    assert np.array_equal(pixels_of(T2SDAImageProcessor(size=(4, 4)), image, size=None), image)


@pytest.mark.parametrize(
    ("size", "target", "expected"),
    [
        # method 3.4, as (height, width)
        ((1052, 1914), (720, 1280), (704, 1280)),
        ((1046, 1914), (720, 1280), (700, 1280)),
        ((1052, 1914), (1440, 2560), (1407, 2560)),
        ((1046, 1914), (1440, 2560), (1399, 2560)),
        ((1024, 2048), (512, 1024), (512, 1024)),
        ((760, 1280), (760, 1280), (760, 1280)),
        # an upright image fits into the target turned round
        ((2048, 1024), (512, 1024), (1024, 512)),
        # 5 * 0.5 = 2.5: halves go up
        ((5, 10), (4, 5), (3, 5)),
        ((1, 1000), (10, 100), (1, 100)),
    ],
)
def test_keep_ratio(size, target, expected):
    assert keep_ratio_size(size, target) == expected


def test_the_two_resize_rules():
    image = random_image(20, 40)
    labels = np.zeros((20, 40), dtype=np.uint8)

    for rule, expected in (("exact", (12, 16)), ("keep_ratio", (8, 16))):
        inputs = T2SDAImageProcessor(size=(12, 16), resize=rule)(image, labels, return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, *expected)
        assert inputs["labels"].shape == (1, *expected)
        np.testing.assert_allclose(
            pixels_of(T2SDAImageProcessor(size=(12, 16), resize=rule), image), slow_resize(image, *expected), atol=0.51
        )


@pytest.mark.parametrize("size", [{"height": 6, "width": 8}, (6, 8), [6, 8]])
def test_ways_to_write_a_size(size):
    assert T2SDAImageProcessor(size=size).size == {"height": 6, "width": 8}
    assert T2SDAImageProcessor(size=8).size == {"height": 8, "width": 8}


# Label maps


@pytest.mark.parametrize("new", [(4, 6), (5, 9), (20, 33), (9, 14)])
def test_labels_take_the_pixel_at_the_floor(new):
    labels = np.random.default_rng(1).choice([0, 1, 18, 255], (9, 14)).astype(np.uint8)

    resized = T2SDAImageProcessor(size=new)(random_image(9, 14), labels, return_tensors="pt")["labels"]

    assert resized.dtype == torch.int64
    expected = [[labels[row * 9 // new[0], column * 14 // new[1]] for column in range(new[1])] for row in range(new[0])]
    assert resized[0].tolist() == np.array(expected).tolist()


def test_every_kind_of_label_map_gives_the_same_ids():
    """A picture in mode P holds ids as indices of its palette; ids above 255 are ids too."""
    labels = np.random.default_rng(1).integers(0, 19, (9, 14)).astype(np.uint8)
    picture = Image.fromarray(labels)
    picture.putpalette(list(range(255, 0, -1)))
    assert picture.mode == "P"
    image = random_image(9, 14)

    for same in (labels, labels.astype(np.int64), torch.from_numpy(labels), Image.fromarray(labels), picture):
        ids = T2SDAImageProcessor()(image, same)["labels"][0]
        assert ids.dtype == np.int64
        assert np.array_equal(ids, labels)
    assert T2SDAImageProcessor()(image, np.full((9, 14), 33_000))["labels"][0].max() == 33_000


# Batches


def test_a_batch_is_its_images_in_order():
    images = [random_image(9, 12, seed) for seed in range(3)]
    labels = [np.full((9, 12), seed) for seed in range(3)]
    processor = T2SDAImageProcessor(size=(6, 8))

    together = processor(images, labels, return_tensors="pt")
    stacked = processor(np.stack(images), np.stack(labels), return_tensors="np")

    assert together["pixel_values"].shape == (3, 3, 6, 8)
    for index in range(3):
        alone = processor(images[index], labels[index], return_tensors="pt")
        assert torch.equal(together["pixel_values"][index], alone["pixel_values"][0])
        assert together["labels"][index].unique().tolist() == [index]
    assert np.array_equal(stacked["pixel_values"], together["pixel_values"])
    assert np.array_equal(stacked["labels"], together["labels"])


def test_images_of_several_sizes_come_as_lists_or_resized():
    images = [random_image(9, 12), random_image(6, 5)]

    assert [one.shape for one in T2SDAImageProcessor()(images)["pixel_values"]] == [(3, 9, 12), (3, 6, 5)]
    assert T2SDAImageProcessor(size=(4, 4))(images, return_tensors="pt")["pixel_values"].shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"sizes \[\(6, 5\), \(9, 12\)\] cannot be stacked"):
        T2SDAImageProcessor()(images, return_tensors="pt")


def test_settings_of_one_call_do_not_stay():
    processor = T2SDAImageProcessor(size=(6, 8))
    image = random_image(9, 12)
    before = processor(image, return_tensors="pt")["pixel_values"]

    other = processor(image, size=(3, 4), resize="keep_ratio", do_normalize=False, return_tensors="pt")

    assert other["pixel_values"].shape == (1, 3, 3, 4)
    assert 0 <= other["pixel_values"].min() <= other["pixel_values"].max() <= 1
    assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], before)


# Files


def test_a_saved_processor_comes_back_and_does_the_same(tmp_path):
    settings = {
        "size": {"height": 6, "width": 10},
        "resize": "keep_ratio",
        "do_rescale": True,
        "rescale_factor": 1 / 127,
        "do_normalize": True,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1.0, 2.0, 3.0],
    }
    processor = T2SDAImageProcessor(**settings)
    processor.save_pretrained(tmp_path)
    image = random_image(9, 12)

    for loaded in (T2SDAImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is T2SDAImageProcessor
        assert {name: getattr(loaded, name) for name in settings} == settings
        assert np.array_equal(loaded(image)["pixel_values"][0], processor(image)["pixel_values"][0])


def test_a_processor_without_a_size_comes_back_without(tmp_path):
    T2SDAImageProcessor().save_pretrained(tmp_path)

    loaded = T2SDAImageProcessor.from_pretrained(tmp_path)

    assert loaded.size is None
    assert (loaded.image_mean, loaded.image_std) == (list(MEAN), list(STD))


def test_overrides_of_from_pretrained_are_checked(tmp_path):
    T2SDAImageProcessor(size=(6, 8)).save_pretrained(tmp_path)

    assert T2SDAImageProcessor.from_pretrained(tmp_path, size=(3, 4)).size == {"height": 3, "width": 4}
    with pytest.raises(ValueError, match="resize must be one of exact, keep_ratio; got 'pad'"):
        T2SDAImageProcessor.from_pretrained(tmp_path, resize="pad")


# Label maps out of logits


def test_the_decision_by_hand():
    """Logits (0, 3) and (2, 0): at four pixels the shares of the second are 0, 1/4, 3/4, 1, so 2.25 beats 0.5, and
    0.75 loses to 1.5."""
    logits = torch.tensor([[[[0.0, 3.0]], [[2.0, 0.0]]]])

    (labels,) = T2SDAImageProcessor().post_process_semantic_segmentation(
        SimpleNamespace(logits=logits), target_sizes=[(1, 4)]
    )

    assert labels.dtype == torch.int64
    assert labels.tolist() == [[1, 1, 0, 0]]


def test_label_maps_are_the_argmax_of_the_upsampled_logits():
    """Upsampling comes first: labels that are upsampled afterwards have the steps of the small map."""
    logits = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))
    sizes = [(24, 32), (19, 45)]
    outputs = SimpleNamespace(logits=logits)
    processor = T2SDAImageProcessor()

    maps = processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)

    for one, labels, size in zip(logits, maps, sizes, strict=True):
        upsampled = slow_resize(one.permute(1, 2, 0).double().numpy(), *size)
        best_two = np.sort(upsampled, axis=2)[..., -2:]
        clear = best_two[..., 1] - best_two[..., 0] > 1e-5
        assert labels.shape == size
        assert clear.mean() > 0.99
        assert np.array_equal(labels.numpy()[clear], upsampled.argmax(2)[clear])
    again = processor.post_process_semantic_segmentation(outputs, target_sizes=torch.tensor(sizes))
    assert all(torch.equal(*pair) for pair in zip(maps, again, strict=True))


def test_without_sizes_the_decision_is_made_at_the_size_of_the_logits():
    logits = torch.randn(2, 5, 6, 8, generator=torch.Generator().manual_seed(0))

    maps = T2SDAImageProcessor().post_process_semantic_segmentation(SimpleNamespace(logits=logits))

    assert [one.tolist() for one in maps] == logits.argmax(1).tolist()


def test_from_pictures_to_label_maps_of_their_size(tiny):
    """What the README shows: prepare, run, decide."""
    torch.manual_seed(0)
    model = T2SDAForSemanticSegmentation(T2SDAConfig(**tiny, projector_dim=8, projector_hidden=8)).eval()
    pictures = [Image.fromarray(random_image(50, 81)), Image.fromarray(random_image(33, 47))]
    processor = T2SDAImageProcessor(size=(64, 96))

    with torch.no_grad():
        outputs = model(**processor(pictures, return_tensors="pt"))
    maps = processor.post_process_semantic_segmentation(outputs, [picture.size[::-1] for picture in pictures])

    assert [tuple(one.shape) for one in maps] == [(50, 81), (33, 47)]
    assert all(0 <= one.min() <= one.max() < 5 for one in maps)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resize": "pad"}, "resize must be one of exact, keep_ratio; got 'pad'"),
        ({"size": {"shortest_edge": 512}}, r"size must be .* or None; got \{'shortest_edge': 512\}"),
        ({"size": {"height": 512}}, "size must have"),
        ({"size": (0, 512)}, r"at least 1 pixel, or None; got \(0, 512\)"),
        ({"size": -1}, "at least 1 pixel, or None; got -1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        T2SDAImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        T2SDAImageProcessor()(random_image(4, 4), **settings)


@pytest.mark.parametrize("name", ["do_resize", "resample", "sise"])
def test_an_unknown_setting_is_named(name):
    """Settings of other processors would otherwise be dropped without a word."""
    with pytest.raises(ValueError, match=f"unknown settings {name}; there are size, resize, do_rescale"):
        T2SDAImageProcessor()(random_image(4, 4), **{name: True})


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((9, 12, 4), dtype=np.uint8), r"must be \(H,W,3\) or \(3,H,W\); got \(9, 12, 4\)"),
        (random_image(4, 4) / 255, r"already in \[0, 1\]: pass do_rescale=False"),
        (torch.rand(3, 4, 4), r"already in \[0, 1\]"),
    ],
)
def test_an_image_that_is_none(image, message):
    with pytest.raises(ValueError, match=message):
        T2SDAImageProcessor()(image)


def test_a_black_image_of_floats_may_be_on_either_scale():
    values = T2SDAImageProcessor()(np.zeros((4, 4, 3), dtype=np.float32))["pixel_values"][0]

    assert values[:, 0, 0] == pytest.approx([-mean / std for mean, std in zip(MEAN, STD, strict=True)])


@pytest.mark.parametrize(
    "maps",
    [
        np.zeros((9, 12), dtype=np.uint8),
        [np.zeros((9, 12), dtype=np.uint8), np.zeros((9, 11), dtype=np.uint8)],
        [Image.fromarray(random_image(9, 12))] * 2,
    ],
    ids=["one for two", "another size", "colours"],
)
def test_label_maps_that_do_not_fit_the_images(maps):
    with pytest.raises(ValueError, match=r"one \(H,W\) map of class ids per image, of the image's size; got maps"):
        T2SDAImageProcessor()([random_image(9, 12)] * 2, maps)


def test_target_sizes_for_another_number_of_images():
    outputs = SimpleNamespace(logits=torch.zeros(2, 5, 6, 8))

    with pytest.raises(ValueError, match="one per image: got 1 for 2 images"):
        T2SDAImageProcessor().post_process_semantic_segmentation(outputs, target_sizes=[(24, 32)])


def test_a_picture_of_16_bits_is_not_cut_to_white():
    with pytest.raises(ValueError, match="more than 8 bits per channel"):
        T2SDAImageProcessor()(Image.fromarray(np.full((32, 32), 4000, np.uint16)), return_tensors="pt")
