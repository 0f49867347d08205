"""Intervals for what a run measured. 95 % throughout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

Z = 1.959963984540054
"""97.5 % quantile of the normal distribution."""
Z_ONE_SIDED = 1.6448536269514722
"""95 % quantile."""


class Interval(NamedTuple):
    """A two-sided 95 % interval."""

    low: float
    high: float


def wilson(right: int, n: int) -> Interval:
    """Wilson's score interval of a share (JASA 22, 1927). Raises `ValueError` where there is none."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} of {n} is no share")
    low, high = _score(right, n, Z)
    return Interval(max(0.0, low), min(1.0, high))


def mean(values: Sequence[float]) -> float:
    """The mean; raises `ValueError` of nothing."""
    if not values:
        raise ValueError("nothing has no mean")
    return math.fsum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of a whole population (divided by n); raises `ValueError` of nothing."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / len(values))


def variation(values: Sequence[float]) -> float | None:
    """The coefficient of variation, deviation over mean (paper §4.1, Table 1); None where the mean is 0."""
    centre = mean(values)
    return deviation(values) / centre if centre else None


class Paired(NamedTuple):
    """How two runs did on the same samples."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def n(self) -> int:
        """Samples."""
        return sum(self)

    @property
    def right_a(self) -> int:
        """Samples that A got right."""
        return self.both + self.only_a

    @property
    def right_b(self) -> int:
        """Samples that B got right."""
        return self.both + self.only_b


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided p of McNemar's exact test: the chance that fair coins split the `only_a + only_b` samples on which two
    runs differ at least as unevenly.
    """
    differing = only_a + only_b
    tail = sum(math.comb(differing, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, float(Fraction(2 * tail, 2**differing)))


def accuracy_difference(pairs: Paired) -> Interval:
    """Newcombe's interval of accuracy B - A: square-and-add of Wilson's with the phi coefficient (Statistics in
    Medicine 17, 1998, p. 2635, method 10).
    """
    a, b, n = pairs.right_a, pairs.right_b, pairs.n
    spread = a * (n - a) * b * (n - b)
    excess = pairs.both * pairs.neither - pairs.only_a * pairs.only_b
    corrected = max(excess - n / 2, 0.0) if excess > 0 else excess
    phi = corrected / math.sqrt(spread) if spread else 0.0
    of_a, of_b, share_a, share_b = wilson(a, n), wilson(b, n), a / n, b / n
    below = _add(share_b - of_b.low, of_a.high - share_a, phi)
    above = _add(of_b.high - share_b, share_a - of_a.low, phi)
    return Interval(share_b - share_a - below, share_b - share_a + above)


def accuracy_ratio(pairs: Paired, z: float = Z) -> Interval | None:
    """Bonett and Price's hybrid Wilson interval of accuracy B / A (Statistics in Medicine 25, 2006, p. 3039;
    recommended by Fagerland, Lydersen and Laake, 33, 2014, p. 2850).

    `z` is the normal quantile: `Z` for 95 % between both ends, `Z_ONE_SIDED` for 95 % above the lower. None where A
    has nothing right.
    """
    a, b = pairs.right_a, pairs.right_b
    n = pairs.both + pairs.only_a + pairs.only_b  # what neither gets right says nothing of the ratio
    if a == 0:
        return None
    joint = math.sqrt((pairs.only_a + pairs.only_b + 2) / ((a + 1) * (b + 1)))
    apart = sum(math.sqrt((1 - (right + 1) / (n + 2)) / (right + 1)) for right in (a, b))
    of_a, of_b = (_score(right, n, z * joint / apart) for right in (a, b))
    return Interval(max(0.0, of_b.low) / of_a.high, of_b.high / of_a.low)


def mean_ratio(values_a: Sequence[float], values_b: Sequence[float]) -> tuple[float, Interval]:
    """Mean B over mean A of paired values, with the large-sample interval of a ratio estimator (Cochran, Sampling
    Techniques, 1977, §6.3). Raises `ValueError` of nothing, and where A's mean is 0.
    """
    centre = mean(values_a)
    if not centre:
        raise ValueError("A's mean is 0")
    ratio, n = mean(values_b) / centre, len(values_a)
    residuals = [b - ratio * a for a, b in zip(values_a, values_b, strict=True)]
    half = Z * deviation(residuals) / centre / math.sqrt(max(1, n - 1))
    return ratio, Interval(ratio - half, ratio + half)


def _score(right: int, n: int, z: float) -> Interval:
    """Wilson's interval with another quantile."""
    centre, half = 2 * right + z * z, z * math.sqrt(z * z + 4 * right * (1 - right / n))
    return Interval((centre - half) / (2 * (n + z * z)), (centre + half) / (2 * (n + z * z)))


def _add(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(0.0, one * one - 2 * phi * one * other + other * other))
