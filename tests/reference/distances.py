"""Slow twins of CCD and PDD, written from equations 19 and 20 of the paper, one pixel at a time."""

import numpy as np


def centre(features: np.ndarray, labels: np.ndarray, i: int) -> np.ndarray:
    return np.mean([x for x, y in zip(features, labels, strict=True) if y == i], axis=0)


def slow_ccd(features: np.ndarray, labels: np.ndarray, i: int) -> float:
    """1/(C-1) · Σ_{j≠i} [1/|Ω_i| Σ_{x∈Ω_i} ‖x-μ_i‖²] / ‖μ_i-μ_j‖², over the classes that occur."""
    classes = sorted(set(labels.tolist()))
    mine = [x for x, y in zip(features, labels, strict=True) if y == i]
    mu_i = centre(features, labels, i)
    total = 0.0
    for j in classes:
        if j == i:
            continue
        inside = sum(float(((x - mu_i) ** 2).sum()) for x in mine) / len(mine)
        total += inside / float(((mu_i - centre(features, labels, j)) ** 2).sum())
    return total / (len(classes) - 1)


def slow_pdd(features: np.ndarray, labels: np.ndarray, i: int) -> float:
    """1 - 1/|Ω_i| Σ_{x∈Ω_i} cos(x,μ_i) / Σ_{j≠i} cos(x,μ_j), over the classes that occur."""
    classes = sorted(set(labels.tolist()))
    mine = [x for x, y in zip(features, labels, strict=True) if y == i]

    def cos(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.sqrt(a @ a) * np.sqrt(b @ b)))

    total = 0.0
    for x in mine:
        others = sum(cos(x, centre(features, labels, j)) for j in classes if j != i)
        total += cos(x, centre(features, labels, i)) / others
    return 1 - total / len(mine)
