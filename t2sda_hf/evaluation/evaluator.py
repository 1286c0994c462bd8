"""One pass over a labelled domain: predict, count, sum over processes."""

import signal
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from threading import current_thread, main_thread
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..data.domains import Domain
from ..data.transforms import InputSize, Size
from ..device import advised, sent
from ..errors import Ended, NotFinite, OutOfMemory, leave_signals_to_parent
from .confusion import confusion_matrix, counts_of_pairs, scores
from .gain import GroupCounts, pack
from .inference import Mode, needing_less, predict_labels, to_pixel_values
from .table import mean_of_known

BYTES_PER_PIXEL = 4096  # of the input, that a forward of MiT-B5 with DAFormer's head may need


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


class Tally:
    """Confusion counts of a model, kept where its predictions are, and read once.

    Args:
        num_images: of all processes together.
        num_classes: K.
        name: of the domain, for messages.
    """

    def __init__(self, num_images: int, num_classes: int, name: str) -> None:
        self._num_images, self._num_classes, self._name = num_images, num_classes, name
        self._matrix = np.zeros((num_classes, num_classes), dtype=np.int64)
        self._groups = GroupCounts(num_images, num_classes)
        self._pairs: Tensor | None = None  # (G,256,256) on the device, by group of images

    def add(self, index: int, predictions: Tensor, labels: np.ndarray) -> None:
        """Count one image: class ids (H,W) uint8, and labels of the same size."""
        if predictions.device.type == "cpu" and self._pairs is None:
            try:
                of_image = confusion_matrix(predictions, labels, self._num_classes)
            except ValueError as error:
                raise ValueError(f"{self._name}, image {index}: {error}") from error
            self._matrix += of_image
            self._groups.add(index, of_image)
            return
        if self._pairs is None:
            self._pairs = torch.zeros(len(self._groups.pixels), 256, 256, dtype=torch.int64, device=predictions.device)
        counts_of_pairs(
            predictions, torch.from_numpy(labels).to(predictions.device), self._pairs[self._groups.of(index)]
        )

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """(K,K) counts of all images, and those of `GroupCounts`.

        Raises:
            ValueError: for ids that are no class, where they were counted on a device.
        """
        if self._pairs is not None:
            for group, pairs in enumerate(self._pairs.cpu().numpy()):
                pairs[255] = 0
                inside = pairs[: self._num_classes, : self._num_classes]
                if inside.sum() != pairs.sum():
                    first, last = (-(-place * self._num_images // len(self._pairs)) for place in (group, group + 1))
                    raise ValueError(
                        f"{self._name}, one of the images {first} to {last - 1}: labels or predictions contain ids "
                        f"that are none of the {self._num_classes} classes. Map the ids of the data set to class ids "
                        "first."
                    )
                self._matrix += inside
                self._groups.add_to(group, inside)
        return self._matrix, self._groups.pixels


def _unasked() -> None:
    pass


def evaluate_model(model: nn.Module, domain: LabelledDomain, **how: Any) -> dict[str, Any]:
    """`evaluate_models` of one."""
    return evaluate_models({"model": model}, domain, **how)["model"]


def evaluate_models(
    models: Mapping[str, nn.Module],
    domain: LabelledDomain,
    *,
    image_size: InputSize,
    classes: Sequence[str],
    accelerator: Accelerator | None = None,
    mode: Mode = "whole",
    window: Size | None = None,
    stride: Size | None = None,
    progress: bool = True,
    limit: int | None = None,
    skip_unreadable: bool = False,
    workers: int = 0,
    at_once: int | None = None,
    check: Callable[[], None] = _unasked,
) -> dict[str, dict[str, Any]]:
    """Score models on every image of `domain` against labels in their own resolution (method 6.1).

    Every image is read once for all of them. Collective: call it on every process. Process r takes the images r,
    r + world, r + 2 world, ...; none is repeated to fill up the last round, so the result does not depend on the
    number of processes, up to rounding where several images are forwarded together. The models are in eval mode
    meanwhile, and every submodule gets its own mode back, also after an error.

    Args:
        models: by name, on the device they shall run on; `model(pixel_values).logits` is (1, len(classes), h, w).
        domain: labels must be of the size of their image.
        image_size: of the network's input.
        classes: class names, position = class id.
        accelerator: None for a single process.
        mode, window, stride: see `predict_logits`.
        progress: show a bar on the first process.
        limit: only the first so many images.
        skip_unreadable: go on after an image or label map that cannot be read, and list it. It is for data somebody
            else made; the score is then of other images than the same score elsewhere.
        workers: processes that read images ahead; 0 reads them here.
        at_once: images of one size, and with labels of one size, that are forwarded together; None: `images_at_once`.
            One at a time where the memory is too small for them.
        check: is called before every image, and may raise.

    Returns:
        By the names of the models, and on every process the same, ready for JSON. All scores in %, None for 0/0:

        - domain: its name; num_images: how many were scored
        - unreadable: what was left out and why, in words; empty unless `skip_unreadable`
        - miou, pixel_accuracy, mean_accuracy: see `confusion.scores`
        - iou: class name -> score. None is a class neither labelled nor predicted, left out of miou
        - confusion: (K, K) list of lists of pixel counts, rows = labels, columns = predictions
        - groups: what `gain.gain_interval` needs

    Raises:
        ValueError: if the domain is empty or nothing in it can be read, an image and its labels differ in size, or a
            label or prediction is not a class id. Domain and image are named.
        NotFinite: if what a model makes of an image is not, on all processes alike. The image is named.
        OutOfMemory: with what to lower; it is not done here, because other windows give other scores.
    """
    num_images = len(domain) if limit is None else min(limit, len(domain))
    if num_images < 1:
        raise ValueError(f"nothing to evaluate: {domain.name} has {len(domain)} images and the limit is {limit}.")
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    tallies = {name: Tally(num_images, len(classes), domain.name) for name in models}
    unreadable: list[str] = []
    broken: list[str] = []
    waiting: dict[tuple[int, ...], list[_Image]] = {}  # by the sizes of image and labels
    fits = True

    def predicted(batch: Sequence[_Image]) -> list[Tensor] | None:
        """(B,H,W) class ids by each model; None if it must be done one by one."""
        nonlocal fits
        if len(batch) > 1 and not fits:
            return None
        images = torch.from_numpy(np.concatenate([one.pixels for one in batch]))
        size, found = batch[0].labels.shape, list[Tensor]()
        try:
            with advised(needing_less(mode, window)):
                for model in models.values():
                    pixel_values = sent(images, next(model.parameters()).device)
                    found.append(predict_labels(model, pixel_values, size, mode, window, stride))
        except NotFinite as error:
            if len(batch) == 1:
                raise NotFinite(f"{where(domain, batch[0].index)}: {error}") from error
            return None
        except OutOfMemory:
            if len(batch) == 1:
                raise
            fits = False
            return None
        return found

    def score(batch: Sequence[_Image]) -> None:
        found = predicted(batch)
        if found is None:
            for one in batch:
                score([one])
            return
        for tally, predictions in zip(tallies.values(), found, strict=True):
            for one, labels in zip(batch, predictions, strict=True):
                tally.add(one.index, labels, one.labels)

    modes = [(module, module.training) for model in models.values() for module in model.modules()]
    for model in models.values():
        model.eval()
    shard = range(rank, num_images, world)
    try:
        shown = tqdm(shard, desc=f"evaluate {domain.name}", disable=not progress or rank != 0)
        with closing(_read(_Reading(domain, shard, image_size), workers, check)) as items:
            for index, item in zip(shown, items, strict=True):
                if isinstance(item, _Unread):
                    if not skip_unreadable or not item.may_be_skipped:
                        raise item.error
                    unreadable.append(str(item.error))
                    continue
                image = _Image(index, *item)
                batch = waiting.setdefault(image.sizes, [])
                batch.append(image)
                if len(batch) >= (at_once or images_at_once(models.values(), image.pixels)) or not fits:
                    score(waiting.pop(image.sizes))
            for batch in waiting.values():
                score(batch)
    except NotFinite as error:
        broken.append(str(error))  # all processes must know before one ends
    finally:
        for module, mode_before in modes:
            module.training = mode_before
    counted = {name: tally.read() for name, tally in tallies.items()}
    if accelerator is not None:
        counted = {
            name: (_summed(matrix, accelerator), _summed(pixels, accelerator))
            for name, (matrix, pixels) in counted.items()
        }
        unreadable = sorted(gather_object(unreadable))
        broken = sorted(gather_object(broken))
    if broken:
        raise NotFinite(broken[0])
    if len(unreadable) == num_images:
        raise ValueError(f"none of the {num_images} images of {domain.name} can be scored. The first: {unreadable[0]}")
    about = {"domain": domain.name, "num_images": num_images - len(unreadable), "unreadable": unreadable}
    return {name: about | _result(matrix, pixels, classes) for name, (matrix, pixels) in counted.items()}


def joint_result(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The results of a model on several domains as one; of one domain its own.

    Returns:
        What `evaluate_models` does, with the sum of images and confusions, and of every score the mean over the
        domains: mIoU is the mean of their mIoUs, and the IoU of a class the mean over those that have one. There are no
        "groups"; "domains" has the results one by one.
    """
    if len(results) == 1:
        return results[0]
    mean = {
        name: mean_of_known([result[name] for result in results])
        for name in ("miou", "pixel_accuracy", "mean_accuracy")
    }
    return {
        "domain": " + ".join(result["domain"] for result in results),
        "num_images": sum(result["num_images"] for result in results),
        "unreadable": [text for result in results for text in result["unreadable"]],
        **mean,
        "iou": {name: mean_of_known([result["iou"][name] for result in results]) for name in results[0]["iou"]},
        "confusion": np.sum([result["confusion"] for result in results], axis=0).tolist(),
        "domains": list(results),
    }


def _result(matrix: np.ndarray, groups: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    result = scores(matrix, classes)
    return {
        "miou": _percent(result["mean_iou"]),
        "pixel_accuracy": _percent(result["overall_accuracy"]),
        "mean_accuracy": _percent(result["mean_accuracy"]),
        "iou": {name: _percent(value) for name, value in result["iou"].items()},
        "confusion": matrix.tolist(),
        "groups": pack(groups),
    }


def _summed(counts: np.ndarray, accelerator: Accelerator) -> np.ndarray:
    summed: Tensor = accelerator.reduce(torch.from_numpy(counts).to(accelerator.device), reduction="sum")
    return summed.cpu().numpy()


def images_at_once(models: Iterable[nn.Module], pixels: np.ndarray) -> int:
    """How many images of this size, `pixels` (1,3,H,W), an evaluation forwards together.

    On a GPU as many as a quarter of its memory has room for, 8 at most; elsewhere one.
    """
    device = next(next(iter(models)).parameters()).device
    if device.type != "cuda":
        return 1
    room = torch.cuda.get_device_properties(device).total_memory // 4
    return int(min(max(room // (BYTES_PER_PIXEL * pixels.shape[-2] * pixels.shape[-1]), 1), 8))


@dataclass(frozen=True)
class _Image:
    index: int
    pixels: np.ndarray  # (1,3,H,W) float32
    labels: np.ndarray

    @property
    def sizes(self) -> tuple[int, ...]:
        return (*self.pixels.shape, *self.labels.shape)


@dataclass(frozen=True)
class _Unread:
    error: Exception
    may_be_skipped: bool


@dataclass(frozen=True)
class _Reading(Dataset):
    """What a worker makes of an image: (pixel values (1,3,*size) float32, labels), or the error that it met.

    Arrays, because tensors would need shared memory, which containers have little of.
    """

    domain: LabelledDomain
    indices: Sequence[int]
    image_size: InputSize

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[np.ndarray, np.ndarray] | _Unread:
        index, read = self.indices[place], False
        try:
            image, labels = self.domain.image(index), self.domain.labels(index)
            read = True
            _refuse_another_size(self.domain, index, image, labels)
        except (ValueError, OSError, Ended) as error:
            return _Unread(error, not read and not isinstance(error, Ended))
        return to_pixel_values(image, self.image_size, torch.device("cpu")).numpy(), labels


def _read(reading: _Reading, workers: int, check: Callable[[], None]) -> Generator[Any, None, None]:
    """The items in order; closed, it leaves no worker behind."""
    if not workers:
        for place in range(len(reading)):
            check()
            yield reading[place]
        return
    alarm = signal.getsignal(signal.SIGCHLD)
    loaded = iter(
        DataLoader(reading, None, num_workers=workers, collate_fn=_as_it_is, worker_init_fn=leave_signals_to_parent)
    )
    if current_thread() is main_thread():
        signal.signal(signal.SIGCHLD, alarm or signal.SIG_DFL)  # torch's would raise in the middle of anything
    for item in loaded:
        check()
        yield item


def _as_it_is(item: Any) -> Any:
    return item


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
