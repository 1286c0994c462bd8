"""The pull loss and its parts (paper section 3.2-3.4; method 5.3-5.8).

Legend: B batch, K classes of the run, D embedding size, h×w feature map, N = B·h·w pixels, n queries per class on
average, m negatives. Maps are (B,D,h,w), best in channels-last memory: their (N,D) view is then free.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from ..device import constant, exact_products, integers


def as_pixels(feature_map: Tensor) -> Tensor:
    """(B,D,h,w) -> (N,D), row (b·h + i)·w + j."""
    return feature_map.permute(0, 2, 3, 1).reshape(-1, feature_map.shape[1])


def _precise(values: Tensor) -> Tensor:
    """bfloat16 becomes float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels per class, 255 left out: int64 labels of any shape -> (K,) float64, exact and summable over processes."""
    flat, one = labels.flatten(), constant((1.0,), labels.device, torch.float64)
    return one.new_zeros(256).index_add_(0, flat, one.expand(len(flat)))[:num_classes]


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
    pixels = unit(as_pixels(keys)) if prenorm else as_pixels(keys).float()
    return pixels.new_zeros(256, pixels.shape[1]).index_add_(0, labels.flatten(), pixels)[:num_classes]


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
    one = constant((1.0,), confidence.device, torch.float64)
    values = torch.stack([confidence, one.view(1, 1, 1).expand_as(confidence)], dim=-1)
    if valid is not None:
        values = values * valid[..., None]
    sums = values.new_zeros(num_classes, 2)
    return sums.index_add_(0, pseudo_labels.flatten(), values.view(-1, 2)).T


def class_confidences(
    sums: Tensor, absent: Literal["zero", "one", "mean", "ema"], running: Tensor | None = None
) -> Tensor:
    """Mean confidence per class from `confidence_sums` (paper eq. 17), (2,K) -> (K,) float64 in [0,1].

    A class that the teacher predicts nowhere gets 0 ("zero", the maximal weight), 1 ("one", weight 0), the mean of
    the present classes ("mean"), or its `running` confidence (K,) ("ema").
    """
    total, count = sums
    mean = total / count.clamp(min=1e-9)
    if absent == "zero":
        return mean
    present = count > 0
    if absent == "ema":
        if running is None:
            raise ValueError("absent='ema' needs the running confidences.")
        fallback = running.double()
    elif absent == "mean":
        fallback = (mean * present).sum() / present.sum().clamp(min=1)
    else:
        fallback = torch.ones_like(mean)
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
    # Its logarithm is -∞ nowhere but outside, so that equal weights are left if nobody doubts.
    doubt = (1 - confidences.double()).clamp(min=torch.finfo(torch.float64).tiny)
    outside = constant((-math.inf,), doubt.device, doubt.dtype)
    return torch.where(members, torch.xlogy(beta, doubt), outside).softmax(dim=0).float()


def num_queries_per_class(
    counts: Tensor, num_classes_of_benchmark: int, num_queries: int, sampling: Literal["cbqs", "ceqs"]
) -> Tensor:
    """How many queries each class sends, (K,) int64.

    CBQS (paper eq. 16): ⌈C·p̂(c)·n⌉, in proportion to the class's share p̂ and at least one. CEQS: n each.

    Args:
        counts: (K,) pixels per class; absent classes send none.
        num_classes_of_benchmark: C.
        num_queries: n.
        sampling: "cbqs" or "ceqs".
    """
    if sampling == "ceqs":
        return (counts > 0) * num_queries
    total = counts.sum(dtype=torch.float64).clamp(min=1)
    # The ceiling, which must not turn 73.0000001 into 74.
    nearly_one = constant((1 - 1e-9,), counts.device, torch.float64)
    return torch.addcdiv(nearly_one, counts, total, value=num_classes_of_benchmark * num_queries).long()


@dataclass(frozen=True)
class SortedPixels:
    """Pixels of S maps of one size, in each grouped by class, and shuffled inside a class.

    Attributes:
        order: (S,N) rows of the (N,D) views.
        starts, counts: (S,K+1) int64: in map s order[s, starts[s, c] : starts[s, c] + counts[s, c]] is class c. The
            last column is what belongs to none.
    """

    order: Tensor
    starts: Tensor
    counts: Tensor

    def of_other_classes(self, draws: Tensor, others: Tensor, classes: Tensor | None) -> Tensor:
        """Pixels of any other class, uniform with replacement; where a class is alone they mean nothing.

        Args:
            draws: (S,K,...) in [0,1), one for each pixel, of the first S maps.
            others: (S,K), how many pixels of a map there are to draw from: its first ones without those of the class.
            classes: (G,) of whom the draws are, which are then (S,G,...); None: of all classes in their order.

        Returns:
            Rows, in the shape of `draws`.
        """
        maps = len(draws)
        segments = (self.starts[:maps, :-1], self.counts[:maps, :-1], others)
        chosen = segments if classes is None else (values[:, classes] for values in segments)
        starts, counts, others = (values[(..., *[None] * (draws.ndim - 2))] for values in chosen)
        among = draws * others
        # Over the class's own segment. A class that is alone stays at 0, where there is something.
        jumped = torch.addcmul(among.long(), among > starts, counts)
        return self.order[:maps].gather(1, jumped.flatten(1)).view(draws.shape)


def sort_by_class(maps: Tensor, num_classes: int, generator: Generator) -> SortedPixels:
    """Group pixels by class.

    Args:
        maps: (S,...) int64; classes in [0,K), 255 belongs to none.
        num_classes: K.
        generator: of their device.
    """
    draws = torch.rand(maps.numel(), generator=generator, dtype=torch.float64, device=maps.device)
    ordered, order = (maps.flatten(1) + draws.view(len(maps), -1)).sort(dim=1)
    bounds = torch.searchsorted(ordered, _class_bounds(len(maps), num_classes, maps.device))
    return SortedPixels(order, bounds[:, :-1], bounds.diff(dim=1))


@lru_cache(maxsize=8)
def _class_bounds(num_maps: int, num_classes: int, device: torch.device) -> Tensor:
    """(S,K+2), of every map 0, 1, ..., K, and what is behind all that belongs to none."""
    return constant((*range(num_classes + 1), 256) * num_maps, device, torch.float64).view(num_maps, -1)


@lru_cache(maxsize=8)
def _first_half(count: int, device: torch.device) -> Tensor:
    """(count,) bool, true for half of them, rounded down."""
    return constant(tuple(index < count // 2 for index in range(count)), device, torch.bool)


@dataclass(frozen=True)
class PullSamples:
    """What is compared with what, as rows of the (N,D) views, in shapes that do not depend on any value.

    The queries of a class fill as many blocks of R rows as they need. What remains of a block is not `counted`.

    Attributes:
        classes: (G,) int64, the class of every block.
        queries: (G,R) rows of the pseudo-target embeddings.
        counted: (G,R) bool.
        num_queries: (K,) int64, queries of each class.
        source_negatives, target_negatives: (K,m) rows of the teacher's embeddings, shared by the queries of a class, or
            (G,R,m) if every query has its own. The target's are None without a target.
        of_source: bool in the same shape, which of the two is the negative; None without a target.
        comparable: (K,) bool, classes that have a negative.
    """

    classes: Tensor
    queries: Tensor
    counted: Tensor
    num_queries: Tensor
    source_negatives: Tensor
    target_negatives: Tensor | None
    of_source: Tensor | None
    comparable: Tensor


def unreliable_pixels(confidence: Tensor, ratio: float, scope: Literal["batch", "image"]) -> Tensor:
    """Pixels below the α-quantile γ of confidence (paper eq. 13-14): (B,h,w) in [0,1] -> (B,h,w) bool.

    γ is interpolated linearly, over the batch or per image; the comparison is strict, so equal confidences give none.
    """
    values = confidence.float().reshape(confidence.shape[0] if scope == "image" else 1, -1)
    place = ratio * (values.shape[1] - 1)
    around = values.sort(dim=1).values[:, int(place) : int(place) + 2]
    gamma = torch.lerp(around[:, :1], around[:, -1:], place - int(place))
    return (values < gamma).view_as(confidence)


def sample_pull(
    pixels: SortedPixels,
    queries_per_class: Tensor,
    max_queries: int,
    num_negatives: int,
    generator: Generator,
    *,
    has_target: bool = True,
    uniform: bool = False,
    negatives: Literal["denps", "pooled"] = "denps",
    share: Literal["class", "query"] = "class",
    ignore_as_negative: bool = False,
) -> PullSamples:
    """Draw queries and negatives (paper section 3.4, method 5.4 and 5.6).

    How many queries a class sends is known on the device alone, and nothing here asks it.

    Args:
        pixels: of the source's labels; with a target of the pseudo-labels of its unreliable pixels, see
            `unreliable_pixels`; and of the images that are pulled, if they are not the source's scenes.
        queries_per_class: (K,) int64, see `num_queries_per_class`.
        max_queries: what they cannot exceed together: C·n + K with CBQS, K·n with CEQS.
        num_negatives: m per query.
        generator: of the device of the pixels.
        has_target: whether the second map is that of the target.
        uniform: draw `max_queries` valid pixels whatever their class, instead of `queries_per_class`; classes that send
            none by these are left out.
        negatives: "denps" draws half from each domain, "pooled" draws from their union.
        share: one set of negatives for a class, or one for every query.
        ignore_as_negative: admit source pixels labelled 255 as negatives of every class.

    Returns:
        PullSamples. A class without pixels here sends nothing.
    """
    num_classes, domains, device = len(queries_per_class), 1 + has_target, pixels.order.device
    rows = min(max(max_queries // num_classes, 8), 128)  # R
    blocks = -(-max_queries // rows) + num_classes  # G, even if every class begins one more block for a single query

    def draw(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64, device=device)

    asked = -1 if len(pixels.order) > domains else 0
    order, starts, counts = pixels.order[asked], pixels.starts[asked], pixels.counts[asked, :-1]
    first, num_queries = starts[:-1], queries_per_class * (counts > 0)
    if uniform:
        picked = (draw(max_queries) * starts[-1]).long().sort().values  # so by class, too
        order, first = order[picked], torch.searchsorted(picked, first)
        num_queries = (torch.searchsorted(picked, starts[1:].contiguous()) - first) * (num_queries > 0)
    classes, before = _blocks(num_queries, rows, blocks)
    wanted, start, count, before = torch.stack([num_queries, first, counts, before])[:, classes, None]
    place = integers(len(classes) * rows, torch.int64, device).view(-1, rows)
    ranks = torch.sub(place, before, alpha=rows)  # (G,R) number of every row among those of its class
    counted = ranks < wanted

    whose = classes if share == "query" else None
    size = (domains, *(ranks.shape if share == "query" else (num_classes,)), num_negatives)
    again = 0 if uniform else ranks.numel()
    draws_q, draws_k = draw(again + math.prod(size)).split([again, math.prod(size)])
    if not uniform:
        ranks = torch.where(wanted <= count, ranks, (draws_q.view_as(ranks) * count).long())  # with replacement
    queries = order[(start + ranks).clamp(max=len(order) - 1)]

    admitted = pixels.starts[:domains, -1:]
    if ignore_as_negative:
        admitted = torch.cat([admitted[:1] + pixels.counts[:1, -1:], admitted[1:]])
    found = admitted - pixels.counts[:domains, :-1]  # (domains,K) negatives of each class
    drawn, some = pixels.of_other_classes(draws_k.view(size), found, whose), found > 0
    if not has_target:
        return PullSamples(classes, queries, counted, num_queries, drawn[0], None, None, some[0])
    if negatives == "denps":  # half from each, and all from one if the other has none
        from_source = torch.where(_first_half(num_negatives, device), some[0][:, None], ~some[1][:, None])
    else:  # a draw from the union falls into the source with the source's share
        from_source = draw(num_classes, num_negatives) < (found[0] / found.sum(dim=0).clamp(min=1))[:, None]
    if whose is not None:
        from_source = from_source[whose, None].expand(size[1:])
    return PullSamples(classes, queries, counted, num_queries, drawn[0], drawn[1], from_source, some.any(dim=0))


def _blocks(num_queries: Tensor, rows: int, blocks: int) -> tuple[Tensor, Tensor]:
    """(G,) class of every block, and (K,) how many blocks stand before those of a class.

    Args:
        num_queries: (K,) int64.
        rows: R.
        blocks: G. On a CPU, which has nothing to wait for, those behind the last query are left out.
    """
    minus = num_queries // -rows  # of each class its blocks, below 0: so the division rounds up
    ends = minus.cumsum(0)
    before = minus - ends
    if ends.device.type == "cpu":
        blocks = max(-int(ends[-1]), 1)
    return torch.searchsorted(before[1:], integers(blocks, torch.int64, ends.device), right=True), before


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
    # No matrix product, which TF32 would round, also in the backward.
    positive = (queries * prototype).sum(dim=1) / temperature
    others = (queries[:, None] * negatives).sum(dim=2) / temperature
    return torch.logsumexp(torch.cat([positive[:, None], others], dim=1), dim=1) - positive


class _InfoNCE(torch.autograd.Function):
    """`info_nce` of blocks of queries, its gradient worked out on the spot.

    With p the softmax over all keys, dl/dq = (Σ p_j k_j - k⁺)/τ. Keys are the teacher's: they get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor) -> Tensor:
        """(G,R,D) of unit length and (G,1+m,D) of length 1/τ, the prototype first -> (G,R)."""
        shares = torch.bmm(queries, keys.mT).log_softmax(dim=2)
        loss = -shares[..., 0]
        ctx.save_for_backward(torch.baddbmm(keys[:, :1], shares.exp_(), keys, beta=-1))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return grad[..., None] * direction, None


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
    # One gather for all classes: every gather of its own would fill a dense (N,D) gradient. Normalised after it.
    queries, prototypes = unit(_rows(embeddings, samples.queries)), _precise(prototypes)  # (G,R,D)
    weights = weights.to(queries.dtype)
    if objective == "mse":
        per_query = 2 - 2 * (queries * unit(prototypes)[samples.classes, None]).sum(dim=2)
    else:
        weights = weights * samples.comparable
        per_query = _info_nce_of_samples(queries, prototypes, source_keys, target_keys, samples, temperature)
    if reduction != "sum_paper":
        weights = weights / samples.num_queries  # no number for a class without queries: none of it is counted
    nothing = constant((0.0,), weights.device, weights.dtype)
    loss = per_query.flatten() @ torch.where(samples.counted, weights[samples.classes, None], nothing).flatten()
    return loss if reduction == "mean_w" else loss / num_classes_of_benchmark


def _info_nce_of_samples(
    queries: Tensor,
    prototypes: Tensor,
    source_keys: Tensor,
    target_keys: Tensor | None,
    samples: PullSamples,
    temperature: float,
) -> Tensor:
    """(G,R). Own negatives per query go block by block, to bound the memory."""
    rows_s, rows_t, of_source = samples.source_negatives, samples.target_negatives, samples.of_source

    def gather(rows_s: Tensor, rows_t: Tensor | None, of_source: Tensor | None) -> Tensor:
        found = _rows(source_keys, rows_s)
        if target_keys is None or rows_t is None or of_source is None:
            return _precise(found)
        return _precise(torch.where(of_source[..., None], found, _rows(target_keys, rows_t)))

    if rows_s.ndim == 2:

        def keys_of(classes: Tensor | slice) -> Tensor:
            """(k,1+m,D), of length 1/τ, the prototype first."""
            rest = (None, None) if rows_t is None or of_source is None else (rows_t[classes], of_source[classes])
            keys = torch.cat([prototypes[classes, None], gather(rows_s[classes], *rest)], dim=1)
            nothing, lengths = constant((0.0,), keys.device, keys.dtype), keys.norm(dim=-1, keepdim=True)
            return torch.addcdiv(nothing, keys, lengths.clamp(min=1e-6), value=1 / temperature)

        with exact_products():
            compare = _class_by_class if queries.device.type == "cpu" else _all_at_once
            return compare(queries, samples, keys_of)
    positives = unit(prototypes)[samples.classes]

    def block(index: int, picked: Tensor) -> Tensor:
        rest = (None, None) if rows_t is None or of_source is None else (rows_t[index], of_source[index])
        return info_nce(picked, positives[index], unit(gather(rows_s[index], *rest)), temperature)

    # Recomputing the gather in backward keeps one block in memory.
    parts = [checkpoint(block, index, picked, use_reentrant=False) for index, picked in enumerate(queries)]
    return torch.stack(parts)


def _all_at_once(queries: Tensor, samples: PullSamples, keys_of: Callable[[Tensor | slice], Tensor]) -> Tensor:
    """(G,R), in as few launches as there can be."""
    per_query: Tensor = _InfoNCE.apply(queries, keys_of(slice(None))[samples.classes])
    return per_query


def _class_by_class(queries: Tensor, samples: PullSamples, keys_of: Callable[[Tensor | slice], Tensor]) -> Tensor:
    """The same for a CPU, which has no launches to save: the keys of one class stay in its caches, those of all do not.

    And it waits for nothing, so that rows that are not counted are left out.
    """
    classes, blocks = samples.classes.unique_consecutive(return_counts=True)
    found = []
    for one, some in zip(classes.split(1), queries.split(blocks.tolist()), strict=True):
        count, (height, rows, _) = int(samples.num_queries[one]), some.shape
        per_query: Tensor = _InfoNCE.apply(some.flatten(0, 1)[None, :count], keys_of(one))
        found.append(F.pad(per_query, (0, height * rows - count)).view(height, rows))
    return torch.cat(found)


def _rows(maps: Tensor, rows: Tensor) -> Tensor:
    """(...,D), the pixels of (B,D,h,w) that are asked for by the rows (...) of their (N,D) view."""
    return as_pixels(maps).index_select(0, rows.flatten()).view(*rows.shape, -1)


def unit(vectors: Tensor) -> Tensor:
    """(...,D) at unit length, in float32 at least; zeros stay."""
    return F.normalize(_precise(vectors), dim=-1, eps=1e-6)
