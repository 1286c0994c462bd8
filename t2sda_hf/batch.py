"""What travels from the data to the objective. Images of the target have no field for labels, so none can leak."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .device import constant
from .errors import Ended

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)

_OF_HOST = ("inner_corner", "shown", "redrawn")  # what the host decides by


@dataclass(frozen=True)
class UdaBatch:
    """B labelled crops, of the source or of `target_labelled`, and B target crops without labels.

    Images are (B,3,H,W) RGB: uint8 from the loader, float in [0,1] after `on`. Outer window, style and corner are
    there only when the objective translates: FDA works on a larger window than the network sees (paper section 4.1).

    Attributes:
        source_images: (B,3,H,W).
        source_labels: (B,H,W) class ids, 255 ignored; int64 after `on`.
        target_images: (B,3,H,W), or None if the run has no target.
        outer_source: (B,3,Ho,Wo) the source window around the crop.
        style_reference: (B,3,Ho,Wo) the target image whose style is taken.
        inner_corner: (B,2) int64, top and left of the crop in the outer window.
        target_valid: (B,H,W) bool, False at target pixels whose pseudo-labels are never trusted; None trusts all.
        from_target: (B,) bool, which of the labelled crops show the target; None in a run that learns none of them.
        shown: (B,256) bool, the ids that occur in each of `source_labels`, 255 included.
        redrawn: what is wrong with images that could not be read, and in whose place others were drawn.

    The corner and what follows `from_target` stay on the host, which decides by them.
    """

    source_images: Tensor
    source_labels: Tensor
    target_images: Tensor | None = None
    outer_source: Tensor | None = None
    style_reference: Tensor | None = None
    inner_corner: Tensor | None = None
    target_valid: Tensor | None = None
    from_target: Tensor | None = None
    shown: Tensor | None = None
    redrawn: tuple[str, ...] = ()

    def on(self, device: torch.device) -> "UdaBatch":
        """The batch on `device`: uint8 crosses the bus, floats are made there. One that is there already stays."""
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in self._of_device()}
        moved["source_labels"] = moved["source_labels"].long()
        names = [name for name, value in moved.items() if value.dtype == torch.uint8 and value.ndim == 4]
        if names:
            floats = [torch.empty_like(moved[name], dtype=torch.float32) for name in names]
            torch._foreach_copy_(floats, [moved[name] for name in names])
            torch._foreach_div_(floats, 255)
            moved |= dict(zip(names, floats, strict=True))
        return replace(self, **moved, shown=self.ids_shown())

    def pin_memory(self) -> "UdaBatch":
        """The same in memory that a GPU reads by itself; for the loader."""
        pinned: dict[str, Any] = {name: value.pin_memory() for name, value in self._of_device()}
        return replace(self, **pinned)

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keep its memory until `stream` has done what it was asked so far; for a batch that another stream made."""
        for _, value in self._of_device():
            value.record_stream(stream)

    def _of_device(self) -> Iterator[tuple[str, Tensor]]:
        for name in (field.name for field in fields(self) if field.name not in _OF_HOST):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def ids_shown(self) -> Tensor:
        """`shown`, worked out if nobody has done so."""
        return shown_ids(self.source_labels).cpu() if self.shown is None else self.shown

    def crop_inner(self, outer_images: Tensor, shrunk: int = 1) -> Tensor:
        """Cut the crop of every sample out of images in the outer window.

        Args:
            outer_images: (B,3,Ho,Wo), or of a whole fraction of that size.
            shrunk: that fraction: 2 for half. The crop's corner and sides should divide by it.

        Returns:
            (B,3,H,W), or the same fraction of it.
        """
        if self.inner_corner is None:
            return outer_images
        height, width = (side // shrunk for side in self.source_images.shape[-2:])
        corners = (self.inner_corner // shrunk).tolist()
        return torch.stack(
            [
                image[:, top : top + height, left : left + width]
                for image, (top, left) in zip(outer_images, corners, strict=True)
            ]
        )


def sent_ahead(batches: Iterable[UdaBatch], device: torch.device) -> Iterator[UdaBatch]:
    """The same batches on `device`. A GPU copies each while it still learns from the one before it."""
    if device.type != "cuda":
        yield from (batch.on(device) for batch in batches)
        return
    beside = torch.cuda.Stream(device)

    def send(batch: UdaBatch) -> tuple[UdaBatch, torch.cuda.Event]:
        with torch.cuda.stream(beside):
            return batch.on(device), beside.record_event()

    for batch, sent in one_ahead(batches, send):
        learning = torch.cuda.current_stream(device)
        learning.wait_event(sent)  # the device waits, not the host
        batch.used_by(learning)
        yield batch


def one_ahead(items: Iterable[Item], prepare: Callable[[Item], Prepared]) -> Iterator[Prepared]:
    """`prepare` of every item, called before the item ahead of it is handed out.

    An error that stands for an item comes in its turn, not before: what is ahead of it can still be learned from. But
    an `Ended` comes at once, and so does the end of the device's memory.
    """
    waiting: list[Prepared] = []
    stream = iter(items)
    while True:
        late: Exception | None = None
        try:
            prepared = [prepare(item) for item in itertools.islice(stream, 1)]
        except (Ended, torch.OutOfMemoryError):
            raise
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            prepared, late = [], error
        yield from waiting
        if late is not None:
            raise late
        if not prepared:
            return
        waiting = prepared


def shown_ids(labels: Tensor) -> Tensor:
    """Which ids occur in each label map: (B,H,W) of any integer type -> (B,256) bool, on the device of the labels."""
    flat = labels.flatten(1).long()
    return torch.zeros(len(flat), 256, dtype=torch.bool, device=labels.device).scatter_(1, flat, True)


def normalize(images: Tensor) -> Tensor:
    """[0,1] RGB (B,3,H,W) -> what the network was pretrained on: minus ImageNet's mean, over its deviation."""
    scale = constant(tuple(1 / std for std in IMAGE_STD), images.device).view(1, 3, 1, 1)
    shift = constant(tuple(-mean / std for mean, std in zip(IMAGE_MEAN, IMAGE_STD, strict=True)), images.device)
    return torch.addcmul(shift.view(1, 3, 1, 1).to(images.dtype), images, scale.to(images.dtype))
