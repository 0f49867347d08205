"""Straight lines and correlations."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


class Line(NamedTuple):
    """`y = intercept + slope * x`, by least squares."""

    slope: float
    intercept: float
    r_squared: float
    """Share of y's variance that the line explains; 1 where y doesn't vary."""


class Correlation(NamedTuple):
    """Pearson's r with the bounds of its 95 % interval."""

    r: float
    low: float
    high: float


def linear_fit(x: Sequence[float], y: Sequence[float]) -> Line:
    """Raises `ValueError` for fewer than two distinct x."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(set(xs.tolist())) < 2:
        raise ValueError(f"a line needs two distinct x, found {len(set(xs.tolist()))}")
    slope, intercept = np.polyfit(xs, ys, 1)
    left, total = ((ys - (intercept + slope * xs)) ** 2).sum(), ((ys - ys.mean()) ** 2).sum()
    return Line(float(slope), float(intercept), float(1 - left / total) if total > 0 else 1.0)


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; raises `ValueError` where either side doesn't vary, for it is undefined there."""
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(xs) < 2 or np.ptp(xs) == 0 or np.ptp(ys) == 0:
        raise ValueError("a correlation needs at least two points, and both sides must vary")
    return float(np.corrcoef(xs, ys)[0, 1])


def clustered_pearson(
    x: Sequence[float], y: Sequence[float], clusters: Sequence[Hashable], seed: int = 0
) -> Correlation:
    """Pearson's r with a percentile-bootstrap interval that resamples whole clusters: points of one cluster (one
    problem) are not independent of each other. Raises `ValueError` as `pearson` does.
    """
    r = pearson(x, y)
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    members: dict[Hashable, list[int]] = {}
    for index, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(index)
    groups = [np.array(rows) for rows in members.values()]
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        rows = np.concatenate([groups[i] for i in rng.integers(len(groups), size=len(groups))])
        if np.ptp(xs[rows]) > 0 and np.ptp(ys[rows]) > 0:
            found.append(np.corrcoef(xs[rows], ys[rows])[0, 1])
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if found else (-1.0, 1.0)
    return Correlation(r, float(low), float(high))


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r of the ranks, equals sharing their mean rank; raises `ValueError` as `pearson` does."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    _, inverse, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: list[float] = (last - (counts - 1) / 2)[inverse].tolist()
    return ranks
