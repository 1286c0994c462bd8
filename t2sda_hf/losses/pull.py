"""The pull loss and its parts (paper section 3.2-3.4; method 5.3-5.8).

Legend: B batch, K classes of the run, D embedding size, h×w feature map, N = B·h·w pixels, n queries per class on
average, m negatives. Maps are (B,D,h,w), best in channels-last memory: their (N,D) view is then free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from ..labels import IGNORE_INDEX

QUERY_CHUNK = 256  # rows at a time when every query has negatives of its own


def as_pixels(feature_map: Tensor) -> Tensor:
    """(B,D,h,w) -> (N,D), row (b·h + i)·w + j."""
    return feature_map.permute(0, 2, 3, 1).reshape(-1, feature_map.shape[1])


def _precise(values: Tensor) -> Tensor:
    """bfloat16 becomes float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels per class, 255 left out: int64 labels of any shape -> (K,) float64, exact and summable over processes."""
    return torch.bincount(labels.flatten(), minlength=IGNORE_INDEX + 1)[:num_classes].double()


def prototype_sums(keys: Tensor, labels: Tensor, num_classes: int, prenorm: bool = False) -> Tensor:
    """Sum of the source keys per class; over `class_counts` it is the raw prototype of paper eq. 10.

    Args:
        keys: (B,D,h,w) teacher embeddings of source images, not normalised.
        labels: (B,h,w) int64 in [0,K) or 255.
        num_classes: K.
        prenorm: bring every key to unit length first (not in the paper).

    Returns:
        (K,D) float32; zeros for absent classes. Summable over processes.
    """
    pixels = as_pixels(keys).float()
    if prenorm:
        pixels = F.normalize(pixels, dim=1, eps=1e-6)
    bins = labels.flatten().clamp(max=num_classes)
    return pixels.new_zeros(num_classes + 1, pixels.shape[1]).index_add_(0, bins, pixels)[:num_classes]


def confidence_sums(pseudo_labels: Tensor, confidence: Tensor, num_classes: int, valid: Tensor | None = None) -> Tensor:
    """Sum of confidence and number of pixels per predicted class (the two parts of paper eq. 17).

    Args:
        pseudo_labels: (B,H,W) int64 in [0,K).
        confidence: (B,H,W) in [0,1].
        num_classes: K.
        valid: (B,H,W) bool, pixels that count; None takes all.

    Returns:
        (2,K) float64. Summable over processes.
    """
    labels, values = pseudo_labels.flatten(), confidence.flatten().double()
    weights = torch.ones_like(values) if valid is None else valid.flatten().double()
    return torch.stack(
        [
            torch.bincount(labels, values * weights, minlength=num_classes),
            torch.bincount(labels, weights, minlength=num_classes),
        ]
    )


def class_confidences(
    sums: Tensor, absent: Literal["zero", "one", "mean", "ema"], running: Tensor | None = None
) -> Tensor:
    """Mean confidence per class from `confidence_sums` (paper eq. 17), (2,K) -> (K,) float64 in [0,1].

    A class that the teacher predicts nowhere gets 0 ("zero", the maximal weight), 1 ("one", weight 0), the mean of
    the present classes ("mean"), or its `running` confidence (K,) ("ema").
    """
    total, count = sums
    present = count > 0
    mean = total / count.clamp(min=1e-9)
    if absent == "ema":
        if running is None:
            raise ValueError("absent='ema' needs the running confidences.")
        fallback = running.double()
    elif absent == "mean":
        fallback = (mean * present).sum() / present.sum().clamp(min=1)
    else:
        fallback = torch.zeros_like(mean) if absent == "zero" else torch.ones_like(mean)
    return torch.where(present, mean, fallback)


def class_weights(confidences: Tensor, members: Tensor, beta: float) -> Tensor:
    """Dynamic re-weighting, paper eq. 17-18: w_c = ((1-conf_c) / max(1-conf))^β, then divided by their sum.

    Args:
        confidences: (K,) in [0,1].
        members: (K,) bool, the C classes of the benchmark; the others get 0.
        beta: β >= 0; 0 weighs all alike.

    Returns:
        (K,) float32, sum 1. All confidences exactly 1: every member 1/C.
    """
    doubt = (1 - confidences).clamp(min=0) * members
    raw = torch.where(members & (doubt.max() > 0), doubt / doubt.max().clamp(min=1e-30), members.to(doubt.dtype))
    weights = torch.where(members, raw**beta, 0.0)
    return (weights / weights.sum()).float()


def num_queries_per_class(
    counts: Tensor, num_classes_of_benchmark: int, num_queries: int, sampling: Literal["cbqs", "ceqs"]
) -> list[int]:
    """How many queries each class sends.

    CBQS (paper eq. 16): ⌈C·p̂(c)·n⌉, in proportion to the class's share p̂ and at least one. CEQS: n each.

    Args:
        counts: (K,) pixels per class; absent classes send none.
        num_classes_of_benchmark: C.
        num_queries: n.
        sampling: "cbqs" or "ceqs".
    """
    total = max(float(counts.sum()), 1.0)
    shares = [count / total for count in counts.tolist()]
    if sampling == "ceqs":
        return [num_queries if share > 0 else 0 for share in shares]
    # The ceiling must not turn 73.0000001 into 74.
    return [math.ceil(num_classes_of_benchmark * share * num_queries - 1e-9) for share in shares]


@dataclass(frozen=True)
class SortedPixels:
    """Pixels grouped by class, shuffled inside a class: class c is order[starts[c] : starts[c] + counts[c]].

    A group K holds pixels without a class if they are admitted as negatives.
    """

    order: Tensor
    starts: list[int]
    counts: list[int]

    def of_class(self, class_id: int, num: int, generator: Generator) -> Tensor:
        """`num` pixels of a class without replacement, or with replacement if it has fewer."""
        start, count = self.starts[class_id], self.counts[class_id]
        if num <= count:
            return self.order[start : start + num]  # the order inside a class is random already
        draws = torch.randint(count, (num,), generator=generator)
        return self.order[start + draws.to(self.order.device)]

    def of_other_classes(self, class_id: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
        """Pixels of any other class, uniform with replacement; empty if there are none."""
        start, count = self.starts[class_id], self.counts[class_id]
        others = self.order.numel() - count
        if others == 0:
            return self.order.new_empty(0)
        draws = torch.randint(others, shape, generator=generator).to(self.order.device)
        return self.order[draws + count * (draws >= start)]  # jump over the class's own segment


def sort_by_class(labels: Tensor, admitted: Tensor, num_groups: int, generator: Generator) -> SortedPixels:
    """Group the admitted pixels by class: labels (N,) int64 in [0, num_groups), admitted (N,) bool."""
    shuffle = torch.rand(labels.numel(), generator=generator, dtype=torch.float64).to(labels.device)
    # Left-out pixels sort behind every group; the random part only orders pixels inside a group.
    order = torch.argsort(torch.where(admitted, labels, num_groups) + shuffle)
    counts = torch.bincount(labels[admitted], minlength=num_groups)[:num_groups].tolist()
    starts = [sum(counts[:group]) for group in range(num_groups)]
    return SortedPixels(order[: sum(counts)], starts, counts)


@dataclass(frozen=True)
class PullSamples:
    """What is compared with what, as rows of the (N,D) views. One entry per class that sends queries.

    Attributes:
        classes: class ids.
        queries: (n_c,) rows of the pseudo-target embeddings.
        source_negatives, target_negatives: (m_s,) and (m_t,) rows of the teacher's embeddings, shared by the queries
            of the class, or (n_c,m_s) and (n_c,m_t) if every query has its own. Empty where a set is empty.
    """

    classes: list[int]
    queries: list[Tensor]
    source_negatives: list[Tensor]
    target_negatives: list[Tensor]


def unreliable_pixels(confidence: Tensor, ratio: float, scope: Literal["batch", "image"]) -> Tensor:
    """Pixels below the α-quantile γ of confidence (paper eq. 13-14): (B,h,w) in [0,1] -> (B,h,w) bool.

    γ is interpolated linearly, over the batch or per image; the comparison is strict, so equal confidences give none.
    """
    values = confidence.float().reshape(confidence.shape[0] if scope == "image" else 1, -1)
    return (values < torch.quantile(values, ratio, dim=1, keepdim=True)).view_as(confidence)


def sample_pull(
    labels: Tensor,
    pseudo_labels: Tensor | None,
    unreliable: Tensor | None,
    queries_per_class: Sequence[int],
    num_negatives: int,
    generator: Generator,
    *,
    uniform_queries: int | None = None,
    negatives: Literal["denps", "pooled"] = "denps",
    share: Literal["class", "query"] = "class",
    ignore_as_negative: bool = False,
    query_labels: Tensor | None = None,
) -> PullSamples:
    """Draw queries and negatives (paper section 3.4, method 5.4 and 5.6).

    Args:
        labels: (B,h,w) int64 source labels at the size of the embeddings, 255 ignored.
        pseudo_labels: (B,h,w) int64 of the target; None without a target.
        unreliable: (B,h,w) bool, target pixels admitted as negatives.
        queries_per_class: K numbers, see `num_queries_per_class`.
        num_negatives: m per query.
        generator: of the CPU; equal state gives equal samples on every device.
        uniform_queries: draw so many valid pixels whatever their class, instead of `queries_per_class`.
        negatives: "denps" draws half from each domain, "pooled" draws from their union.
        share: one set of negatives for a class, or one for every query.
        ignore_as_negative: admit source pixels labelled 255 as negatives of every class.
        query_labels: (B,h,w) int64 of the images that are pulled, 255 ignored, if they are not the source's scenes.

    Returns:
        PullSamples. A class without pixels here, or without any negative for its queries, keeps its queries out of
        nothing: it is listed with empty negatives, and the loss skips it.
    """
    num_classes = len(queries_per_class)
    flat = labels.flatten()
    known = flat != IGNORE_INDEX
    source = sort_by_class(
        flat.clamp(max=num_classes), known | ignore_as_negative, num_classes + ignore_as_negative, generator
    )
    target = None
    if pseudo_labels is not None and unreliable is not None:
        target = sort_by_class(pseudo_labels.flatten(), unreliable.flatten(), num_classes, generator)

    asked, asked_labels = source, flat
    if query_labels is not None:
        asked_labels = query_labels.flatten()
        valid = asked_labels != IGNORE_INDEX
        asked = sort_by_class(asked_labels.clamp(max=num_classes), valid, num_classes, generator)
    rows: list[Tensor] = [
        asked.of_class(class_id, wanted if asked.counts[class_id] else 0, generator)
        for class_id, wanted in enumerate(queries_per_class)
    ]
    if uniform_queries is not None:
        num_known = sum(asked.counts[:num_classes])
        picked = torch.randint(max(num_known, 1), (uniform_queries if num_known else 0,), generator=generator)
        pixels = asked.order[picked.to(asked.order.device)]
        rows = [pixels[asked_labels[pixels] == class_id] for class_id in range(num_classes)]

    samples = PullSamples([], [], [], [])
    for class_id, queries in enumerate(rows):
        if not queries.numel():
            continue
        others_s = source.order.numel() - source.counts[class_id]
        others_t = target.order.numel() - target.counts[class_id] if target is not None else 0
        if negatives == "denps":
            from_source = num_negatives // 2 if others_s and others_t else num_negatives * (others_s > 0)
        else:  # a draw from the union falls into the source with the source's share
            draws = torch.rand(num_negatives, generator=generator, dtype=torch.float64)
            from_source = int((draws < others_s / max(others_s + others_t, 1)).sum())
        from_target = (num_negatives - from_source) * (others_t > 0)
        per_query = (queries.numel(),) if share == "query" else ()
        samples.classes.append(class_id)
        samples.queries.append(queries)
        samples.source_negatives.append(source.of_other_classes(class_id, (*per_query, from_source), generator))
        samples.target_negatives.append(
            queries.new_empty(0)
            if target is None
            else target.of_other_classes(class_id, (*per_query, from_target), generator)
        )
    return samples


def info_nce(queries: Tensor, prototype: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """-log( e^{q·k⁺/τ} / (e^{q·k⁺/τ} + Σ e^{q·k⁻/τ}) ) for the queries of one class (paper eq. 4).

    Args:
        queries: (Q,D) unit length.
        prototype: (D,) unit length, k⁺.
        negatives: (M,D) unit length, shared, or (Q,M,D), one set per query.
        temperature: τ > 0.

    Returns:
        (Q,) float32 >= 0. All cosines equal and m negatives: ln(m+1).
    """
    positive = queries @ prototype / temperature
    if negatives.ndim == 2:
        others = queries @ negatives.T / temperature
    else:
        others = torch.einsum("qd,qmd->qm", queries, negatives) / temperature
    return torch.logsumexp(torch.cat([positive[:, None], others], dim=1), dim=1) - positive


class _InfoNCEOfUnitRows(torch.autograd.Function):
    """`info_nce` with shared negatives, its gradient worked out on the spot, so that no (Q,M) matrix is kept.

    With shares p of the softmax, dl/dq = (Σ p_j k_j - (1 - p⁺) k⁺)/τ. Prototype and negatives are the teacher's: they
    get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, prototype: Tensor, negatives: Tensor, temperature: float) -> Tensor:
        queries = queries / temperature
        positive, others = queries @ prototype, queries @ negatives.T  # (Q,), (Q,M)
        highest = torch.maximum(positive, others.amax(dim=1))
        others.sub_(highest[:, None]).exp_()
        total = others.sum(dim=1).add_((positive - highest).exp_())
        share = (positive - highest).exp_() / total  # p⁺
        direction = (others @ negatives).div_(total[:, None]) - (1 - share)[:, None] * prototype
        ctx.save_for_backward(direction.div_(temperature))
        return total.log_() + highest - positive

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return grad[:, None] * direction, None, None, None


def pull_loss(
    embeddings: Tensor,
    source_keys: Tensor,
    target_keys: Tensor | None,
    prototypes: Tensor,
    samples: PullSamples,
    weights: Tensor,
    *,
    temperature: float,
    objective: Literal["infonce", "mse"] = "infonce",
    reduction: Literal["mean_w", "sum_paper", "mean_paper"] = "mean_w",
    num_classes_of_benchmark: int = 1,
) -> Tensor:
    """Pull pseudo-target pixels to the source prototype of their class (paper eq. 5; MSE: method 5.7).

    Args:
        embeddings: (B,D,h,w) student on pseudo-target images, with gradient.
        source_keys: (B,D,h,w) teacher on source images.
        target_keys: (B,D,h,w) teacher on target images; None without a target.
        prototypes: (K,D) mean source key per class, any length; normalised here (paper eq. 11).
        samples: rows to compare.
        weights: (K,) w* of `class_weights`.
        temperature: τ > 0, for "infonce".
        objective: "infonce", or "mse" = 2 - 2 q·k⁺ without negatives.
        reduction: "mean_w" Σ w*_c mean(ℓ), "sum_paper" (1/C) Σ w*_c Σ ℓ (eq. 5 literally),
            "mean_paper" (1/C) Σ w*_c mean(ℓ).
        num_classes_of_benchmark: C, for the last two.

    Returns:
        () float32, float64 if embeddings are, >= 0. Nothing to compare: 0 that is connected to `embeddings`, so every
        gradient exists.
    """
    if not samples.classes:
        return _precise(embeddings).sum() * 0
    prototypes = F.normalize(_precise(prototypes), dim=1, eps=1e-6)
    # One gather for all classes: every gather of its own would fill a dense (N,D) gradient. Normalised after it.
    queries = as_pixels(embeddings).index_select(0, torch.cat(samples.queries))
    all_queries = F.normalize(_precise(queries), dim=1, eps=1e-6)
    per_class = all_queries.split([len(rows) for rows in samples.queries])
    loss = all_queries[0].sum() * 0  # if no class has negatives, the gradient is there and zero
    for class_id, picked, from_source, from_target in zip(
        samples.classes, per_class, samples.source_negatives, samples.target_negatives, strict=True
    ):
        positive = prototypes[class_id]
        if objective == "mse":
            per_query = 2 - 2 * (picked @ positive)
        elif not from_source.numel() and not from_target.numel():
            continue
        else:
            per_query = _info_nce_rows(
                picked, positive, source_keys, target_keys, from_source, from_target, temperature
            )
        loss = loss + weights[class_id] * (per_query.sum() if reduction == "sum_paper" else per_query.mean())
    return loss if reduction == "mean_w" else loss / num_classes_of_benchmark


def _info_nce_rows(
    queries: Tensor,
    prototype: Tensor,
    source_keys: Tensor,
    target_keys: Tensor | None,
    from_source: Tensor,
    from_target: Tensor,
    temperature: float,
) -> Tensor:
    """info_nce of one class with negatives given as rows; own negatives per query go in chunks, to bound the memory."""

    keys = [as_pixels(source_keys)] if target_keys is None else [as_pixels(source_keys), as_pixels(target_keys)]

    def gather(*rows: Tensor) -> Tensor:
        parts = [
            pixels.index_select(0, picked.flatten()).view(*picked.shape, -1)
            for pixels, picked in zip(keys, rows, strict=False)
            if picked.numel()
        ]
        return F.normalize(_precise(torch.cat(parts, dim=-2)), dim=-1, eps=1e-6)

    if from_source.ndim == 1 and from_target.ndim == 1:
        negatives = gather(from_source, from_target)
        per_query: Tensor = _InfoNCEOfUnitRows.apply(queries, prototype, negatives, temperature)
        return per_query

    def chunk(picked: Tensor, rows_s: Tensor, rows_t: Tensor) -> Tensor:
        return info_nce(picked, prototype, gather(rows_s, rows_t), temperature)

    parts = []
    for start in range(0, len(queries), QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        # An empty set has no rows to slice; recomputing the gather in backward keeps one chunk in memory.
        rows_s = from_source[rows] if from_source.ndim == 2 else from_source
        rows_t = from_target[rows] if from_target.ndim == 2 else from_target
        parts.append(checkpoint(chunk, queries[rows], rows_s, rows_t, use_reentrant=False))
    return torch.cat(parts)
