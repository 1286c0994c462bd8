"""Rare class sampling: source images are drawn by class, rare classes more often (DAFormer; method 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


def class_probabilities(frequencies: np.ndarray, temperature: float) -> np.ndarray:
    """P(c) = softmax((1 - f_c)/T) over classes with f_c > 0; absent classes get 0.

    Args:
        frequencies: (K,) shares of pixels, summing to 1.
        temperature: T > 0; small T draws the rarest class nearly always.

    Returns:
        (K,) float64 summing to 1.
    """
    exponent = np.where(frequencies > 0, (1 - frequencies) / temperature, -np.inf)
    weights = np.exp(exponent - exponent.max())
    return weights / weights.sum()


def shares_of_pixels(counts: np.ndarray) -> np.ndarray:
    """(images, K) pixels per class -> (K,) float64 shares of all of them, summing to 1; zeros where there is none."""
    shares: np.ndarray = counts.sum(axis=0) / max(counts.sum(), 1)
    return shares


@dataclass(frozen=True)
class RareClasses:
    """What is needed to draw: P(c), and for every class the images that may be drawn for it."""

    probabilities: np.ndarray  # (K,)
    images: list[np.ndarray]  # K arrays of image indices
    min_pixels: np.ndarray  # (K,) floor of each class

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """(image index, class id): the class by P, the image uniformly among its own."""
        class_id = int(rng.choice(len(self.probabilities), p=self.probabilities))
        return int(rng.choice(self.images[class_id])), class_id


def rare_classes(
    counts: np.ndarray, temperature: float, min_pixels: int | Sequence[int], frequencies: np.ndarray | None = None
) -> RareClasses:
    """Class statistics of a domain -> what RCS draws from.

    Args:
        counts: (images, K) pixels per class at the labels' own resolution, ignored pixels left out.
        temperature: T.
        min_pixels: an image stands for a class if it shows *more* pixels of it. A class with no such image takes
            every image that shows it at all (the public code stops with an assertion there). One number, or one per
            class.
        frequencies: (K,) shares of pixels that say how rare a class is, where images of several domains are drawn;
            None: those of this domain.
    """
    own = shares_of_pixels(counts)
    frequencies = own if frequencies is None else np.where(own > 0, frequencies, 0)  # others are not in these images
    floors, images = np.broadcast_to(np.asarray(min_pixels), counts.shape[1]), []
    for class_counts, floor in zip(counts.T, floors, strict=True):
        rich = np.flatnonzero(class_counts > floor)
        if not len(rich) and class_counts.any():
            rich = np.flatnonzero(class_counts)
        images.append(rich)
    return RareClasses(class_probabilities(frequencies, temperature), images, floors)
