"""The pull loss and its parts (paper section 3.2-3.4; method 5.3-5.8).

Legend: B batch, K classes of the run, D embedding size, h×w feature map, N = B·h·w pixels, n queries per class on
average, m negatives. Maps are (B,D,h,w), best in channels-last memory: their (N,D) view is then free.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from ..device import exact_products, integers


def as_pixels(feature_map: Tensor) -> Tensor:
    """(B,D,h,w) -> (N,D), row (b·h + i)·w + j."""
    return feature_map.permute(0, 2, 3, 1).reshape(-1, feature_map.shape[1])


def _precise(values: Tensor) -> Tensor:
    """bfloat16 becomes float32; float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def class_counts(labels: Tensor, num_classes: int) -> Tensor:
    """Pixels per class, 255 left out: int64 labels of any shape -> (K,) float64, exact and summable over processes."""
    flat = labels.flatten().clamp(max=num_classes)
    counts = torch.zeros(num_classes + 1, dtype=torch.float64, device=labels.device)
    return counts.index_add_(0, flat, counts.new_ones(()).expand(len(flat)))[:num_classes]


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
    values = torch.stack([confidence, torch.ones_like(confidence)], dim=-1).double()
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
    weights = (doubt / doubt.amax()).nan_to_num(nan=1.0) ** beta * members
    return (weights / weights.sum()).float()


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
    # The ceiling must not turn 73.0000001 into 74.
    shares = counts.double() / counts.sum().clamp(min=1)
    return (shares * (num_classes_of_benchmark * num_queries) - 1e-9).ceil().long()


@dataclass(frozen=True)
class SortedPixels:
    """Pixels of S maps of one size, map after map, grouped by class, and shuffled inside a class.

    Attributes:
        order: (S·N,) rows of the (N,D) views.
        starts, counts: (S,K+1) int64: pixels of class c of map s are order[starts[s, c] : starts[s, c] + counts[s, c]].
            The last column is what belongs to no class.
    """

    order: Tensor
    starts: Tensor
    counts: Tensor

    def of_other_classes(self, draws: Tensor, admitted: Tensor, classes: Tensor | None) -> Tensor:
        """Pixels of any other class, uniform with replacement; where a class is alone they mean nothing.

        Args:
            draws: (S,K,...) in [0,1), one for each pixel, of the first S maps.
            admitted: (S,1), pixels of a map that may be drawn: its first so many.
            classes: (G,) of whom the draws are, which are then (S,G,...); None: of all classes in their order.

        Returns:
            Rows, in the shape of `draws`.
        """
        maps = len(draws)
        segments = torch.stack([self.starts[:maps, :-1], self.counts[:maps, :-1], admitted - self.counts[:maps, :-1]])
        segments = segments if classes is None else segments[..., classes]
        starts, counts, others = segments.view(*segments.shape, *[1] * (draws.ndim - 2))
        firsts = self.starts[:maps, 0].view(-1, *[1] * (draws.ndim - 1))
        picked = (draws * others).long() + firsts
        jumped = picked + counts * (picked >= starts)  # over the class's own segment
        return self.order[jumped.clamp(max=len(self.order) - 1)]


def sort_by_class(maps: Sequence[Tensor], num_classes: int, generator: Generator) -> SortedPixels:
    """Group pixels by class.

    Args:
        maps: int64 of one shape; classes in [0,K), anything larger belongs to none.
        num_classes: K.
        generator: of their device.
    """
    groups = num_classes + 1
    keys = torch.cat([labels.flatten().clamp(max=num_classes) + groups * index for index, labels in enumerate(maps)])
    shuffled = keys + torch.rand(len(keys), generator=generator, dtype=torch.float64, device=keys.device)
    ordered, order = shuffled.sort()
    bounds = torch.searchsorted(ordered, integers(groups * len(maps) + 1, torch.float64, keys.device))
    return SortedPixels(order % maps[0].numel(), bounds[:-1].view(-1, groups), bounds.diff().view(-1, groups))


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

    asked, order = -1 if len(pixels.starts) > domains else 0, pixels.order
    starts, counts = pixels.starts[asked], pixels.counts[asked, :-1]
    first, num_queries = starts[:-1], queries_per_class * (counts > 0)
    if uniform:
        picked = (starts[0] + draw(max_queries) * (starts[-1] - starts[0])).long().sort().values  # so by class, too
        order, first = order[picked], torch.searchsorted(picked, first)
        num_queries = (torch.searchsorted(picked, starts[1:].contiguous()) - first) * (num_queries > 0)
    classes, ranks = _blocks(num_queries, rows, blocks)
    wanted, start, count = torch.stack([num_queries, first, counts])[:, classes, None]
    counted = ranks < wanted
    if not uniform:
        ranks = torch.where(wanted <= count, ranks, (draw(*ranks.shape) * count).long())  # with replacement
    queries = order[(start + ranks).clamp(max=len(order) - 1)]

    whose = classes if share == "query" else None
    size = (*(ranks.shape if share == "query" else (num_classes,)), num_negatives)
    admitted = pixels.starts[:domains, -1:] - pixels.starts[:domains, :1]
    if ignore_as_negative:
        admitted = torch.cat([admitted[:1] + pixels.counts[:1, -1:], admitted[1:]])
    drawn = pixels.of_other_classes(draw(domains, *size), admitted, whose)
    found = admitted - pixels.counts[:domains, :-1]  # (domains,K) negatives of each class
    if not has_target:
        return PullSamples(classes, queries, counted, num_queries, drawn[0], None, None, found[0] > 0)
    found_s, found_t = found
    if negatives == "denps":
        of_target = num_negatives - num_negatives // 2
        of_source = (found_s > 0) * (num_negatives - of_target * (found_t > 0))
        from_source = integers(num_negatives, torch.int64, device) < of_source[:, None]
    else:  # a draw from the union falls into the source with the source's share
        from_source = draw(num_classes, num_negatives) < (found_s / (found_s + found_t).clamp(min=1))[:, None]
    if whose is not None:
        from_source = from_source[whose, None].expand(size)
    comparable = found_s + found_t > 0
    return PullSamples(classes, queries, counted, num_queries, drawn[0], drawn[1], from_source, comparable)


def _blocks(num_queries: Tensor, rows: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Which queries stand where: (G,) class of every block and (G,R) number of every row among those of its class.

    Args:
        num_queries: (K,) int64.
        rows: R.
        blocks: G. On a CPU, which has nothing to wait for, those behind the last query are left out.
    """
    needed = (num_queries + (rows - 1)) // rows
    ends = needed.cumsum(0)
    if ends.device.type == "cpu":
        blocks = max(int(ends[-1]), 1)
    index = integers(blocks, torch.int64, ends.device)
    classes = torch.searchsorted(ends, index, right=True).clamp(max=len(ends) - 1)
    inside = index - (ends - needed)[classes]
    return classes, inside[:, None] * rows + integers(rows, torch.int64, ends.device)


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
    def forward(ctx: Any, queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
        """(G,R,D) and (G,1+m,D) of unit length, the prototype first -> (G,R)."""
        empty = queries.new_empty(())
        shares = torch.baddbmm(empty, queries, keys.mT, beta=0, alpha=1 / temperature).log_softmax(dim=2)
        loss = -shares[..., 0]
        shares.exp_()[..., 0] -= 1
        ctx.save_for_backward(torch.baddbmm(empty, shares, keys, beta=0, alpha=1 / temperature))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (direction,) = ctx.saved_tensors
        return grad[..., None] * direction, None, None


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
        weights = weights / samples.num_queries.clamp(min=1)
    loss = (per_query * (weights[samples.classes, None] * samples.counted)).sum()
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
        keys = unit(torch.cat([prototypes[:, None], gather(rows_s, rows_t, of_source)], dim=1))  # (K,1+m,D)
        with exact_products():
            per_query: Tensor = _InfoNCE.apply(queries, keys[samples.classes], temperature)
        return per_query
    positives = unit(prototypes)[samples.classes]

    def block(index: int, picked: Tensor) -> Tensor:
        rest = (None, None) if rows_t is None or of_source is None else (rows_t[index], of_source[index])
        return info_nce(picked, positives[index], unit(gather(rows_s[index], *rest)), temperature)

    # Recomputing the gather in backward keeps one block in memory.
    parts = [checkpoint(block, index, picked, use_reentrant=False) for index, picked in enumerate(queries)]
    return torch.stack(parts)


def _rows(maps: Tensor, rows: Tensor) -> Tensor:
    """(...,D), the pixels of (B,D,h,w) that are asked for by the rows (...) of their (N,D) view."""
    return as_pixels(maps).index_select(0, rows.flatten()).view(*rows.shape, -1)


def unit(vectors: Tensor) -> Tensor:
    """(...,D) at unit length, in float32 at least; zeros stay."""
    return F.normalize(_precise(vectors), dim=-1, eps=1e-6)
