"""Whether a gain is more than the choice of test images: a paired bootstrap, since both models saw the same ones."""

from collections.abc import Mapping
from typing import Any

import numpy as np

GROUPS = 100  # that the test images are put into; neighbours together, since frames of one drive are alike
FEWEST = 5  # groups with which a bootstrap says something
_RESAMPLES, _SEED = 1000, 0


class GroupCounts:
    """Pixels in the intersection and in the union of each class, by group of neighbouring images.

    So a result keeps at most 2 · 100 · K numbers, however many images were scored.

    Attributes:
        pixels: (G, 2, K) int64, summable over processes.
    """

    def __init__(self, num_images: int, num_classes: int) -> None:
        self._num_images = num_images
        self.pixels = np.zeros((min(num_images, GROUPS), 2, num_classes), dtype=np.int64)

    def of(self, index: int) -> int:
        """The group of an image."""
        return index * len(self.pixels) // self._num_images

    def add(self, index: int, matrix: np.ndarray) -> None:
        """Count the (K, K) confusion matrix of one image."""
        self.add_to(self.of(index), matrix)

    def add_to(self, group: int, matrix: np.ndarray) -> None:
        """Count a (K, K) confusion matrix of images of a group."""
        both = matrix.diagonal()
        self.pixels[group] += np.stack([both, matrix.sum(axis=0) + matrix.sum(axis=1) - both])


def pack(pixels: np.ndarray) -> dict[str, list[str]]:
    """(G, 2, K) as one line of text per group, which JSON writes in one line, too."""
    return {
        name: [" ".join(map(str, row)) for row in pixels[:, place].tolist()]
        for place, name in enumerate(("intersection", "union"))
    }


def group_pixels(result: Mapping[str, Any]) -> np.ndarray | None:
    """(2, G, K) float64, pixels in intersection and union; None for a result of an earlier release."""
    kept: Mapping[str, list[str]] = result.get("groups", {})
    return np.array([[row.split() for row in rows] for rows in kept.values()], dtype=np.float64) if kept else None


def gain_interval(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[float, float] | None:
    """95 % interval of the gain in mIoU, in points, over test sets drawn from these test images with replacement.

    It says nothing of another seed. Deterministic; its cost does not grow with the number of images.

    Args:
        result, baseline: of `evaluate_model`, on the same images; or of `joint_result`, whose gain is the mean over the
            domains, each drawn by itself.

    Returns:
        None where it cannot be told: a result of an earlier release, another number of domains or of groups, or fewer
        than 5 groups.
    """
    rng, gains = np.random.default_rng(_SEED), list[np.ndarray]()
    ours, theirs = (one.get("domains", [one]) for one in (result, baseline))
    if len(ours) != len(theirs):
        return None
    for new, old in ((group_pixels(one), group_pixels(other)) for one, other in zip(ours, theirs, strict=True)):
        if new is None or old is None or new.shape != old.shape or new.shape[1] < FEWEST:
            return None
        groups = new.shape[1]
        draws = rng.multinomial(groups, np.full(groups, 1 / groups), size=_RESAMPLES)
        gains.append(_miou(draws @ new) - _miou(draws @ old))
    low, high = np.percentile(np.mean(gains, axis=0), [2.5, 97.5])
    return float(low), float(high)


def _miou(pixels: np.ndarray) -> np.ndarray:
    """(2, R, K) -> (R,) in %; a class that a resample neither shows nor predicts is left out of its mean."""
    intersection, union = pixels
    there = union > 0
    shares = np.where(there, intersection / np.maximum(union, 1), 0)
    return 100 * shares.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
