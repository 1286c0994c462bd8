"""How sure a difference is, and how good a proxy is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm, spearmanr, t

from ..evaluation.run_folder import MethodFolder


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with a 95% confidence interval (Student's t).

    Attributes:
        mean, low, high: in the unit of the values.
        sd: of the differences, sample.
        n: pairs.
    """

    mean: float
    low: float
    high: float
    sd: float
    n: int

    def __str__(self) -> str:
        told = "no difference can be told" if self.low <= 0 <= self.high else "higher" if self.low > 0 else "lower"
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}] (95% interval, n = {self.n}): {told}"


def paired_difference(values: Mapping[int, float], others: Mapping[int, float], level: float = 0.95) -> Difference:
    """`values` minus `others`, paired by key: by seed.

    Pairs take out what both have in common, such as an easy initialisation; so the interval is mostly narrower than
    that of two independent means. It assumes that differences are roughly normal, which three seeds cannot show.

    Raises:
        ValueError: for fewer than two common keys.
    """
    common = sorted(values.keys() & others.keys())
    if len(common) < 2:
        raise ValueError(f"a paired comparison needs at least two seeds in common, there are {len(common)}.")
    differences = np.array([values[key] - others[key] for key in common])
    mean, sd = float(differences.mean()), float(differences.std(ddof=1))
    half = float(t.ppf((1 + level) / 2, len(common) - 1)) * sd / len(common) ** 0.5
    return Difference(mean, mean - half, mean + half, sd, len(common))


@dataclass(frozen=True)
class ProxyScore:
    """How well one proxy orders weights by their labelled mIoU.

    Attributes:
        within: Spearman correlation over the evaluations of a run, one per run where it is defined.
        regret_within: best mIoU of the run minus that of the weights the proxy chooses, one per run.
        across: Spearman correlation over the last weights of all runs; NaN for fewer than three.
        across_low, across_high: its 95% interval (Fieller's variance of Fisher's z), as if runs were independent.
        regret_across: best final mIoU of all runs minus that of the run the proxy chooses; the mean over those it
            cannot tell apart. Of "step" it is what one taken at random of the longest runs loses.
        n: runs that have it.
    """

    within: tuple[float, ...]
    regret_within: tuple[float, ...]
    across: float
    across_low: float
    across_high: float
    regret_across: float
    n: int


def evaluations(method: MethodFolder) -> list[dict[str, float]]:
    """What a run knew at each of its evaluations: step, miou of the student in %, and the proxies."""
    found: list[dict[str, float]] = []
    for step, miou in sorted(method.miou.get("student", [])):
        proxies = {name: dict(points)[step] for name, points in method.proxies.items() if step in dict(points)}
        if proxies:
            found.append({"step": step, "miou": miou} | proxies)
    return found


def rank_proxies(runs: Sequence[Sequence[Mapping[str, float]]]) -> dict[str, ProxyScore]:
    """Compare every proxy with labelled mIoU, within runs and across them.

    Args:
        runs: of each run what `evaluations` returns.

    Returns:
        Proxy -> its score. "step" is among them: what taking the last weights is worth, the bar for the others.

    Raises:
        ValueError: if no run has an evaluation.
    """
    names = dict.fromkeys(name for run in runs for point in run for name in point if name != "miou")
    if not names:
        raise ValueError("no run has an evaluation with proxies: train with a train.evaluate_every below max_steps.")
    scores = {}
    for name in names:
        having = [[point for point in run if name in point] for run in runs]
        having = [points for points in having if points]
        within, regrets = [], []
        for run, points in zip([run for run in runs if any(name in p for p in run)], having, strict=True):
            correlation = _spearman([p[name] for p in points], [p["miou"] for p in points])
            within += [correlation] if np.isfinite(correlation) else []
            regrets.append(max(p["miou"] for p in run) - max(points, key=lambda p: p[name])["miou"])
        last = [points[-1] for points in having]
        chosen = [p["miou"] for p in last if p[name] == max(point[name] for point in last)]
        across = _spearman([p[name] for p in last], [p["miou"] for p in last])
        scores[name] = ProxyScore(
            tuple(within),
            tuple(regrets),
            across,
            *_interval(across, len(last)),
            max(p["miou"] for p in last) - float(np.mean(chosen)),
            len(having),
        )
    return scores


def _interval(correlation: float, n: int) -> tuple[float, float]:
    """95% of a Spearman correlation over n > 3 pairs."""
    if n < 4 or abs(correlation) == 1:
        return float("nan"), float("nan")
    half = float(norm.ppf(0.975)) * (1.06 / (n - 3)) ** 0.5
    return float(np.tanh(np.arctanh(correlation) - half)), float(np.tanh(np.arctanh(correlation) + half))


def _spearman(values: Sequence[float], others: Sequence[float]) -> float:
    """NaN for fewer than three pairs, or if one side is constant."""
    if len(values) < 3 or len(set(values)) == 1 or len(set(others)) == 1:
        return float("nan")
    return float(spearmanr(values, others)[0])
