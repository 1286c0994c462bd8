"""Prediction for images of any size: the whole image at once, or in overlapping windows (method 6.1)."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, Literal, Protocol

import httpx2
import numpy as np
import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import get_session
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import ImageProcessingMixin, PreTrainedConfig
from transformers.utils import cached_file, logging

from ..data.transforms import InputSize, KeepRatio, Size
from ..errors import NotFinite, causes
from ..labels import IGNORE_INDEX
from ..listing import refuse_pointers
from ..models import T2SDAConfig, T2SDAForSemanticSegmentation, T2SDAImageProcessor
from ..models.heads import upsample
from ..models.modeling_t2sda import name_some
from ..models.pretrained import MEANINGLESS

# The encoder's coarsest stride. On fewer pixels its last levels have nothing left to convolve.
MIN_SIDE = 32

Mode = Literal["whole", "slide"]


class SegmentationModel(Protocol):
    """Anything whose output has `logits`: (B, 3, H, W) normalised pixels -> (B, K, h, w)."""

    def __call__(self, pixel_values: Tensor) -> Any: ...


@dataclass(frozen=True)
class Prediction:
    """What is seen in B images of one size.

    Attributes:
        labels: (B,H,W) uint8 class ids.
        confidence: (B,H,W) float32, the softmax probability of that class, in (0,1]; None if it was not asked for.
    """

    labels: Tensor
    confidence: Tensor | None


def load_model(name_or_path: str) -> tuple[T2SDAForSemanticSegmentation, tuple[str, ...]]:
    """A trained model in eval mode on the CPU, and the names of its classes, position = class id.

    Args:
        name_or_path: a folder or a Hub id, of a T2S-DA model or of a plain SegFormer.

    Raises:
        ValueError: in one sentence with the cure: if there is no such model, it may not be read, the Hub cannot be
            reached, it is of another architecture, its files are damaged, or it has no trained head.
    """
    loaded: Any
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would print a table; what is wrong raises below
    cached = _from_where(name_or_path)
    refuse_pointers(Path(name_or_path))
    try:
        config, _ = PreTrainedConfig.get_config_dict(name_or_path, **cached)
        model_type = config.get("model_type", "unknown")
        if model_type == "unknown" and (students := sorted(Path(name_or_path).glob("*/student"))):
            raise ValueError(
                f"{name_or_path!r} is the folder of a run. Give one of its models: {', '.join(map(str, students))}."
            )
        if model_type not in (T2SDAConfig.model_type, "segformer"):
            raise ValueError(
                f"{name_or_path!r} is a {model_type!r} model: give a T2S-DA model or a SegFormer, or load it with its "
                "own Auto class."
            )
        _refuse_larger(name_or_path, config, cached)
        loaded = T2SDAForSemanticSegmentation.from_pretrained(
            name_or_path, output_loading_info=True, dtype=torch.float32, **cached
        )
    except (OSError, RuntimeError, SafetensorError, httpx2.TransportError, *MEANINGLESS) as error:
        raise ValueError(_why_not_loaded(name_or_path, error)) from error
    finally:
        logging.set_verbosity(verbosity)
    _refuse_damage(name_or_path)
    model, info = loaded
    if any(name.startswith("decode_head.") for name in info["missing_keys"]):
        raise ValueError(f"{name_or_path!r} has no segmentation head: it is an encoder that still needs training.")
    broken = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(
            f"{name_or_path!r} holds weights that are NaN or infinite: {name_some(broken)}. It is damaged, or its "
            "training diverged. Take an earlier checkpoint, or train again with a lower optim.lr."
        )
    return model.eval(), tuple(model.config.id2label[class_id] for class_id in range(model.config.num_labels))


def saved_image_size(name_or_path: str) -> InputSize:
    """Input size that the image processor beside a model states; None if it says that images keep theirs.

    Raises:
        ValueError: if there is no image processor, or it states no height and width.
    """
    advice = "Give the network's input size instead: --image_size HEIGHT WIDTH."
    cached = _from_where(name_or_path)
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **cached)
    except OSError as error:
        raise ValueError(f"{name_or_path!r} has no image processor that states an input size. {advice}") from error
    size = processor.get("size")
    if size is None or not processor.get("do_resize", True):
        return None
    if not isinstance(size, dict) or set(size) != {"height", "width"}:
        raise ValueError(f"the image processor of {name_or_path!r} does not state one height and width. {advice}")
    stated = size["height"], size["width"]
    return KeepRatio(stated) if processor.get("resize") == "keep_ratio" else stated


def to_pixel_values(image: np.ndarray, size: InputSize, device: torch.device) -> Tensor:
    """Prepare one image for the network.

    Args:
        image: (H, W, 3) uint8 RGB.
        size: of the network's input, reached bilinearly without antialias; None keeps the image's.
        device: where the network is.

    Returns:
        (1, 3, height, width) float32 on `device`, normalised.
    """
    # The image processor itself, so that the pixels are those that others get from the saved one. Channels first: an
    # image of three rows would be taken for one. Copied, because decoded files are read-only arrays.
    channels_first = torch.from_numpy(image.transpose(2, 0, 1).copy())
    return processor_for(size)(channels_first, return_tensors="pt")["pixel_values"].to(device)


def processor_for(size: InputSize) -> T2SDAImageProcessor:
    """The image processor that brings images to this size."""
    if isinstance(size, KeepRatio):
        return T2SDAImageProcessor(size=size.size, resize="keep_ratio")
    return T2SDAImageProcessor(size=size)


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
        NotFinite: if a logit is NaN or infinite.
    """
    return torch.cat(list(_strips(model, pixel_values, mode, window, stride)), dim=2)


def predict_labels(
    model: SegmentationModel,
    pixel_values: Tensor,
    size: Size,
    mode: Mode = "whole",
    window: Size | None = None,
    stride: Size | None = None,
) -> Tensor:
    """The labels of `predict`: (B, *size) uint8 class ids."""
    return predict(model, pixel_values, size, mode, window, stride).labels


@torch.no_grad()
def predict(
    model: SegmentationModel,
    pixel_values: Tensor,
    size: Size,
    mode: Mode = "whole",
    window: Size | None = None,
    stride: Size | None = None,
    confidence: bool = False,
) -> Prediction:
    """Class of every pixel of the original image.

    Two bilinear steps, to the network's input size and from there to `size`, then argmax: the order of the published
    numbers. It works through the classes one by one with a running maximum, so that about 10 bytes per output pixel
    are held instead of 4 K, with the labels of the plain `argmax` exactly. In "slide" mode at the input's own size
    rows are decided as soon as the last window that sees them is done.

    Args:
        model, pixel_values, mode, window, stride: as in `predict_logits`; at most 255 classes.
        size: (height, width) of the output.
        confidence: also the probability of the class that was chosen.

    Raises:
        ValueError, NotFinite: as `predict_logits`.
    """
    if mode == "whole":
        return _decide(_raw_logits(model, pixel_values), _size(pixel_values), size, confidence)
    strips = _strips(model, pixel_values, mode, window, stride)
    if _size(pixel_values) == tuple(size):
        decided = [_decide(strip, _size(strip), _size(strip), confidence) for strip in strips]
        labels, sure = zip(*((one.labels, one.confidence) for one in decided), strict=True)
        return Prediction(torch.cat(labels, dim=1), torch.cat(sure, dim=1) if confidence else None)
    logits = torch.cat(list(strips), dim=2)
    return _decide(logits, _size(logits), size, confidence)


def _decide(logits: Tensor, through: Size, size: Size, confidence: bool) -> Prediction:
    """Argmax of logits that are upsampled to `through` and then to `size`, class by class."""
    if logits.shape[1] > IGNORE_INDEX:
        raise ValueError(
            f"labels are bytes, and {IGNORE_INDEX} is the ignored one, so a model may have at most {IGNORE_INDEX} "
            f"classes; it has {logits.shape[1]}."
        )
    labels = torch.zeros(len(logits), *size, dtype=torch.uint8, device=logits.device)
    best: Tensor | None = None
    total: Tensor | None = None  # Σ exp(score - best) over the classes so far
    for class_id in range(logits.shape[1]):
        score = upsample(upsample(logits[:, class_id : class_id + 1], through), size)[:, 0]
        if best is None:
            best = score
            total = torch.ones_like(score) if confidence else None
            continue
        labels.masked_fill_(score > best, class_id)
        higher = torch.maximum(best, score)
        if total is not None:
            total = total * (best - higher).exp() + (score - higher).exp()
        best = higher
    return Prediction(labels, None if total is None else 1 / total)


def _strips(
    model: SegmentationModel, pixel_values: Tensor, mode: Mode, window: Size | None, stride: Size | None
) -> Iterator[Tensor]:
    """The rows of `predict_logits` from top to bottom, (B,K,rows,W) each, as soon as no window will add to them."""
    size = _size(pixel_values)
    if mode == "whole":
        yield upsample(_raw_logits(model, pixel_values), size)
        return
    window, stride = _checked_windows(mode, window, stride)
    if size[0] <= window[0] and size[1] <= window[1]:
        yield upsample(_raw_logits(model, pixel_values), size)
        return
    tops, lefts = (_starts(*axis) for axis in zip(size, window, stride, strict=True))
    height = min(window[0], size[0])
    total: Tensor | None = None  # (B,K,height,W), the rows from `top` on
    num_windows = pixel_values.new_zeros(height, size[1], dtype=torch.float32)
    for top, next_top in zip(tops, [*tops[1:], size[0]], strict=True):
        for left in lefts:
            columns = slice(left, left + window[1])
            crop = pixel_values[..., top : top + window[0], columns]
            logits = upsample(_raw_logits(model, crop), _size(crop))
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], height, size[1])
            total[..., columns] += logits
            num_windows[:, columns] += 1
        assert total is not None
        done = next_top - top
        yield total[..., :done, :] / num_windows[:done]
        total = torch.cat([total[..., done:, :], torch.zeros_like(total[..., :done, :])], dim=2)
        num_windows = torch.cat([num_windows[done:], torch.zeros_like(num_windows[:done])])


def _raw_logits(model: SegmentationModel, pixel_values: Tensor) -> Tensor:
    height, width = _size(pixel_values)
    if min(height, width) < MIN_SIDE:
        pixel_values = upsample(pixel_values, (max(height, MIN_SIDE), max(width, MIN_SIDE)))
    logits = model(pixel_values).logits.float()
    if not torch.isfinite(logits).all():
        raise NotFinite(
            "what the network makes of it is NaN or infinite. Its weights are damaged, or their training diverged: "
            "take an earlier checkpoint, or train again with a lower optim.lr."
        )
    return logits


def needing_less(mode: str, window: Size | None) -> str:
    """Which keys to change where an image needs too much memory."""
    if mode == "whole":
        return "Set evaluation.mode slide, with evaluation.window and evaluation.stride, which takes less at once."
    return f"Lower evaluation.window {list(window or ())} and evaluation.stride."


def smaller_windows(size: Size, mode: Mode, window: Size | None) -> tuple[Size, Size] | None:
    """Window and stride for an image of `size` that needed too much memory: half the sides; None if they get too small.

    Windows overlap by a quarter.
    """
    sides = size if mode == "whole" or window is None else (min(size[0], window[0]), min(size[1], window[1]))
    half = (-(-sides[0] // 64) * 32, -(-sides[1] // 64) * 32)  # of multiples of 32, the encoder's coarsest stride
    if min(half) < 2 * MIN_SIDE or half[0] >= sides[0] or half[1] >= sides[1]:
        return None
    return half, (half[0] * 3 // 4, half[1] * 3 // 4)


@contextmanager
def naming(image: str) -> Iterator[None]:
    """Say at which image a `NotFinite` was met."""
    try:
        yield
    except NotFinite as error:
        raise NotFinite(f"{image}: {error}") from error


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


def _why_not_loaded(name: str, error: Exception) -> str:
    """One sentence, with the cure."""
    where = f"cannot load a model from {name!r}:"
    answers = [one.response.status_code for one in causes(error) if isinstance(one, HfHubHTTPError)]
    if answers and answers[-1] == 403:
        return f"{where} your token may not read it. Ask its owner, or give another token (hf auth login)."
    if answers and answers[-1] in (401, 404):
        return (
            f"{where} neither a folder here nor a model that the Hub shows to you. Check the spelling; for a private "
            "one run `hf auth login`."
        )
    if answers:
        return f"{where} the Hub answered with an error ({answers[-1]}). Try again later."
    if "mismatched_sizes" in str(error):
        return (
            f"{where} its weights have other shapes than its config.json says, which another number of classes does. "
            "Give the config that belongs to the weights."
        )
    if isinstance(error, MEANINGLESS):
        return f"{where} its config.json holds a value that means nothing ({' '.join(str(error).split())[:200]})."
    if not isinstance(error, OSError | httpx2.TransportError):
        return f"{where} its weights do not fit its config.json, or are damaged ({str(error).splitlines()[0]})."
    if Path(name).is_dir():
        return f"{where} {str(error).splitlines()[0]}"
    if constants.HF_HUB_OFFLINE:
        return f"{where} it is neither a folder nor among the downloaded models, and HF_HUB_OFFLINE is set."
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return f"{where} there is no such folder."
    return f"{where} it is no folder, and the Hub cannot be reached or broke off. Check the connection and HF_ENDPOINT."


def _from_where(name_or_path: str) -> dict[str, Any]:
    """For `from_pretrained`: the cache alone if the Hub does not answer.

    One request, without the minute of tries that huggingface_hub makes.
    """
    if Path(name_or_path).exists() or constants.HF_HUB_OFFLINE:
        return {}
    try:
        get_session().head(constants.ENDPOINT, timeout=2.5)
    except httpx2.TransportError:
        return {"local_files_only": True}
    return {}


def _refuse_larger(name: str, values: dict[str, Any], cached: dict[str, Any]) -> None:
    """ValueError if a config.json asks for a larger encoder than its weights are, which would be built in vain."""
    file = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False, **cached)
    if file is None:
        return
    with safe_open(file, framework="pt") as tensors:
        held = sum(math.prod(tensors.get_slice(one).get_shape()) for one in tensors.keys())  # noqa: SIM118 (no dict)
    with torch.device("meta"):
        encoder = T2SDAForSemanticSegmentation(T2SDAConfig.from_dict(values)).encoder
    asked = sum(parameter.numel() for parameter in encoder.parameters())
    if asked > held:
        raise ValueError(
            f"cannot load a model from {name!r}: its config.json asks for an encoder of {asked:,} numbers, and its "
            f"weights have {held:,}. Give the config that belongs to the weights."
        )


def _refuse_damage(name: str) -> None:
    """ValueError if weights of the Hub's cache are not those that the Hub named: there a file's name is its sha256."""
    path = None if Path(name).exists() else try_to_load_from_cache(name, "model.safetensors")
    if not isinstance(path, str):
        return
    stored = Path(path).resolve()
    with stored.open("rb") as file:
        if re.fullmatch(r"[0-9a-f]{64}", stored.name) and file_digest(file, "sha256").hexdigest() != stored.name:
            raise ValueError(
                f"the weights of {name!r} were damaged on their way from the Hub (their sha256 differs). "
                f"Remove {stored} and load again."
            )
