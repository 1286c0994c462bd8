"""Which of the labelled images are taken where only a few are asked for: reproducible, and showing many classes."""

import math

import numpy as np

_LABELS_STREAM = 2  # tells these random numbers from those of the samples


def how_many(asked: int | str | None, available: int) -> int:
    """Of `available` images as many as a config asks for: a number, a share "1/16" (rounded up), or None for all.

    Raises:
        ValueError: for more than there are.
    """
    number = math.ceil(available / int(asked.partition("/")[2])) if isinstance(asked, str) else asked
    if number is None:
        return available
    if number > available:
        raise ValueError(
            f"target_labels asks for {number} labelled target images, and there are {available}. Give at most that, or "
            "null for all."
        )
    return number


def covering_order(counts: np.ndarray, seed: int) -> list[int]:
    """An order of images in which the first few show as many classes as a greedy choice finds.

    Each next image is the one that shows most of the classes that none before it shows, in case of a tie the first in
    a random order. Once all classes are shown, or none can be added, the search for all of them begins anew, with the
    images that are left. So the first eight are among the first sixteen, and sixteen show rare classes twice.

    Args:
        counts: (images, K) pixels per class.
        seed: of the run.

    Returns:
        All indices of images, each once.
    """
    left = [int(index) for index in np.random.default_rng([seed, _LABELS_STREAM]).permutation(len(counts))]
    shows, order = counts > 0, list[int]()
    missing = shows.any(axis=0)
    while left:
        new = (shows[left] & missing).sum(axis=1)
        if not new.any():
            missing = shows[left].any(axis=0)
            new = (shows[left] & missing).sum(axis=1)
        order.append(left.pop(int(new.argmax())))
        missing = missing & ~shows[order[-1]]
    return order
