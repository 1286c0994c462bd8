"""What travels to the objective, and how it is put on the device."""

from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from t2sda_hf.batch import UdaBatch, normalize


def loaded(**more: torch.Tensor) -> UdaBatch:
    return UdaBatch(
        source_images=torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 6),
        source_labels=torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1).expand(2, 4, 6),
        **more,
    )


def test_there_is_no_place_for_target_labels():
    assert {field.name for field in fields(UdaBatch)} == {
        "source_images",
        "source_labels",
        "target_images",
        "outer_source",
        "style_reference",
        "inner_corner",
        "target_valid",
        "redrawn",
        "shown",
    }


def test_a_batch_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        loaded().target_images = torch.zeros(1)


def test_images_become_floats_and_labels_whole_numbers():
    outer = torch.full((2, 3, 8, 12), 102, dtype=torch.uint8)
    batch = loaded(outer_source=outer, inner_corner=torch.tensor([[1, 2], [3, 4]])).on(torch.device("cpu"))
    assert batch.source_images[0, :, 0, 0].tolist() == pytest.approx([0, 0.2, 1])
    assert batch.outer_source.dtype == torch.float32
    assert batch.outer_source.unique().tolist() == pytest.approx([0.4])
    assert batch.source_labels.dtype == torch.int64
    assert batch.source_labels[:, 0, 0].tolist() == [0, 255]
    assert batch.inner_corner.tolist() == [[1, 2], [3, 4]]
    assert batch.target_images is None
    assert batch.style_reference is None


def test_the_crop_is_cut_out_of_each_window_at_its_corner():
    outer = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).view(2, 3, 8, 12)
    batch = loaded(inner_corner=torch.tensor([[0, 6], [4, 1]]))
    cropped = batch.crop_inner(outer)
    assert torch.equal(cropped[0], outer[0, :, 0:4, 6:12])
    assert torch.equal(cropped[1], outer[1, :, 4:8, 1:7])


def test_without_a_corner_the_window_is_the_crop():
    images = torch.rand(2, 3, 4, 6)
    assert loaded().crop_inner(images) is images


def test_normalisation_is_that_of_the_specification_on_grey_levels():
    images = torch.rand(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    mean, deviation = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    expected = (images * 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
    torch.testing.assert_close(normalize(images), expected)
