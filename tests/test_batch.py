"""What travels to the objective, and how it is put on the device."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import Generator

from t2sda_hf.batch import UdaBatch, normalize, one_ahead, sent_ahead
from t2sda_hf.errors import Stopped

CPU = torch.device("cpu")


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
        "from_target",  # which images were drawn from target_labelled: data that the user labelled to be learned
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


def numbered(count: int) -> list[UdaBatch]:
    random = Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 2, 3, 4, 6), generator=random).byte()
    return [UdaBatch(own, own[:, 0] % 5) for own in images]


def test_what_is_on_the_device_already_stays() -> None:
    (batch,) = numbered(1)
    once = batch.on(CPU)
    assert once.source_images.equal(batch.source_images / 255)
    twice = once.on(CPU)
    assert twice.source_images is once.source_images
    assert twice.source_labels is once.source_labels


def test_a_gpu_is_sent_the_next_batch_before_it_learns_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And waits for its copy before it reads it, without the host. The batches are those that a CPU gets."""
    said: list[str] = []

    class Stream:
        def __init__(self, device: object = None) -> None:
            self.device = device

        def record_event(self) -> int:
            return said.count("sent")

        def wait_event(self, event: int) -> None:
            said.append(f"waits for {event}")

    on = UdaBatch.on

    def sent(batch: UdaBatch, device: torch.device) -> UdaBatch:
        said.append("sent")
        return on(batch, CPU)

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    expected = list(sent_ahead(numbered(3), CPU))
    monkeypatch.setattr(UdaBatch, "on", sent)
    monkeypatch.setattr(UdaBatch, "used_by", lambda batch, stream: said.append("kept"))
    found = []
    for batch in sent_ahead(numbered(3), torch.device("cuda")):
        said.append("learned")
        found.append(batch)
    turns = [[f"waits for {number}", "kept", "learned"] for number in (1, 2, 3)]
    assert said == ["sent", "sent", *turns[0], "sent", *turns[1], *turns[2]]
    for one, other in zip(found, expected, strict=True):
        assert one.source_images.equal(other.source_images)
        assert one.source_labels.equal(other.source_labels)


def test_an_error_comes_in_its_turn_and_a_stop_at_once() -> None:
    def items(error: Exception) -> Iterator[int]:
        yield 1
        yield 2
        raise error

    for error, before in ((ValueError("cut"), [10, 20]), (Stopped(15), [10])):
        seen = []
        with pytest.raises(type(error)):
            seen.extend(one_ahead(items(error), lambda item: 10 * item))
        assert seen == before
    assert list(one_ahead([], lambda item: item)) == []
