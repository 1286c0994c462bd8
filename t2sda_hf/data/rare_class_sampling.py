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
    """What is needed to draw: P(c), and for every class the images that may be drawn for it.

    Of several domains whose images are counted through, K classes of the first come first, then those of the second:
    entry d·K + c is class c of domain d, and its probability share_d · P_d(c). See `joint_rare_classes`.
    """

    probabilities: np.ndarray  # (domains · K,)
    images: list[np.ndarray]  # as many arrays of image indices
    min_pixels: np.ndarray  # (K,) floor of each class

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """(image index, class id): the class by P, the image uniformly among its own."""
        entry = int(rng.choice(len(self.probabilities), p=self.probabilities))
        return int(rng.choice(self.images[entry])), entry % len(self.min_pixels)

    @property
    def of_classes(self) -> np.ndarray:
        """(K,) probability of each class, whichever domain it is drawn of."""
        summed: np.ndarray = self.probabilities.reshape(-1, len(self.min_pixels)).sum(axis=0)
        return summed


def joint_shares_of_pixels(counts: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """(K,) shares of classes among the labelled pixels as they are drawn of several domains: f = Σ_d share_d · f_d.

    Args:
        counts: of each domain (images, K) pixels per class; f_d are its `shares_of_pixels`.
        shares: of the draws, of each domain.
    """
    each = [share * shares_of_pixels(one) for share, one in zip(shares, counts, strict=True)]
    summed: np.ndarray = np.sum(each, axis=0)
    return summed


def joint_rare_classes(
    counts: Sequence[np.ndarray],
    shares: Sequence[float],
    temperature: float,
    min_pixels: int | Sequence[int],
    frequencies: np.ndarray | None = None,
) -> RareClasses:
    """What RCS draws from several domains whose images are counted through; of one what `rare_classes` gives.

    A domain d comes by its share. Which class of it: P_d(c) = softmax((1 - f_c)/T) over the classes that d has, with
    the shares f of `joint_shares_of_pixels`. So a class is as rare as all domains together make it, and the images
    follow the shares of their domains.

    Args:
        counts, shares: as there.
        temperature, min_pixels: as in `rare_classes`.
        frequencies: (K,) f, where images of more domains are drawn than these; None: of these.
    """
    if len(counts) == 1:
        return rare_classes(counts[0], temperature, min_pixels, frequencies)
    frequencies = joint_shares_of_pixels(counts, shares) if frequencies is None else frequencies
    parts = [rare_classes(one, temperature, min_pixels, frequencies) for one in counts]
    first = np.cumsum([0, *map(len, counts)])
    return RareClasses(
        np.concatenate([share * part.probabilities for share, part in zip(shares, parts, strict=True)]),
        [start + images for start, part in zip(first, parts, strict=False) for images in part.images],
        parts[0].min_pixels,
    )


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
