"""The pull loss and its parts against values by hand and against the paper's equations, pixel by pixel."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import reference.pull as slow
import torch
import torch.nn.functional as F
from reference.samples import Listed, blocked, listed
from torch import Generator, Tensor

from t2sda_hf.losses import pull
from t2sda_hf.losses.pull import (
    as_pixels,
    class_confidences,
    class_counts,
    class_weights,
    confidence_sums,
    info_nce,
    num_queries_per_class,
    prototype_sums,
    pull_loss,
    sample_pull,
    sort_by_class,
    unreliable_pixels,
)

K, D = 4, 5


def random(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def scene(seed: int = 0, size: tuple[int, int, int] = (2, 6, 7)) -> dict[str, Tensor]:
    """Labels with ignored pixels, pseudo-labels, confidences and embeddings. Class 3 is in no label."""
    generator = random(seed)
    labels = torch.randint(0, K, size, generator=generator)
    labels[labels == 3] = 255
    return {
        "labels": labels,
        "pseudo_labels": torch.randint(0, K, size, generator=generator),
        "confidence": torch.rand(size, generator=generator),
        **{
            name: torch.randn(size[0], D, *size[1:], generator=generator, dtype=torch.float64)
            for name in ("embeddings", "source_keys", "target_keys")
        },
    }


# ---------------------------------------------------------------------------------------- statistics of classes


def test_pixels_are_rows_of_a_map():
    maps = torch.randn(2, D, 3, 4)
    rows = as_pixels(maps)
    for pixel in slow.pixels(maps):
        assert torch.equal(rows[slow.row_of(pixel, maps)], maps[pixel[0], :, pixel[1], pixel[2]])


def test_counts_leave_out_ignored_pixels():
    assert class_counts(torch.tensor([[0, 2, 2], [255, 2, 255]]), 4).tolist() == [1, 0, 3, 0]


@pytest.mark.parametrize("prenorm", [False, True])
def test_prototypes_are_means_of_the_class(prenorm):
    given = scene()
    keys, labels = given["source_keys"], given["labels"]
    prototypes = prototype_sums(keys, labels, K, prenorm) / class_counts(labels, K).clamp(min=1)[:, None]

    if prenorm:
        keys = keys / keys.norm(dim=1, keepdim=True)
    for class_id in range(3):
        expected = slow.prototype(keys, labels, class_id)
        torch.testing.assert_close(prototypes[class_id], expected, rtol=1e-5, atol=1e-6)
    assert slow.prototype(keys, labels, 3) is None
    assert prototypes[3].tolist() == [0] * D


def test_statistics_of_two_halves_sum_to_those_of_the_whole():
    given = scene()
    half = {name: value.chunk(2) for name, value in given.items()}
    for function, names in (
        (class_counts, ["labels"]),
        (prototype_sums, ["source_keys", "labels"]),
        (confidence_sums, ["pseudo_labels", "confidence"]),
    ):
        parts = [function(*(half[name][part] for name in names), K) for part in (0, 1)]
        whole = function(*(given[name] for name in names), K)
        torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-6, atol=1e-6)


def test_confidence_of_a_class_is_the_mean_over_pixels_predicted_as_it():
    given = scene()
    sums = confidence_sums(given["pseudo_labels"], given["confidence"], K)
    measured = class_confidences(sums, "zero")
    for class_id in range(K):
        expected = slow.mean_confidence(given["pseudo_labels"], given["confidence"], class_id)
        assert measured[class_id].item() == pytest.approx(expected, rel=1e-9)


def test_confidence_counts_only_valid_pixels():
    labels, confidence = torch.tensor([[[0, 0, 1]]]), torch.tensor([[[0.5, 0.9, 0.7]]])
    sums = confidence_sums(labels, confidence, 2, valid=torch.tensor([[[True, False, False]]]))
    assert class_confidences(sums, "zero").tolist() == [0.5, 0]


@pytest.mark.parametrize(("absent", "expected"), [("zero", 0), ("one", 1), ("mean", 0.5), ("ema", 0.25)])
def test_a_class_that_is_predicted_nowhere(absent, expected):
    sums = torch.tensor([[0.8, 0.4, 0.0], [2.0, 0.4 / 0.6, 0.0]], dtype=torch.float64)  # means 0.4 and 0.6
    running = torch.tensor([0.9, 0.9, 0.25])
    assert class_confidences(sums, absent, running).tolist() == pytest.approx([0.4, 0.6, expected])


def test_no_class_predicted_anywhere_is_not_nan():
    assert class_confidences(torch.zeros(2, 3, dtype=torch.float64), "mean").tolist() == [0, 0, 0]


def test_running_confidences_are_required_where_they_are_used():
    with pytest.raises(ValueError, match="running"):
        class_confidences(torch.ones(2, K), "ema")


# ------------------------------------------------------------------------------------- dynamic re-weighting (DRW)


@pytest.mark.parametrize(
    ("confidences", "ratios"),
    [
        ((0.99, 0.96, 0.75, 0.0), (0.1, 0.2, 0.5, 1)),  # the last one is absent
        ((0.99, 0.96, 0.75), (0.2, 0.4, 1)),
        ((1.0, 1.0, 1.0), (1, 1, 1)),  # all sure: 0/0 in the paper
        ((1.0, 0.5), (0, 1)),
        ((0.3, 0.3), (1, 1)),
    ],
)
def test_drw_by_hand(confidences, ratios):
    weights = class_weights(torch.tensor(confidences), torch.ones(len(confidences), dtype=torch.bool), 0.5)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([ratio / sum(ratios) for ratio in ratios], rel=1e-5)


def test_drw_of_the_specification():
    weights = class_weights(torch.tensor([0.99, 0.96, 0.75, 0.0]), torch.ones(4, dtype=torch.bool), 0.5)
    assert weights.tolist() == pytest.approx([0.0556, 0.1111, 0.2778, 0.5556], abs=5e-5)


@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_drw_equals_its_twin(beta, seed):
    confidences = torch.rand(7, generator=random(seed), dtype=torch.float64)
    members = torch.tensor([True, True, False, True, False, True, True])
    weights = class_weights(confidences, members, beta)
    assert weights.tolist() == pytest.approx(slow.drw(confidences.tolist(), beta, members.tolist()), abs=1e-6)
    assert weights[~members].tolist() == [0, 0]


@pytest.mark.parametrize("confidences", [[0.9, 0.6], [1.0, 1.0], [1.0, 0.3]])
def test_a_class_outside_the_benchmark_does_not_set_the_scale(confidences):
    alone = class_weights(torch.tensor(confidences), torch.tensor([True, True]), 0.5)
    beside = class_weights(torch.tensor([*confidences, 0.0]), torch.tensor([True, True, False]), 0.5)
    torch.testing.assert_close(beside[:2], alone)


# -------------------------------------------------------------------------------------------------- CBQS, CEQS


def test_cbqs_of_the_specification():
    shares = (360, 190, 150, 90, 80, 50, 30, 20, 15, 10, 5)
    wanted = num_queries_per_class(torch.tensor(shares, dtype=torch.float64), 19, 128, "cbqs")
    assert wanted.tolist() == [876, 463, 365, 219, 195, 122, 73, 49, 37, 25, 13]


@pytest.mark.parametrize("seed", range(20))
def test_cbqs_equals_its_twin_in_fractions(seed):
    draw = np.random.default_rng(seed)
    counts = draw.integers(0, 3000, size=19) * (draw.random(19) < 0.7)
    counts[0] += 1
    num_classes, num_queries = int(draw.integers(2, 20)), int(draw.integers(1, 300))
    wanted = num_queries_per_class(torch.tensor(counts, dtype=torch.float64), num_classes, num_queries, "cbqs")
    assert wanted.tolist() == slow.cbqs(counts.tolist(), num_classes, num_queries)
    assert num_classes * num_queries <= sum(wanted) <= num_classes * num_queries + np.count_nonzero(counts)
    assert [n > 0 for n in wanted] == [bool(count) for count in counts]  # a floor of one for every present class


@pytest.mark.parametrize(
    ("counts", "num_classes", "num_queries"),
    [((21, 17), 19, 128), ((42, 34), 19, 128), ((7, 18), 5, 10), ((14, 11), 5, 10)],
)
def test_the_ceiling_is_safe_from_rounding(counts, num_classes, num_queries):
    """19 · 21/38 · 128 is 1344, but a hair more in binary."""
    wanted = num_queries_per_class(torch.tensor(counts, dtype=torch.float64), num_classes, num_queries, "cbqs")
    assert wanted.tolist() == slow.cbqs(counts, num_classes, num_queries)
    assert sum(wanted) == num_classes * num_queries


def test_ceqs_sends_as_many_from_every_present_class():
    assert num_queries_per_class(torch.tensor([900.0, 0, 1]), 3, 128, "ceqs").tolist() == [128, 0, 128]


@pytest.mark.parametrize("sampling", ["cbqs", "ceqs"])
def test_no_labelled_pixel_sends_no_query(sampling):
    assert num_queries_per_class(torch.zeros(3), 3, 128, sampling).tolist() == [0, 0, 0]


# ----------------------------------------------------------------------------------------------- unreliable pixels


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("scope", ["batch", "image"])
def test_unreliable_is_below_numpys_percentile(ratio, scope):
    confidence = torch.rand(2, 5, 9, generator=random())
    parts = [confidence] if scope == "batch" else list(confidence.split(1))
    expected = torch.cat([part < float(np.percentile(part.numpy(), 100 * ratio)) for part in parts])
    assert torch.equal(unreliable_pixels(confidence, ratio, scope), expected)


def test_half_of_distinct_confidences_is_unreliable():
    confidence = torch.randperm(64, generator=random()).view(1, 8, 8) / 64
    assert torch.equal(unreliable_pixels(confidence, 0.5, "batch"), confidence < 0.5)


def test_equal_confidences_are_all_reliable():
    assert not unreliable_pixels(torch.full((2, 3, 3), 0.7), 0.5, "batch").any()


# ------------------------------------------------------------------------------------------------------- sampling

WANTED = [5, 3, 4, 2]


def sampled(given: dict[str, Tensor], num_negatives: int = 16, seed: int = 0, **options: Any) -> Listed:
    unreliable = unreliable_pixels(given["confidence"], 0.5, "batch")
    wanted = options.pop("wanted", WANTED)
    most = options.pop("most", sum(wanted))
    generator = random(seed)
    maps = torch.stack([given["labels"], torch.where(unreliable, given["pseudo_labels"], 255)])
    pixels = sort_by_class(maps, len(wanted), generator)
    return listed(sample_pull(pixels, torch.tensor(wanted), most, num_negatives, generator, **options))


def sampled_without_target(labels: Tensor, num_negatives: int) -> Listed:
    pixels = sort_by_class(labels[None], K, random())
    return listed(sample_pull(pixels, torch.tensor(WANTED), 14, num_negatives, random(), has_target=False))


@pytest.mark.parametrize("share", ["class", "query"])
@pytest.mark.parametrize("negatives", ["denps", "pooled"])
@pytest.mark.parametrize("seed", range(5))
def test_samples_come_from_the_sets_of_the_paper(negatives, share, seed):
    given = scene(seed)
    samples = sampled(given, seed=seed, negatives=negatives, share=share)
    assert samples.classes == [0, 1, 2]  # class 3 has no labelled pixel
    for class_id, queries, from_source, from_target in zip(
        samples.classes, samples.queries, samples.source_negatives, samples.target_negatives, strict=True
    ):
        assert given["labels"].flatten()[queries].tolist() == [class_id] * WANTED[class_id]
        assert len(set(queries.tolist())) == len(queries)  # without replacement
        assert set(from_source.flatten().tolist()) <= slow.source_negatives(given["labels"], class_id)
        assert set(from_target.flatten().tolist()) <= slow.target_negatives(
            given["pseudo_labels"], given["confidence"], 0.5, class_id
        )
        assert from_source.shape[-1] + from_target.shape[-1] == 16
        assert from_source.ndim == (1 if share == "class" else 2)
        if negatives == "denps":
            assert from_source.shape[-1] == 8
        if share == "query":
            assert len(from_source) == len(from_target) == len(queries)
            assert len({tuple(rows) for rows in from_source.tolist()}) > 1  # a draw for every query


def test_every_pixel_of_a_set_can_be_drawn_and_equally_often():
    """A wrong jump over the class's own segment would favour or never reach some pixels."""
    given = scene(size=(1, 4, 6))
    samples = sampled(given, num_negatives=40_000)
    for class_id, from_source, from_target in zip(
        samples.classes, samples.source_negatives, samples.target_negatives, strict=True
    ):
        for drawn, allowed in (
            (from_source, slow.source_negatives(given["labels"], class_id)),
            (from_target, slow.target_negatives(given["pseudo_labels"], given["confidence"], 0.5, class_id)),
        ):
            times = Counter(drawn.tolist())
            assert set(times) == allowed
            expected = len(drawn) / len(allowed)
            assert max(abs(count - expected) for count in times.values()) < 5 * math.sqrt(expected)


def test_every_pixel_of_a_class_is_a_query_equally_often():
    given = scene(size=(1, 4, 6))
    pixels = (given["labels"].flatten() == 0).nonzero().flatten().tolist()
    times: Counter[int] = Counter()
    for seed in range(600):
        times.update(sampled(given, 2, seed, wanted=[2, 0, 0, 0]).queries[0].tolist())
    expected = 600 * 2 / len(pixels)
    assert set(times) == set(pixels)
    assert max(abs(count - expected) for count in times.values()) < 5 * math.sqrt(expected)


def test_the_pool_is_drawn_in_proportion_to_both_domains():
    given = scene(size=(2, 8, 9))
    samples = sampled(given, 40_000, negatives="pooled")
    for class_id, from_source in zip(samples.classes, samples.source_negatives, strict=True):
        num_source = len(slow.source_negatives(given["labels"], class_id))
        num_target = len(slow.target_negatives(given["pseudo_labels"], given["confidence"], 0.5, class_id))
        assert len(from_source) / 40_000 == pytest.approx(num_source / (num_source + num_target), abs=0.01)


def test_an_odd_number_of_negatives_is_complete():
    for from_source, from_target in zip(*sampled_negatives(sampled(scene(), 7)), strict=True):
        assert (len(from_source), len(from_target)) == (3, 4)


def sampled_negatives(samples: Listed) -> tuple[list[Tensor], list[Tensor]]:
    return samples.source_negatives, samples.target_negatives


def test_a_small_class_is_drawn_with_replacement():
    given = scene()
    given["labels"][given["labels"] == 1] = 0
    given["labels"][1, 2, 3] = 1
    queries = sampled(given).queries[1]
    assert queries.tolist() == [slow.row_of((1, 2, 3), given["labels"])] * 3


@pytest.mark.parametrize("negatives", ["denps", "pooled"])
@pytest.mark.parametrize("share", ["class", "query"])
def test_without_unreliable_target_all_negatives_are_of_the_source(negatives, share):
    given = scene()
    given["confidence"] = torch.full_like(given["confidence"], 0.9)
    sources, targets = sampled_negatives(sampled(given, negatives=negatives, share=share))
    assert [rows.shape[-1] for rows in sources] == [16] * 3
    assert [rows.numel() for rows in targets] == [0] * 3


def test_without_a_target_all_negatives_are_of_the_source():
    samples = sampled_without_target(scene()["labels"], 16)
    assert [len(rows) for rows in samples.source_negatives] == [16] * 3
    assert [rows.numel() for rows in samples.target_negatives] == [0] * 3


@pytest.mark.parametrize("negatives", ["denps", "pooled"])
@pytest.mark.parametrize("share", ["class", "query"])
def test_with_one_source_class_all_negatives_are_of_the_target(negatives, share):
    given = scene()
    given["labels"] = torch.where(given["labels"] == 0, 0, 255)
    samples = sampled(given, negatives=negatives, share=share)
    assert samples.classes == [0]
    assert samples.source_negatives[0].numel() == 0
    assert samples.target_negatives[0].shape[-1] == 16
    assert (given["pseudo_labels"].flatten()[samples.target_negatives[0]] != 0).all()


def test_ignored_pixels_are_negatives_only_on_demand():
    given = scene()
    rows = torch.cat(sampled(given, 400).source_negatives)
    assert (given["labels"].flatten()[rows] != 255).all()
    samples = sampled(given, 400, ignore_as_negative=True)
    for class_id, queries, from_source in zip(samples.classes, samples.queries, samples.source_negatives, strict=True):
        drawn = given["labels"].flatten()[from_source]
        assert (drawn == 255).any()
        assert (drawn != class_id).all()
        assert (given["labels"].flatten()[queries] == class_id).all()


@pytest.mark.parametrize("ignore_as_negative", [False, True])
def test_uniform_queries_follow_the_shares_of_the_classes(ignore_as_negative):
    given = scene(size=(2, 8, 9))
    samples = sampled(given, uniform=True, most=40_000, ignore_as_negative=ignore_as_negative)
    counts = class_counts(given["labels"], K)
    assert sum(len(rows) for rows in samples.queries) == 40_000
    for class_id, queries in zip(samples.classes, samples.queries, strict=True):
        assert (given["labels"].flatten()[queries] == class_id).all()
        assert len(queries) / 40_000 == pytest.approx((counts[class_id] / counts.sum()).item(), abs=0.01)


@pytest.mark.parametrize("uniform", [False, True])
def test_a_batch_without_labels_has_no_queries(uniform):
    given = scene()
    given["labels"] = torch.full_like(given["labels"], 255)
    assert sampled(given, uniform=uniform).classes == []


def test_a_class_that_other_processes_alone_see_sends_nothing_here():
    assert sampled(scene(), wanted=[2, 2, 2, 6]).classes == [0, 1, 2]


def test_equal_generators_draw_equal_samples_and_others_do_not():
    first, second, other = sampled(scene(), seed=1), sampled(scene(), seed=1), sampled(scene(), seed=2)
    for one, same, different in zip(
        first.queries + first.source_negatives,
        second.queries + second.source_negatives,
        other.queries + other.source_negatives,
        strict=True,
    ):
        assert torch.equal(one, same)
        assert not torch.equal(one, different)


# -------------------------------------------------------------------------------------------------------- InfoNCE


@pytest.mark.parametrize(("positive", "negative", "expected"), [(0, 0, 6.93245), (1, 0, 2.06682), (1, 0.5, 4.44330)])
def test_info_nce_of_the_specification(positive, negative, expected):
    """1,024 negatives with one cosine, temperature 0.2."""
    query = torch.tensor([[1.0, 0, 0]], dtype=torch.float64)

    def at(cosine: float) -> Tensor:
        return torch.tensor([cosine, math.sqrt(1 - cosine**2), 0], dtype=torch.float64)

    loss = info_nce(query, at(positive), at(negative).expand(1024, 3), 0.2)
    assert loss.tolist() == pytest.approx([expected], abs=5e-6)


def test_equal_cosines_give_the_logarithm_of_all_candidates():
    query = F.normalize(torch.ones(3, D), dim=1)
    for number in (1, 2, 1024):
        loss = info_nce(query, query[0], query[:1].expand(number, D), 0.2)
        assert loss.tolist() == pytest.approx([math.log(number + 1)] * 3, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.02, 0.2, 1.0])
def test_info_nce_equals_the_double_loop(temperature):
    generator = random()
    queries, negatives = (
        F.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=1) for n in (6, 9)
    )
    positive = F.normalize(torch.randn(D, generator=generator, dtype=torch.float64), dim=0)
    expected = torch.stack([slow.info_nce(query, positive, list(negatives), temperature) for query in queries])
    shared = info_nce(queries, positive, negatives, temperature)
    own = info_nce(queries, positive, negatives.expand(6, 9, D), temperature)
    torch.testing.assert_close(shared, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-10)


def test_info_nce_survives_a_tiny_temperature():
    query = torch.eye(2)
    loss = info_nce(query, query[0], query[1:], 1e-4)
    assert loss.tolist() == pytest.approx([0, 1e4])


# ------------------------------------------------------------------------------------------------------ pull loss

CASES = [
    {"objective": objective, "reduction": reduction, "share": share, "negatives": negatives}
    for objective, share in (("infonce", "class"), ("infonce", "query"), ("mse", "class"))
    for reduction in ("mean_w", "sum_paper", "mean_paper")
    for negatives in ("denps", "pooled")
]


def both_ways(
    given: dict[str, Tensor],
    samples: Listed,
    weights: Tensor,
    objective: str = "infonce",
    reduction: str = "mean_w",
    target: bool = True,
    temperature: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """The loss and its twin, float64, both differentiable in given["embeddings"]."""
    prototypes = torch.stack(
        [
            torch.ones(D, dtype=torch.float64)
            if (found := slow.prototype(given["source_keys"], given["labels"], c)) is None
            else found
            for c in range(K)
        ]
    )
    options = {
        "temperature": temperature,
        "objective": objective,
        "reduction": reduction,
        "num_classes_of_benchmark": K,
    }
    target_keys = given["target_keys"] if target else None
    maps = (given["embeddings"], given["source_keys"], target_keys, prototypes.to(given["embeddings"].dtype))
    fast = pull_loss(*maps, blocked(samples, K), weights, **options)

    def of_query(rows: Tensor, query: int) -> list[int]:
        return (rows[query] if rows.ndim == 2 else rows).tolist()

    queries = {c: rows.tolist() for c, rows in zip(samples.classes, samples.queries, strict=True)}
    negatives = {
        c: [(of_query(from_source, q), of_query(from_target, q)) for q in range(len(queries[c]))]
        for c, from_source, from_target in zip(
            samples.classes, samples.source_negatives, samples.target_negatives, strict=True
        )
    }
    return fast, slow.pull_loss(*maps, queries, negatives, weights.tolist(), **options)


@pytest.mark.parametrize("at_once", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_pull_loss_equals_the_double_loop(case, at_once, monkeypatch):
    if at_once:
        monkeypatch.setattr(pull, "_class_by_class", pull._all_at_once)
    given = scene()
    given["embeddings"].requires_grad_()
    samples = sampled(given, num_negatives=6, share=case["share"], negatives=case["negatives"])
    weights = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    fast, expected = both_ways(given, samples, weights, case["objective"], case["reduction"])
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, given["embeddings"])[0] for loss in (fast, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_pull_loss_equals_the_double_loop_over_several_chunks_of_queries():
    given = scene(size=(2, 18, 18))
    given["embeddings"].requires_grad_()
    samples = sampled(given, num_negatives=2, wanted=[120, 300, 0, 0], share="query")
    assert [len(rows) for rows in samples.queries] == [120, 300]
    fast, expected = both_ways(given, samples, torch.full((K,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss, given["embeddings"])[0] for loss in (fast, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_pull_loss_without_a_target_equals_the_double_loop():
    given = scene()
    samples = sampled_without_target(given["labels"], 6)
    fast, expected = both_ways(given, samples, torch.full((K,), 0.25, dtype=torch.float64), target=False)
    torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-10)


def test_float32_and_bfloat16_stay_near_float64():
    given = scene()
    samples = sampled(given)
    weights = torch.full((K,), 0.25)
    _, expected = both_ways(given, samples, weights)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        maps = {name: value.to(dtype) for name, value in given.items() if value.dtype == torch.float64}
        loss, _ = both_ways(given | maps, samples, weights)
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean_w", math.log(9)), ("sum_paper", (0.5 * 5 + 0.5 * 3) * math.log(9) / 2), ("mean_paper", math.log(9) / 2)],
)
def test_reductions_by_hand(reduction, expected):
    """All features alike, 8 negatives, 5 and 3 queries of two classes: every query costs ln 9."""
    ones = torch.ones(1, D, 3, 3)
    samples = Listed([0, 1], [torch.arange(5), torch.arange(3)], [torch.arange(4)] * 2, [torch.arange(4)] * 2)
    loss = pull_loss(
        *(ones, ones, ones, torch.ones(2, D), blocked(samples, 2), torch.tensor([0.5, 0.5])),
        temperature=0.2,
        reduction=reduction,
        num_classes_of_benchmark=2,
    )
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_mse_is_the_squared_distance_between_unit_vectors():
    features = torch.tensor([[1.0, 0], [0, 3.0], [-2.0, 0]]).T.view(1, 2, 1, 3)  # at 0, 90 and 180 degrees
    samples = Listed([0], [torch.arange(3)], *[[torch.empty(0, dtype=torch.int64)]] * 2)
    loss = pull_loss(
        *(features, features, features, torch.tensor([[5.0, 0]]), blocked(samples, 1), torch.ones(1)),
        temperature=0.2,
        objective="mse",
        reduction="sum_paper",
    )
    assert loss.item() == pytest.approx(0 + 2 + 4)


def test_pull_loss_does_not_see_lengths():
    given = scene()
    samples, weights = sampled(given), torch.full((K,), 0.25)
    loss, _ = both_ways(given, samples, weights)
    longer = {name: given[name] * (1 + 9 * torch.rand(2, 1, 6, 7, dtype=torch.float64, generator=random(i)))
              for i, name in enumerate(("embeddings", "target_keys"))}  # fmt: skip
    again, _ = both_ways(given | longer, samples, weights)
    torch.testing.assert_close(again, loss)


def test_pull_loss_does_not_see_where_pixels_are():
    given = scene()
    samples, weights = sampled(given), torch.full((K,), 0.25)
    loss, _ = both_ways(given, samples, weights)

    order = torch.randperm(84, generator=random())  # row r of the shuffled maps is row order[r] of the old ones
    place = torch.argsort(order)

    def shuffled(maps: Tensor) -> Tensor:
        if maps.ndim == 3:
            return maps.flatten()[order].view_as(maps)
        return as_pixels(maps)[order].view(2, 6, 7, D).permute(0, 3, 1, 2)

    moved = Listed(
        samples.classes,
        *([place[rows] for rows in group] for group in (samples.queries, *sampled_negatives(samples))),
    )
    again, _ = both_ways({name: shuffled(maps) for name, maps in given.items()}, moved, weights)
    torch.testing.assert_close(again, loss, rtol=1e-12, atol=0)


def test_a_class_without_queries_changes_nothing_and_is_not_made_up_for():
    given = scene()
    weights = torch.tensor([0.5, 0.0, 0.5, 0.0])
    samples = sampled(given)
    whole, _ = both_ways(given, samples, weights)
    without, _ = both_ways(given, samples.only(0, 2), weights)
    torch.testing.assert_close(without, whole)
    only_first, _ = both_ways(given, samples.only(0), weights)
    assert only_first < whole  # weight without queries is lost, not given to the others


def test_a_class_without_any_negative_is_left_out_of_info_nce():
    given = scene()
    samples, empty = sampled(given), torch.empty(0, dtype=torch.int64)
    samples.source_negatives[0], samples.target_negatives[0] = empty, empty
    loss, expected = both_ways(given, samples, torch.tensor([0.5, 0.25, 0.25, 0]))
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    rest, _ = both_ways(given, samples.only(1, 2), torch.tensor([0.5, 0.25, 0.25, 0]))
    torch.testing.assert_close(rest, loss)


@pytest.mark.parametrize("what", ["one class, sure target", "no label"])
def test_nothing_to_compare_is_zero_with_gradients(what):
    given = scene()
    given["labels"] = torch.full_like(given["labels"], 0 if what.startswith("one") else 255)
    given["confidence"] = torch.ones_like(given["confidence"])
    given["embeddings"].requires_grad_()
    samples = sampled(given)
    loss, _ = both_ways(given, samples, torch.full((K,), 0.25))
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, given["embeddings"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_the_gradient_reaches_queries_only():
    given = scene()
    given["embeddings"].requires_grad_()
    samples = sampled(given)
    loss, _ = both_ways(given, samples, torch.full((K,), 0.25))
    (gradient,) = torch.autograd.grad(loss, given["embeddings"])
    touched = as_pixels(gradient).abs().sum(dim=1).nonzero().flatten().tolist()
    assert touched == sorted(torch.cat(samples.queries).tolist())


def test_a_step_along_the_gradient_pulls_queries_to_their_prototype():
    given = scene()
    given["embeddings"].requires_grad_()
    samples, weights = sampled(given), torch.full((K,), 0.25)
    before, _ = both_ways(given, samples, weights)
    (gradient,) = torch.autograd.grad(before, given["embeddings"])
    after, _ = both_ways(given | {"embeddings": given["embeddings"].detach() - 0.1 * gradient}, samples, weights)
    assert after < before


def test_a_zero_embedding_gives_finite_numbers():
    given = scene()
    given["embeddings"] = torch.zeros_like(given["embeddings"]).requires_grad_()
    samples = sampled(given)
    loss = pull_loss(
        given["embeddings"],
        given["source_keys"],
        given["target_keys"],
        torch.ones(K, D, dtype=torch.float64),
        blocked(samples, K),
        torch.ones(K),
        temperature=0.2,
    )
    (gradient,) = torch.autograd.grad(loss, given["embeddings"])
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
