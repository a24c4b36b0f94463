"""Theorem 5.2: how likely is it that RNA rejects the effect of a forget-token, P[ΔJ_rna / ΔJ_u ≤ 0]?

To first order the ratio is 1 + (g_perᵀδ₁ − gᵀδ₂) / gᵀε with ε ~ N(0, ηI) and δ₁, δ₂ ~ N(0, νI) independent (Eq. 28).
The numerator has variance ν(‖g_per‖² + ‖g‖²), the denominator η‖g‖², so their ratio is Cauchy with scale
√(ν/η)·√(1 + r²), r = ‖g_per‖/‖g‖, and P = ½ − arctan(√(η/ν) / √(1 + r²)) / π. The paper (Eq. 30 to 32) adds norms
where variances add and has 1 + r for √(1 + r²): its P is larger, for every r > 0. Both are here, and Monte Carlo on the
Gaussian vectors themselves tells which holds.
"""

from __future__ import annotations

from math import atan, pi, sqrt
from typing import Any

import numpy as np

from robust_unlearning.stats.estimates import Array, Estimate, accuracy

WIDTH = 8
"""Width of the simulated vectors; the ratio's distribution does not depend on it."""


def paper_probability(eta_over_nu: float, r: float) -> float:
    """P as Theorem 5.2 prints it: ½ − arctan(√(η/ν) / (1 + r)) / π."""
    return 0.5 - atan(sqrt(eta_over_nu) / (1 + r)) / pi


def exact_probability(eta_over_nu: float, r: float) -> float:
    """P of the first-order ratio (Eq. 28): ½ − arctan(√(η/ν) / √(1 + r²)) / π."""
    return 0.5 - atan(sqrt(eta_over_nu) / sqrt(1 + r * r)) / pi


def simulated_probability(
    eta_over_nu: float, r: float, draws: int = 200_000, seed: int = 0, level: float = 0.95
) -> Estimate:
    """P of the first-order ratio by drawing ε, δ₁ and δ₂ (ν = 1), with its Wilson interval."""
    rng = np.random.default_rng(seed)
    g, g_per = _direction(rng), r * _direction(rng)
    epsilon, first, second = (rng.standard_normal((draws, WIDTH)) for _ in range(3))
    ratio = 1 + (first @ g_per - second @ g) / (sqrt(eta_over_nu) * epsilon @ g)
    return accuracy(ratio <= 0, level)


def _direction(rng: np.random.Generator) -> Array:
    vector = rng.standard_normal(WIDTH)
    return vector / np.linalg.norm(vector)


RATIOS = (0.1, 1.0, 10.0)
R = (0.0, 0.5, 1.0, 2.0)


def closed_forms(draws: int = 200_000, seed: int = 0) -> list[dict[str, Any]]:
    """Both closed forms against Monte Carlo over η/ν and r; the intervals hold together at 95 % (Bonferroni)."""
    settings = [(ratio, r) for ratio in RATIOS for r in R]
    rows = []
    for index, (ratio, r) in enumerate(settings):
        drawn = simulated_probability(ratio, r, draws, seed + index, 1 - 0.05 / len(settings))
        forms = {"paper": paper_probability(ratio, r), "exact": exact_probability(ratio, r)}
        holds = {f"{name}_holds": _within(value, drawn) for name, value in forms.items()}
        rows.append({"eta_over_nu": ratio, "r": r, **forms, "simulated": drawn, **holds, "n": drawn.n})
    return rows


def _within(value: float, estimate: Estimate) -> str:
    assert estimate.low is not None
    assert estimate.high is not None
    return "holds" if estimate.low <= value <= estimate.high else "refuted"


def rejects(change: Array, reference: Array) -> Array:
    """Whether ΔJ_rna / ΔJ_u ≤ 0, as 0 and 1; `change` and `reference` of any one shape."""
    return (change * reference <= 0).astype(float)
