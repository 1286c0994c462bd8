from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_config
from torch import nn

from t2sda_hf.batch import IMAGE_MEAN, IMAGE_STD
from t2sda_hf.data.transforms import resize_image
from t2sda_hf.evaluation.inference import MIN_SIDE, load_model, predict, predict_labels, predict_logits, to_pixel_values
from t2sda_hf.training.build import build_student
from t2sda_hf.translate.generator import load_translator


class QuarterResolution(nn.Module):
    """Random convolution to a quarter of the input; refuses what real encoders cannot take; keeps what it saw."""

    def __init__(self, num_classes=5):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, 3, 7, 7, generator=generator))
        self.seen = []

    def forward(self, pixel_values):
        assert min(pixel_values.shape[-2:]) >= MIN_SIDE
        self.seen.append(tuple(pixel_values.shape[-2:]))
        return SimpleNamespace(logits=F.conv2d(pixel_values, self.weight, stride=4, padding=3))


class PixelIdentity(nn.Module):
    """Logits are the input: each pixel is judged alone, so windows must not change anything."""

    def forward(self, pixel_values):
        return SimpleNamespace(logits=pixel_values)


def random_images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def upsample(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def slow_sliding_window(model, pixel_values, window, stride):
    """One row and column of windows after the other until the border is reached, shifted back if it is crossed."""
    height, width = pixel_values.shape[-2:]
    total, count = 0, torch.zeros(height, width)
    top = 0
    while True:
        bottom = min(top + window[0], height)
        left = 0
        while True:
            right = min(left + window[1], width)
            box = (max(bottom - window[0], 0), bottom, max(right - window[1], 0), right)
            crop = pixel_values[:, :, box[0] : box[1], box[2] : box[3]]
            logits = upsample(model(crop).logits, crop.shape[-2:])
            total = total + F.pad(logits, (box[2], width - box[3], box[0], height - box[1]))
            count[box[0] : box[1], box[2] : box[3]] += 1
            if right == width:
                break
            left += stride[1]
        if bottom == height:
            break
        top += stride[0]
    return total / count


def test_whole_mode_is_one_forward_pass_and_one_bilinear_upsampling():
    model, images = QuarterResolution(), random_images(2, 3, 48, 70)

    logits = predict_logits(model, images)

    assert model.seen == [(48, 70)]
    assert not logits.requires_grad
    torch.testing.assert_close(logits, upsample(model(images).logits, (48, 70)), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("size", "window", "stride"),
    [((64, 128), (64, 64), (64, 32)), ((70, 101), (40, 48), (30, 48)), ((33, 90), (64, 50), (64, 17))],
)
def test_slide_mode_equals_the_slow_sliding_window(size, window, stride):
    model, images = QuarterResolution(), random_images(2, 3, *size)

    logits = predict_logits(model, images, "slide", window, stride)

    with torch.no_grad():
        torch.testing.assert_close(logits, slow_sliding_window(model, images, window, stride))


def test_cityscapes_size_needs_three_windows():
    model = QuarterResolution(2)

    predict_logits(model, random_images(1, 3, 128, 256), "slide", (128, 128), (64, 64))

    assert model.seen == [(128, 128)] * 3


def test_windows_do_not_change_a_model_that_judges_each_pixel_alone():
    images = random_images(1, 3, 50, 77)
    torch.testing.assert_close(predict_logits(PixelIdentity(), images, "slide", (32, 40), (20, 13)), images)


def test_image_that_fits_into_the_window_is_run_whole():
    model, images = QuarterResolution(), random_images(1, 3, 40, 50)

    logits = predict_logits(model, images, "slide", (40, 64), (20, 32))

    assert model.seen == [(40, 50)]
    torch.testing.assert_close(logits, predict_logits(model, images), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 100), (40, 3), (31, 32)])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_tiny_images_are_enlarged_for_the_network_and_come_back_in_their_size(size, mode):
    model, images = QuarterResolution(), random_images(1, 3, *size)

    logits = predict_logits(model, images, mode, (20, 20), (20, 20))
    labels = predict_labels(model, images, size, mode, (20, 20), (20, 20))

    assert logits.shape == (1, 5, *size)
    assert labels.shape == (1, *size)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("size", [(48, 70), (128, 256), (129, 211), (31, 17), (1, 1)])
@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_labels_equal_the_argmax_of_both_full_upsamplings(size, mode):
    model, images = QuarterResolution(), random_images(2, 3, 48, 70)

    labels = predict_labels(model, images, size, mode, (32, 40), (16, 20))

    logits = predict_logits(model, images, mode, (32, 40), (16, 20))
    assert labels.dtype == torch.uint8
    torch.testing.assert_close(labels, upsample(logits, size).argmax(1).to(torch.uint8), rtol=0, atol=0)


def test_upsampling_goes_through_the_input_size_and_not_directly_to_the_output():
    model, images, size = QuarterResolution(), random_images(1, 3, 44, 60), (100, 201)

    labels = predict_labels(model, images, size)

    with torch.no_grad():
        directly = upsample(model(images).logits, size).argmax(1)
    assert (labels != directly).any()


def test_first_of_equal_scores_wins():
    labels = predict_labels(PixelIdentity(), torch.zeros(1, 3, 32, 32), (40, 40))
    assert not labels.any()


def test_half_precision_logits_are_compared_in_single_precision():
    class Half(nn.Module):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=pixel_values.bfloat16())

    assert predict_logits(Half(), random_images(1, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "sliding"}, "mode must be 'whole' or 'slide', got 'sliding'"),
        ({"mode": "slide"}, "needs window and stride"),
        ({"mode": "slide", "window": (32, 32), "stride": (32, 33)}, r"at most the window \(32, 32\).*got \(32, 33\)"),
        ({"mode": "slide", "window": (32, 32), "stride": (0, 8)}, "stride must be positive"),
    ],
)
def test_impossible_windows_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        predict_logits(PixelIdentity(), torch.zeros(1, 3, 64, 64), **arguments)


def test_more_classes_than_a_byte_can_name_are_refused():
    class Many(nn.Module):
        def forward(self, pixel_values):
            return SimpleNamespace(logits=pixel_values.new_zeros(1, 256, 8, 8))

    with pytest.raises(ValueError, match="at most 255 classes; it has 256"):
        predict_labels(Many(), torch.zeros(1, 3, 32, 32), (32, 32))


def test_pixel_values_are_normalised_rgb_in_the_requested_size():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    image.flags.writeable = False  # as images decoded by Pillow are

    same = to_pixel_values(image, None, torch.device("cpu"))
    smaller = to_pixel_values(image, (10, 20), torch.device("cpu"))

    by_hand = (image[3, 4] / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    np.testing.assert_allclose(same[0, :, 3, 4].numpy(), by_hand, rtol=1e-5, atol=1e-6)
    assert same.shape == (1, 3, 20, 30)
    torch.testing.assert_close(
        smaller, to_pixel_values(resize_image(image.copy(), (10, 20)), None, torch.device("cpu"))
    )


@pytest.mark.parametrize("mode", ["whole", "slide"])
@pytest.mark.parametrize("size", [(48, 70), (61, 90)])
def test_confidence_is_the_probability_of_the_chosen_class(mode, size):
    model, images = QuarterResolution(), random_images(2, 3, 48, 70)

    seen = predict(model, images, size, mode, (32, 40), (16, 20), confidence=True)

    probabilities = upsample(predict_logits(model, images, mode, (32, 40), (16, 20)), size).softmax(1)
    torch.testing.assert_close(seen.confidence, probabilities.amax(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.labels, predict_labels(model, images, size, mode, (32, 40), (16, 20)))
    assert predict(model, images, size).confidence is None


def test_confidence_of_equal_scores_is_one_over_the_number_of_classes():
    seen = predict(PixelIdentity(), torch.zeros(1, 3, 32, 32), (32, 32), confidence=True)
    torch.testing.assert_close(seen.confidence, torch.full((1, 32, 32), 1 / 3))


@pytest.mark.parametrize("size", [(3, 40), (40, 3), (3, 3)])
def test_an_image_of_three_rows_is_not_taken_for_channels(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)

    pixel_values = to_pixel_values(image, None, torch.device("cpu"))

    assert pixel_values.shape == (1, 3, *size)
    by_hand = (image[0, 1] / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    np.testing.assert_allclose(pixel_values[0, :, 0, 1].numpy(), by_hand, rtol=1e-5, atol=1e-6)


def test_windows_of_a_large_image_are_decided_in_strips():
    """Rows that no later window sees are done with: the sums of all rows are never held together."""
    model, images, largest = QuarterResolution(), random_images(1, 3, 320, 64), []
    plain = torch.zeros_like
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros_like", lambda like: largest.append(like.shape[-2]) or plain(like))
        predict(model, images, (320, 64), "slide", (64, 64), (32, 64))
    assert largest
    assert max(largest) <= 64


def test_weights_that_are_a_git_lfs_pointer_are_named(tmp_path):
    """Of a model, of an encoder to start from, and of a translator."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:7\nsize 1\n")
    cfg = tiny_config(f"--model.pretrained={tmp_path}")
    for load in (
        lambda: load_model(str(tmp_path)),
        lambda: build_student(cfg),
        lambda: load_translator(str(tmp_path), cfg.translate.trained.architecture),
    ):
        with pytest.raises(ValueError, match=r"model\.safetensors is a Git LFS pointer.*Run `git lfs pull`"):
            load()
