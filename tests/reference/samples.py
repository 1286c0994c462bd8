"""Samples of the pull as a list per class, to be looked at and to be made by hand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from t2sda_hf.losses.pull import PullSamples


@dataclass
class Listed:
    """Per class that sends queries: rows of its queries, and (m,) or (n_c,m) rows of its negatives in each domain."""

    classes: list[int]
    queries: list[Tensor]
    source_negatives: list[Tensor]
    target_negatives: list[Tensor]

    def only(self, *places: int) -> "Listed":
        """The same with some of the classes."""
        return Listed(*([group[place] for place in places] for group in vars(self).values()))


def listed(samples: PullSamples) -> Listed:
    """Take away what is not counted, and of the negatives those of the other domain."""
    found = Listed([], [], [], [])
    for class_id, number in enumerate(samples.num_queries.tolist()):
        if not number:
            continue
        blocks = samples.classes == class_id
        counted = samples.counted[blocks]
        rows = samples.queries[blocks][counted]
        assert len(rows) == number
        place = class_id if samples.source_negatives.ndim == 2 else blocks

        def of(rows: Tensor | None, admitted: Tensor | None, place=place, counted=counted) -> Tensor:
            if rows is None:
                return torch.empty(0, dtype=torch.int64)
            rows, admitted = rows[place], torch.ones_like(rows[place]).bool() if admitted is None else admitted[place]
            if rows.ndim == 1:
                return rows[admitted]
            rows, admitted = rows[counted], admitted[counted]
            return rows[admitted].view(len(rows), -1)

        if not samples.comparable[class_id]:
            negatives = [torch.empty(0, dtype=torch.int64)] * 2
        else:
            other = None if samples.of_source is None else ~samples.of_source
            negatives = [of(samples.source_negatives, samples.of_source), of(samples.target_negatives, other)]
        for group, entry in zip(vars(found).values(), (class_id, rows, *negatives), strict=True):
            group.append(entry)
    return found


def blocked(given: Listed, num_classes: int) -> PullSamples:
    """Samples of lists, one block for each class."""
    sizes = [len(rows) for rows in given.queries]
    shape = (max(len(sizes), 1), max([1, *sizes]))
    queries, counted = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.bool)
    number = torch.zeros(num_classes, dtype=torch.int64)
    num_negatives = [
        s.shape[-1] + t.shape[-1] for s, t in zip(given.source_negatives, given.target_negatives, strict=True)
    ]
    own = any(rows.ndim == 2 for rows in given.source_negatives)
    size = (*(shape if own else (num_classes,)), max([1, *num_negatives]))
    negatives = [torch.zeros(size, dtype=torch.int64) for _ in range(2)]
    of_source, comparable = torch.zeros(size, dtype=torch.bool), torch.zeros(num_classes, dtype=torch.bool)
    for place, class_id in enumerate(given.classes):
        rows, from_source, from_target = (group[place] for group in list(vars(given).values())[1:])
        queries[place, : len(rows)], counted[place, : len(rows)] = rows, True
        number[class_id], comparable[class_id] = len(rows), num_negatives[place] > 0
        if not num_negatives[place]:
            continue
        where = (place, slice(len(rows))) if own else (class_id,)
        split = from_source.shape[-1]
        negatives[0][where][..., :split] = from_source
        negatives[1][where][..., split:] = from_target
        of_source[where][..., :split] = True
    return PullSamples(torch.tensor(given.classes or [0]), queries, counted, number, *negatives, of_source, comparable)
