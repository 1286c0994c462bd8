"""Images in, normalised pixel values out; logits in, label maps of the original size out (method 3.4, 6.1)."""

import math
from collections.abc import Sequence
from typing import Any, TypedDict, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature, get_size_dict
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.utils import TensorType, logging

from .heads import upsample

logger = logging.get_logger(__name__)

RESIZE_RULES = ("exact", "keep_ratio")
Maps = TypeVar("Maps", np.ndarray, Tensor)


def sample_nearest(maps: Maps, size: tuple[int, int]) -> Maps:
    """Row ⌊i·H/h⌋, column ⌊j·W/w⌋ of (...,H,W) -> (...,h,w): OpenCV's and PyTorch's "nearest", for any type.

    Every label map that is brought to another size is sampled here, so that no two places can be a pixel apart.
    """
    (height, width), (old_height, old_width) = size, maps.shape[-2:]
    if isinstance(maps, Tensor):
        if height * (old_height // height) == old_height and width * (old_width // width) == old_width:
            return maps[..., :: old_height // height, :: old_width // width]
        rows = torch.arange(height, device=maps.device) * old_height // height
        columns = torch.arange(width, device=maps.device) * old_width // width
        return maps[..., rows[:, None], columns]
    return maps[..., (np.arange(height) * old_height // height)[:, None], np.arange(width) * old_width // width]


class T2SDAImageProcessorSettings(TypedDict, total=False):
    """The settings of `T2SDAImageProcessor`, for its constructor and, for one call, for `preprocess`."""

    size: dict[str, int] | tuple[int, int] | int | None
    resize: str
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: tuple[float, ...] | list[float]
    image_std: tuple[float, ...] | list[float]


class T2SDAImageProcessor(BaseImageProcessor):
    """Resize, rescale and normalise as in training; needs no torchvision.

    Images are resized as OpenCV does it: bilinear, pixel centres aligned, *no* antialiasing when shrinking, integer
    images rounded to integers. PIL, torchvision and transformers' own processors blur first, which changes the picture
    that a network sees. Label maps take the pixel at floor(index * old / new), OpenCV's "nearest"; ids are kept.

    Args:
        size: {"height": h, "width": w}, or (h, w). None keeps every image's own size.
        resize: "exact" stretches to `size`. "keep_ratio" fits into it, long side to long side and short to short
            (mmcv's rule, see `keep_ratio_size`): 1914 x 1052 pixels in 1280 x 720 become 1280 x 704.
        do_rescale: multiply by `rescale_factor`. Switch off for images that are already in [0, 1].
        rescale_factor: 1/255.
        do_normalize: subtract `image_mean` and divide by `image_std`, on the scale after rescaling. ImageNet's.
        kwargs: what else a saved processor's file holds.

    Raises:
        ValueError: for another resize rule, or a size without height and width.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 (transformers' contract)
    valid_kwargs = T2SDAImageProcessorSettings

    def __init__(
        self,
        size: dict[str, int] | tuple[int, int] | int | None = None,
        resize: str = "exact",
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if resize not in RESIZE_RULES:
            raise ValueError(f"resize must be one of {', '.join(RESIZE_RULES)}; got {resize!r}.")
        self.size = None if size is None else dict(get_size_dict(size))
        if self.size is not None and (set(self.size) != {"height", "width"} or min(self.size.values()) < 1):
            raise ValueError(f'size must be {{"height": h, "width": w}} of at least 1 pixel, or None; got {size}.')
        self.resize = resize
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)

    @property
    def padding_value(self) -> None:
        """None: images are not padded. A pipeline asks for it before it stacks images, and does not say what fails."""
        if self.size is None or self.resize == "keep_ratio":
            logger.warning_once(
                "This model keeps the sizes of images: a batch works if all of its images have the same size. For "
                "images of different sizes leave batch_size at 1, or set `image_processor.size` to "
                '{"height": h, "width": w} and `image_processor.resize` to "exact".'
            )
        return None

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: ImageInput | None = None,
        return_tensors: str | TensorType | None = None,
        **settings: Any,
    ) -> BatchFeature:
        """Prepare images, and label maps with them.

        Args:
            images: one image or a list of them, or a batch: PIL of any mode, or arrays or tensors (H,W,3) or (3,H,W).
                Values on the 0..255 scale, unless `do_rescale` is off.
            segmentation_maps: one map of class ids per image, (H,W) or PIL (mode P gives the indices).
            return_tensors: "pt" or "np" stack the batch. None returns lists of numpy arrays.
            settings: arguments of the constructor, for this call only.

        Returns:
            `pixel_values` (B,3,h,w) float32 and, with `segmentation_maps`, `labels` (B,h,w) int64.

        Raises:
            ValueError: if an image has no three channels, is already in [0, 1] although `do_rescale` is on, maps and
                images do not fit together, or a batch to stack has images of several sizes.
        """
        if settings:
            unknown = sorted(settings.keys() - T2SDAImageProcessorSettings.__annotations__.keys())
            if unknown:
                known = ", ".join(T2SDAImageProcessorSettings.__annotations__)
                raise ValueError(f"unknown settings {', '.join(unknown)}; there are {known}.")
            own = {name: self.__dict__[name] for name in T2SDAImageProcessorSettings.__annotations__}
            return type(self)(**(own | settings)).preprocess(images, segmentation_maps, return_tensors)

        pixels = [to_channels_first(image) for image in make_flat_list_of_images(images)]
        data: dict[str, list[np.ndarray]] = {"pixel_values": [self._prepare_image(image) for image in pixels]}
        if segmentation_maps is not None:
            maps = [np.asarray(one) for one in make_flat_list_of_images(segmentation_maps, expected_ndims=2)]
            if [one.shape for one in maps] != [tuple(image.shape[1:]) for image in pixels]:
                raise ValueError(
                    f"segmentation_maps must be one (H,W) map of class ids per image, of the image's size; got maps "
                    f"{[one.shape for one in maps]} for images {[tuple(image.shape[1:]) for image in pixels]}. "
                    f"Colour maps must be converted to ids first."
                )
            data["labels"] = [self._prepare_map(one) for one in maps]
        sizes = {image.shape[1:] for image in data["pixel_values"]}
        if return_tensors is not None and len(sizes) > 1:
            raise ValueError(
                f"images of the sizes {sorted(sizes)} cannot be stacked: pass them one by one, or give a size with "
                f'resize="exact".'
            )
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _target_size(self, height: int, width: int) -> tuple[int, int]:
        if self.size is None:
            return height, width
        target = (self.size["height"], self.size["width"])
        return target if self.resize == "exact" else keep_ratio_size((height, width), target)

    def _prepare_image(self, image: Tensor) -> np.ndarray:
        if self.do_rescale and image.is_floating_point() and 0 < image.max() <= 1:
            raise ValueError("an image of floats is already in [0, 1]: pass do_rescale=False, or values on 0..255.")
        size = self._target_size(*image.shape[1:])
        pixels = image.float()
        if tuple(image.shape[1:]) != size:
            pixels = F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False, antialias=False)[0]
            if not image.is_floating_point():
                pixels = pixels.round()
        if self.do_rescale:
            pixels = pixels * self.rescale_factor
        if self.do_normalize:
            mean, std = (torch.tensor(values)[:, None, None] for values in (self.image_mean, self.image_std))
            pixels = (pixels - mean) / std
        return pixels.numpy()

    def _prepare_map(self, labels: np.ndarray) -> np.ndarray:
        return sample_nearest(labels, self._target_size(*labels.shape)).astype(np.int64)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[Sequence[int]] | Tensor | None = None
    ) -> list[Tensor]:
        """The most likely class of every pixel.

        Args:
            outputs: the model's output; its `logits` (B,C,h,w) are read.
            target_sizes: (height, width) of every image before `preprocess`, to which the logits are upsampled before
                the decision: bilinear to the network's input size and from there to the image's, in the order of
                the published numbers. None decides at the size of the logits.

        Returns:
            B maps (H,W) int64.

        Raises:
            ValueError: if there is not one size per image.
        """
        logits = outputs.logits
        if target_sizes is None:
            return list(logits.argmax(dim=1))
        if len(target_sizes) != len(logits):
            raise ValueError(f"target_sizes must be one per image: got {len(target_sizes)} for {len(logits)} images.")
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        return [
            upsample(upsample(one[None], self._target_size(*size)), size)[0].argmax(dim=0)
            for one, size in zip(logits, sizes, strict=True)
        ]


def keep_ratio_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of an image of `size` fitted into `target`, which may lie the other way round.

    factor = min(long side of target / long side, short side of target / short side), and every side becomes
    floor(side * factor + 0.5), at least 1 (mmcv's rule; method 3.4).
    """
    factor = min(max(target) / max(size), min(target) / min(size))
    height, width = (max(math.floor(side * factor + 0.5), 1) for side in size)
    return height, width


def to_channels_first(image: Image.Image | np.ndarray | Tensor) -> Tensor:
    """One RGB image of any accepted kind -> (3,H,W), dtype kept.

    Raises:
        ValueError: if it has more than 8 bits per channel, or no three channels.
    """
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):  # a conversion would cut everything above 255 to white
            raise ValueError(f"an image has more than 8 bits per channel ({image.mode}): bring it to 8 first.")
        # Channels first already here: a picture of 3 rows would be taken for one.
        image = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    # A copy where it is needed: arrays of PIL images cannot be written to, and torch warns of that.
    pixels = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    if pixels.ndim != 3 or 3 not in (pixels.shape[0], pixels.shape[2]):
        raise ValueError(f"an image must be (H,W,3) or (3,H,W); got {tuple(pixels.shape)}. Convert it to RGB first.")
    return pixels if pixels.shape[0] == 3 else pixels.permute(2, 0, 1)


T2SDAImageProcessor.register_for_auto_class()
