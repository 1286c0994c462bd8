"""Geometry for image and labels together, on (H,W,3) uint8 and (H,W) uint8 arrays (method 3.4)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from ..labels import IGNORE_INDEX
from ..models.image_processing_t2sda import keep_ratio_size, sample_nearest

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class KeepRatio:
    """What images of every shape are fitted into, see `keep_ratio_size`."""

    size: Size


InputSize = Size | KeepRatio | None  # of a network: one for all images, one for the shape of each, or the image's own
PADDING_COLOR = (124, 116, 104)  # ImageNet's mean, which normalises to about 0


def sized(size: Size | np.ndarray) -> str:
    """How messages write a size."""
    return f"{size[0]}x{size[1]}"


def resized_size(size: Size, wanted: Size, mode: Literal["keep_ratio", "exact"]) -> Size:
    """Size after resizing; see `keep_ratio_size`, by which GTA5's 1914x1052 asked for 1280x720 becomes 1280x704."""
    return wanted if mode == "exact" else keep_ratio_size(size, wanted)


def resize_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Bilinear without antialiasing (OpenCV's INTER_LINEAR), (H,W,3) uint8 -> (h,w,3) uint8."""
    if image.shape[:2] == size:
        return image
    channels_last = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2).float()
    resized = F.interpolate(channels_last, size=size, mode="bilinear", align_corners=False, antialias=False)
    return resized[0].round().byte().permute(1, 2, 0).contiguous().numpy()


def resize_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """Nearest neighbour, output row i from input row ⌊i·H/h⌋ (OpenCV's INTER_NEAREST), (H,W) -> (h,w)."""
    return labels if labels.shape == size else sample_nearest(labels, size)


def pad_image(image: np.ndarray, size: Size) -> np.ndarray:
    """Fill up below and to the right with the mean colour if a side is smaller than `size`."""
    missing = [max(wanted - side, 0) for wanted, side in zip(size, image.shape, strict=False)]
    if not any(missing):
        return image
    padded = np.empty((image.shape[0] + missing[0], image.shape[1] + missing[1], 3), np.uint8)
    padded[:] = PADDING_COLOR
    padded[: image.shape[0], : image.shape[1]] = image
    return padded


def pad_labels(labels: np.ndarray, size: Size) -> np.ndarray:
    """The same for labels, with ignored pixels."""
    missing = [max(wanted - side, 0) for wanted, side in zip(size, labels.shape, strict=True)]
    return np.pad(labels, ((0, missing[0]), (0, missing[1])), constant_values=IGNORE_INDEX) if any(missing) else labels


@dataclass(frozen=True)
class Window:
    """A rectangle of an image; `of` cuts it out of any array whose first two axes are height and width."""

    top: int
    left: int
    height: int
    width: int

    def of(self, array: np.ndarray) -> np.ndarray:
        return array[self.top : self.top + self.height, self.left : self.left + self.width]

    def inside(self, inner: "Window") -> "Window":
        """A window given relative to this one, in the coordinates of the image."""
        return Window(self.top + inner.top, self.left + inner.left, inner.height, inner.width)


def random_window(size: Size, window: Size, rng: np.random.Generator, multiple: int = 1) -> Window:
    """A uniformly placed window (every offset, the last included) inside an image of `size`, which must hold it.

    Offsets are rounded down to a `multiple`.
    """
    top, left = (int(rng.integers(side - extent + 1)) for side, extent in zip(size, window, strict=True))
    return Window(top - top % multiple, left - left % multiple, *window)


def shows_several_classes(labels: np.ndarray, max_ratio: float) -> bool:
    """More than one class, and none covers `max_ratio` or more of the pixels that are not ignored."""
    counts = np.bincount(labels.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
    return bool((counts > 0).sum() > 1 and counts.max() < max_ratio * counts.sum())
