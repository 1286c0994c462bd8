"""Prediction for images of any size: the whole image at once, or in overlapping windows (method 6.1)."""

from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ImageProcessingMixin

from ..batch import normalize
from ..data.transforms import Size, resize_image
from ..models import T2SDAForSemanticSegmentation

# The encoder's coarsest stride. On fewer pixels its last levels have nothing left to convolve.
MIN_SIDE = 32

Mode = Literal["whole", "slide"]


class SegmentationModel(Protocol):
    """Anything whose output has `logits`: (B, 3, H, W) normalised pixels -> (B, K, h, w)."""

    def __call__(self, pixel_values: Tensor) -> Any: ...


def load_model(name_or_path: str) -> tuple[T2SDAForSemanticSegmentation, tuple[str, ...]]:
    """A trained model in eval mode on the CPU, and the names of its classes, position = class id.

    Args:
        name_or_path: a folder or a Hub id, of a T2S-DA model or of a plain SegFormer.

    Raises:
        ValueError: if there is no such model, or if it has no trained head.
    """
    loaded: Any
    try:
        loaded = T2SDAForSemanticSegmentation.from_pretrained(
            name_or_path, output_loading_info=True, dtype=torch.float32
        )
    except OSError as error:
        raise ValueError(f"cannot load a model from {name_or_path!r}: {str(error).splitlines()[0]}") from error
    model, info = loaded
    if any(name.startswith("decode_head.") for name in info["missing_keys"]):
        raise ValueError(f"{name_or_path!r} has no segmentation head: it is an encoder that still needs training.")
    return model.eval(), tuple(model.config.id2label[class_id] for class_id in range(model.config.num_labels))


def saved_image_size(name_or_path: str) -> Size | None:
    """Input size that the image processor beside a model states; None if it says that images keep theirs.

    Raises:
        ValueError: if there is no image processor, or if it makes other sizes of other images.
    """
    advice = "Give the network's input size instead: --image_size HEIGHT WIDTH."
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path)
    except OSError as error:
        raise ValueError(f"{name_or_path!r} has no image processor that states an input size. {advice}") from error
    size = processor.get("size")
    if size is None or not processor.get("do_resize", True):
        return None
    if not isinstance(size, dict) or set(size) != {"height", "width"} or processor.get("resize") == "keep_ratio":
        raise ValueError(f"the image processor of {name_or_path!r} does not state one height and width. {advice}")
    return size["height"], size["width"]


def to_pixel_values(image: np.ndarray, size: Size | None, device: torch.device) -> Tensor:
    """Prepare one image for the network.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: (height, width) of the network's input, reached bilinearly without antialias; None keeps the image's.
        device: where the network is.

    Returns:
        (1, 3, *size) float32 on `device`, normalised.
    """
    if size is not None and image.shape[:2] != size:
        image = resize_image(image.copy(), size)  # decoded files are read-only arrays, of which PyTorch warns
    images = torch.tensor(image, device=device).permute(2, 0, 1)[None].float() / 255
    return normalize(images)


@torch.no_grad()
def predict_logits(
    model: SegmentationModel,
    pixel_values: Tensor,
    mode: Mode = "whole",
    window: Size | None = None,
    stride: Size | None = None,
) -> Tensor:
    """Logits of every pixel of the network's input.

    "whole" runs the network once. "slide" runs it on windows, adds their upsampled logits and divides by the number
    of windows that saw the pixel; the last window of a row or column lies flush with the border, and an image that
    fits into one window is run whole. Logits are upsampled bilinearly with align_corners=False.

    Args:
        model: see `SegmentationModel`. Its mode is left alone: call `model.eval()` first.
        pixel_values: (B, 3, H, W) normalised, H and W >= 1. What is smaller than 32 pixels is enlarged for the network.
        mode: "whole" or "slide".
        window: (height, width) of a window. Only for "slide".
        stride: (vertical, horizontal) distance of windows, at most the window. Only for "slide".

    Returns:
        (B, K, H, W) float32, no gradient.

    Raises:
        ValueError: for another mode, or a window and stride that are missing, not positive or leave gaps.
    """
    size = _size(pixel_values)
    if mode == "whole":
        return _upsample(_raw_logits(model, pixel_values), size)
    window, stride = _checked_windows(mode, window, stride)
    if size[0] <= window[0] and size[1] <= window[1]:
        return _upsample(_raw_logits(model, pixel_values), size)
    tops, lefts = (_starts(*axis) for axis in zip(size, window, stride, strict=True))
    total: Tensor | None = None
    num_windows = pixel_values.new_zeros(size, dtype=torch.float32)
    for top in tops:
        for left in lefts:
            box = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            crop = pixel_values[box]
            logits = _upsample(_raw_logits(model, crop), _size(crop))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *size)
            total[box] += logits
            num_windows[box] += 1
    assert total is not None
    return total.div_(num_windows)


@torch.no_grad()
def predict_labels(
    model: SegmentationModel,
    pixel_values: Tensor,
    size: Size,
    mode: Mode = "whole",
    window: Size | None = None,
    stride: Size | None = None,
) -> Tensor:
    """Class of every pixel of the original image.

    Two bilinear steps, to the network's input size and from there to `size`, then argmax: the order of the published
    numbers. It works through the classes one by one with a running maximum, so that about 10 bytes per output pixel
    are held instead of 4 K, with the labels of the plain `argmax` exactly.

    Args:
        model, pixel_values, mode, window, stride: as in `predict_logits`; at most 256 classes.
        size: (height, width) of the output.

    Returns:
        (B, *size) uint8 class ids.

    Raises:
        ValueError: as `predict_logits`.
    """
    if mode == "whole":
        logits = _raw_logits(model, pixel_values)
    else:
        logits = predict_logits(model, pixel_values, mode, window, stride)
    if logits.shape[1] > 256:
        raise ValueError(f"labels are bytes, so the model may have at most 256 classes; it has {logits.shape[1]}.")
    labels = torch.zeros(len(logits), *size, dtype=torch.uint8, device=logits.device)
    best: Tensor | None = None
    for class_id in range(logits.shape[1]):
        score = _upsample(_upsample(logits[:, class_id : class_id + 1], _size(pixel_values)), size)[:, 0]
        if best is None:
            best = score
        else:
            labels.masked_fill_(score > best, class_id)
            best = torch.maximum(best, score)
    return labels


def _raw_logits(model: SegmentationModel, pixel_values: Tensor) -> Tensor:
    height, width = _size(pixel_values)
    if min(height, width) < MIN_SIDE:
        pixel_values = _upsample(pixel_values, (max(height, MIN_SIDE), max(width, MIN_SIDE)))
    return model(pixel_values).logits.float()


def _upsample(maps: Tensor, size: Size) -> Tensor:
    if _size(maps) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def _size(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]


def _starts(length: int, window: int, stride: int) -> list[int]:
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def _checked_windows(mode: str, window: Size | None, stride: Size | None) -> tuple[Size, Size]:
    if mode != "slide":
        raise ValueError(f"mode must be 'whole' or 'slide', got {mode!r}.")
    if window is None or stride is None:
        raise ValueError(f"mode 'slide' needs window and stride (height, width), got {window} and {stride}.")
    if min(*window, *stride) < 1 or stride[0] > window[0] or stride[1] > window[1]:
        raise ValueError(f"stride must be positive and at most the window {window}, to miss no pixel; got {stride}.")
    return window, stride
