"""One pass over a labelled domain: predict, count, sum over processes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from ..data.domains import Domain
from ..data.transforms import Size
from ..device import advised
from ..errors import NotFinite
from .confusion import confusion_matrix, scores
from .gain import GroupCounts, pack
from .inference import Mode, needing_less, predict_labels, to_pixel_values


class LabelledDomain(Protocol):
    """What evaluation reads of a domain: images (H, W, 3) uint8 RGB and labels (H, W) uint8 class ids or 255."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def image(self, index: int, /) -> np.ndarray: ...

    def labels(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Part:
    """Some images of a labelled domain.

    Attributes:
        domain: what they are taken from.
        indices: which, in this order.
        name: for messages and tables.
    """

    domain: LabelledDomain
    indices: Sequence[int]
    name: str

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> np.ndarray:
        return self.domain.image(self.indices[index])

    def labels(self, index: int) -> np.ndarray:
        return self.domain.labels(self.indices[index])


def evenly_spread(domain: LabelledDomain, num_images: int, remark: str = "") -> Part:
    """At most `num_images` images of a domain at equal distances, its first among them."""
    num_images = min(num_images, len(domain))
    indices = [len(domain) * place // num_images for place in range(num_images)]
    return Part(domain, indices, f"{domain.name}{remark}")


def readable_part(domain: LabelledDomain) -> tuple[Part, list[str]]:
    """Those images of a domain that can be read together with labels of their size, and in words what is wrong with
    the others.

    It reads all of them, so that everything after it sees the same images.

    Raises:
        ValueError: if none can be read.
    """
    indices, unreadable = [], []
    for index in range(len(domain)):
        try:
            _refuse_another_size(domain, index, domain.image(index), domain.labels(index))
        except (ValueError, OSError) as error:
            unreadable.append(str(error))
        else:
            indices.append(index)
    if not indices:
        first = unreadable[0] if unreadable else "there are none."
        raise ValueError(f"none of the {len(domain)} images of {domain.name} can be read. The first: {first}")
    return Part(domain, indices, domain.name), unreadable


def evaluate_model(
    model: nn.Module,
    domain: LabelledDomain,
    *,
    image_size: Size | None,
    classes: Sequence[str],
    accelerator: Accelerator | None = None,
    mode: Mode = "whole",
    window: Size | None = None,
    stride: Size | None = None,
    progress: bool = True,
    limit: int | None = None,
    skip_unreadable: bool = False,
) -> dict[str, Any]:
    """Score `model` on every image of `domain` against labels in their own resolution (method 6.1).

    Collective: call it on every process. Process r takes the images r, r + world, r + 2 world, ...; none is repeated
    to fill up the last round, so the result does not depend on the number of processes. The model is in eval mode
    meanwhile, and every submodule gets its own mode back, also after an error.

    Args:
        model: on the device it shall run on; `model(pixel_values).logits` is (1, len(classes), h, w).
        domain: labels must be of the size of their image.
        image_size: (height, width) of the network's input, or None for the image's own.
        classes: class names, position = class id.
        accelerator: None for a single process.
        mode, window, stride: see `predict_logits`.
        progress: show a bar on the first process.
        limit: only the first so many images.
        skip_unreadable: go on after an image or label map that cannot be read, and list it. It is for data somebody
            else made; the score is then of other images than the same score elsewhere.

    Returns:
        On every process the same, ready for JSON. All scores in %, None for 0/0:

        - domain: its name; num_images: how many were scored
        - unreadable: what was left out and why, in words; empty unless `skip_unreadable`
        - miou, pixel_accuracy, mean_accuracy: see `confusion.scores`
        - iou: class name -> score. None is a class neither labelled nor predicted, left out of miou
        - confusion: (K, K) list of lists of pixel counts, rows = labels, columns = predictions
        - groups: what `gain.gain_interval` needs

    Raises:
        ValueError: if the domain is empty or nothing in it can be read, an image and its labels differ in size, or a
            label or prediction is not a class id. Domain and image are named.
        NotFinite: if what the model makes of an image is not, on all processes alike. The image is named.
        OutOfMemory: with what to lower; it is not done here, because other windows give other scores.
    """
    num_images = len(domain) if limit is None else min(limit, len(domain))
    if num_images < 1:
        raise ValueError(f"nothing to evaluate: {domain.name} has {len(domain)} images and the limit is {limit}.")
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    device = next(model.parameters()).device
    matrix = np.zeros((len(classes), len(classes)), dtype=np.int64)
    groups = GroupCounts(num_images, len(classes))
    unreadable: list[str] = []
    broken: list[str] = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        shard = range(rank, num_images, world)
        for index in tqdm(shard, desc=f"evaluate {domain.name}", disable=not progress or rank != 0):
            try:
                image, labels = domain.image(index), domain.labels(index)
            except (ValueError, OSError) as error:
                if not skip_unreadable:
                    raise
                unreadable.append(str(error))
                continue
            _refuse_another_size(domain, index, image, labels)
            pixel_values = to_pixel_values(image, image_size, device)
            try:
                with advised(needing_less(mode, window)):
                    predictions = predict_labels(model, pixel_values, labels.shape, mode, window, stride)[0]
            except NotFinite as error:
                broken.append(f"{where(domain, index)}: {error}")  # all processes must know before one ends
                break
            try:
                of_image = confusion_matrix(predictions, labels, len(classes))
            except ValueError as error:
                raise ValueError(f"{domain.name}, image {index}: {error}") from error
            matrix += of_image
            groups.add(index, of_image)
    finally:
        for module, mode_before in modes:
            module.training = mode_before
    if accelerator is not None:
        matrix, groups.pixels = (
            accelerator.reduce(torch.from_numpy(counts).to(accelerator.device), reduction="sum").cpu().numpy()
            for counts in (matrix, groups.pixels)
        )
        unreadable = sorted(gather_object(unreadable))
        broken = sorted(gather_object(broken))
    if broken:
        raise NotFinite(broken[0])
    if len(unreadable) == num_images:
        raise ValueError(f"none of the {num_images} images of {domain.name} can be scored. The first: {unreadable[0]}")
    result = scores(matrix, classes)
    return {
        "domain": domain.name,
        "num_images": num_images - len(unreadable),
        "unreadable": unreadable,
        "miou": _percent(result["mean_iou"]),
        "pixel_accuracy": _percent(result["overall_accuracy"]),
        "mean_accuracy": _percent(result["mean_accuracy"]),
        "iou": {name: _percent(value) for name, value in result["iou"].items()},
        "confusion": matrix.tolist(),
        "groups": pack(groups.pixels),
    }


def where(domain: LabelledDomain, index: int) -> str:
    """How messages call an image: by its file, where it has one."""
    while not isinstance(domain, Domain) and hasattr(domain, "domain"):  # a part of one, or one that is watched
        index, domain = domain.indices[index] if isinstance(domain, Part) else index, domain.domain
    return domain.where(domain.table[index], index) if isinstance(domain, Domain) else f"{domain.name}, image {index}"


def _refuse_another_size(domain: LabelledDomain, index: int, image: np.ndarray, labels: np.ndarray) -> None:
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f"{domain.name}, image {index}: the image has {image.shape[:2]} pixels, its labels {labels.shape}."
        )


def _percent(share: float) -> float | None:
    return None if np.isnan(share) else 100 * share
