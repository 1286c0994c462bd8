"""(source, target) samples as a pure function of (seed, position): no sampler or worker has a state to lose."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..batch import UdaBatch, shown_ids
from ..config import RunConfig
from .domains import AnyDomain, Domain, ImageStream, StreamedDomain
from .rare_class_sampling import RareClasses
from .transforms import (
    Window,
    pad_image,
    pad_labels,
    random_window,
    resize_image,
    resize_labels,
    shows_several_classes,
)
from .translated import TranslatedFolder

# Of a crop that is too uniform, and of one that misses its rare class; the last one is kept (DAFormer). Also of images
# that could be read when the run began, and cannot any more.
RETRIES = 10
AHEAD = 2  # batches that each worker has ready
_DATA_STREAM = 1  # tells the random numbers of the data from those of the training step


@dataclass(frozen=True)
class LabelledTarget:
    """Target images with labels that are learned beside those of the source.

    Attributes:
        domain: of them alone.
        share: of the positions that it has, spread evenly: position p if floor((p+1)·share) > floor(p·share).
        rare: what to draw by; None draws evenly.
    """

    domain: Domain
    share: float
    rare: RareClasses | None = None

    def has(self, position: int) -> bool:
        return math.floor((position + 1) * self.share) > math.floor(position * self.share)


@dataclass(frozen=True)
class PairDataset(Dataset):
    """Sample number `position` of an endless stream: a source crop with labels, and a target crop without. Where there
    is no source, its image and labels are empty.

    In the place of some source images stand those of `labelled_target`. They are in the style of the target already:
    their window is its own style reference, by which FDA leaves it as it is.

    The pipeline is that of method 3.4: resize, outer window, crop inside it, both redrawn together until the crop
    shows several classes and enough of the class it was drawn for; flips of source and target are independent.

    Of several sources or targets each sample has one of each, by their shares; see `domains.JointDomain`.
    """

    config: RunConfig
    source: AnyDomain | None
    target: AnyDomain | None
    rare: RareClasses | None
    translated: TranslatedFolder | None = None  # of the source images, instead of an engine that runs along
    stream: ImageStream | None = None  # of the target's images, instead of those that are drawn by index
    labelled_target: LabelledTarget | None = None

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at a position; "redrawn" has what could not be read, if others were drawn instead.

        Raises:
            ValueError, OSError: if nothing that is drawn can be read.
        """
        redrawn: list[str] = []
        while True:
            another = [len(redrawn)] if redrawn else []
            rng = np.random.default_rng([self.config.seed, _DATA_STREAM, position, *another])
            try:
                sample: dict[str, Any] = self._sample(rng, position)
            except (ValueError, OSError) as error:
                if len(redrawn) == RETRIES:
                    raise
                redrawn.append(str(error))
            else:
                return sample | {"redrawn": redrawn} if redrawn else sample

    def _sample(self, rng: np.random.Generator, position: int) -> dict[str, np.ndarray]:
        few, rare = self.labelled_target, self.rare
        labelled: AnyDomain | None = self.source
        if labelled is None:
            empty = {"source_images": np.zeros((0, 0, 3), np.uint8), "source_labels": np.zeros((0, 0), np.uint8)}
            assert self.target is not None
            return empty | self._target_crop(*self._draw_target(self.target, rng, position), rng)
        from_target = few is not None and few.has(position)
        if few is not None and from_target:
            labelled, rare = few.domain, few.rare
        index, wanted = rare.draw(rng) if rare else (labelled.draw(rng), None)
        image = labelled.resized_image(index)
        size = (image.shape[0], image.shape[1])
        labels = resize_labels(labelled.labels(index), size)

        data = self.config.data
        outer_size = data.outer_crop_size if self.config.uses_outer_crop else data.crop_size
        image, labels = pad_image(image, outer_size), pad_labels(labels, outer_size)
        outer, inner, flip = self._source_window(labels, outer_size, wanted, rare, rng)
        labels = outer.inside(inner).of(labels)
        outer_image = outer.of(image)
        sample = {"source_images": _flipped(inner.of(outer_image), flip), "source_labels": _flipped(labels, flip)}
        sample |= {} if few is None else {"from_target": np.array(from_target)}
        if self.target is None:
            return sample

        target_image, of_target = self._draw_target(self.target, rng, position)
        if self.config.translates:
            style = target_image
            if self.config.translate.reference == "random":
                style, _ = self._draw_target(self.target, rng, position, second=True)
            style = outer_image if from_target else resize_image(style, outer_size)
            made = None if from_target else self.translated
            if made is not None:  # the translation itself stands where others have its style
                whole = resize_image(made.image(index), size)
                style = outer.of(pad_image(whole, outer_size))
            # Flipping window and style together flips the translation: FDA's window is symmetric.
            left = outer_size[1] - data.crop_size[1] - inner.left if flip else inner.left
            sample |= {
                "outer_source": _flipped(outer_image, flip),
                "style_reference": _flipped(style, flip),
                "inner_corner": np.array([inner.top, left]),
            }
        return sample | self._target_crop(target_image, of_target, rng)

    def _target_crop(self, image: np.ndarray, target: Domain, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """A crop of a target image, and where its pseudo-labels may be trusted, unless that is everywhere."""
        data, uda, sample = self.config.data, self.config.uda, dict[str, np.ndarray]()
        unpadded = (image.shape[0], image.shape[1])
        image = pad_image(image, data.crop_size)
        crop = random_window((image.shape[0], image.shape[1]), data.crop_size, rng)
        flip = bool(data.flip and rng.random() < 0.5)
        size = (image.shape[0], image.shape[1])
        valid = target.validity(unpadded)
        if valid is not None or uda.ignore_left or uda.ignore_right or unpadded != size:
            columns = np.arange(size[1])
            trusted = np.zeros(size, dtype=bool)  # padding is not
            trusted[: unpadded[0], : unpadded[1]] = True if valid is None else valid
            trusted &= (columns >= uda.ignore_left) & (columns < unpadded[1] - uda.ignore_right)
            sample["target_valid"] = _flipped(crop.of(trusted), flip)
        return sample | {"target_images": _flipped(crop.of(image), flip)}

    def _draw_target(
        self, target: AnyDomain, rng: np.random.Generator, position: int, second: bool = False
    ) -> tuple[np.ndarray, Domain]:
        """The target image of a position, or the second one, of which only the style is used; and whose it is."""
        domain, index = target.at(target.draw(rng))  # drawn for a stream too: crops and flips do not depend on it
        if self.stream is None:
            return domain.resized_image(index), domain
        batch, place = divmod(position, self.config.train.batch_size)
        return self.stream.image(batch, place + second * self.config.train.batch_size), domain

    def _source_window(
        self,
        labels: np.ndarray,
        outer_size: tuple[int, int],
        wanted: int | None,
        rare: RareClasses | None,
        rng: np.random.Generator,
    ) -> tuple[Window, Window, bool]:
        """Outer window, the crop relative to it, and whether to flip."""
        data = self.config.data
        size = (labels.shape[0], labels.shape[1])
        multiple = 2 if self.config.hrda.enabled else 1  # pixels of the crop lie evenly in those of half the size
        for _ in range(1 + RETRIES):
            for _ in range(1 + RETRIES):
                outer = random_window(size, outer_size, rng, multiple)
                inner = random_window(outer_size, data.crop_size, rng, multiple)
                crop = outer.inside(inner).of(labels)
                if data.cat_max_ratio == 1 or shows_several_classes(crop, data.cat_max_ratio):
                    break
            flip = bool(data.flip and rng.random() < 0.5)
            if wanted is None or rare is None:
                break
            if (crop == wanted).sum() > rare.min_pixels[wanted] * self.config.rcs.min_crop_ratio:
                break
        return outer, inner, flip


@dataclass(frozen=True)
class PositionSampler(Sampler[int]):
    """Positions of one process in step order: slot r·micro + j of every step belongs to micro-batch j of process r.

    So two processes see exactly what two micro-batches of one process see, and a run that starts at `start_step`
    sees what an uninterrupted one sees there.
    """

    batch_size: int
    micro_batches: int
    process_index: int
    num_processes: int
    start_step: int
    max_steps: int
    overfit: bool = False  # every step has the positions of the first

    def __iter__(self) -> Iterator[int]:
        for step in range(self.start_step, self.max_steps):
            step = 0 if self.overfit else step
            for micro in range(self.micro_batches):
                slot = self.process_index * self.micro_batches + micro
                first = (step * self.num_processes * self.micro_batches + slot) * self.batch_size
                yield from range(first, first + self.batch_size)

    def __len__(self) -> int:
        return (self.max_steps - self.start_step) * self.micro_batches * self.batch_size


def collate(samples: list[dict[str, Any]]) -> UdaBatch:
    """Stack samples; images become (B,3,H,W) uint8. Where only some say what is trusted, the others are whole."""
    stacked: dict[str, Any] = {"redrawn": tuple(text for sample in samples for text in sample.pop("redrawn", ()))}
    if any("target_valid" in sample for sample in samples):
        samples = [
            {"target_valid": np.ones(sample["target_images"].shape[:2], dtype=bool)} | sample for sample in samples
        ]
    for name in samples[0]:
        array = torch.from_numpy(np.stack([sample[name] for sample in samples]))
        stacked[name] = array.permute(0, 3, 1, 2).contiguous() if array.ndim == 4 else array
    return UdaBatch(**stacked, shown=shown_ids(stacked["source_labels"]))


def bytes_per_batch(config: RunConfig) -> int:
    """What a data worker hands over for a micro-batch, in bytes: see `UdaBatch`, all of it uint8."""
    height, width = config.data.crop_size
    pixels = 8 * height * width  # two images, labels, and where the target is trusted
    if config.translates:
        outer_height, outer_width = config.data.outer_crop_size
        pixels += 6 * outer_height * outer_width
    return config.train.batch_size * pixels


def batches(
    dataset: PairDataset, process_index: int = 0, num_processes: int = 1, start_step: int = 0, pin: bool = False
) -> DataLoader[UdaBatch]:
    """The micro-batches of one process from `start_step` to the last step, in order: one pass, whose workers stay.

    A function of the seed and the step. `pin` puts batches where a GPU reads them by itself.
    """
    train = dataset.config.train
    target = dataset.target
    if isinstance(target, StreamedDomain):
        of_sample = 2 if dataset.config.translates and dataset.config.translate.reference == "random" else 1
        slots, draws = num_processes * train.micro_batches, of_sample * train.batch_size
        dataset = replace(dataset, stream=ImageStream(target, dataset.config.seed, slots, draws))
    sampler = PositionSampler(
        train.batch_size,
        train.micro_batches,
        process_index,
        num_processes,
        start_step,
        train.max_steps,
        train.overfit_batch,
    )
    workers = dataset.config.data.num_workers or 0
    return DataLoader(
        dataset,
        batch_size=train.batch_size,
        sampler=sampler,
        num_workers=workers,
        prefetch_factor=AHEAD if workers else None,
        collate_fn=collate,
        pin_memory=pin,
        generator=torch.Generator(),  # otherwise starting the loader would move the global random state
    )


def _flipped(array: np.ndarray, flip: bool) -> np.ndarray:
    return array[:, ::-1].copy() if flip else array
