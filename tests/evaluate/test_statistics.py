"""Intervals and tests: known values, symmetries, and that they cover what they promise to cover."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.evaluate.statistics import (
    Z_ONE_SIDED,
    Paired,
    Z,
    accuracy_difference,
    accuracy_ratio,
    deviation,
    mcnemar,
    mean,
    mean_ratio,
    variation,
    wilson,
)

COUNT = st.integers(0, 400)
TABLES = st.builds(Paired, COUNT, COUNT, COUNT, COUNT).filter(lambda pairs: pairs.n > 0)


def test_wilson():
    assert wilson(1147, 1319) == pytest.approx((0.8503465724388948, 0.8867032028752291))
    assert wilson(0, 5) == pytest.approx((0.0, 0.43448246478317476))
    assert wilson(5, 5) == pytest.approx((0.5655175352168252, 1.0))
    for right, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="is no share"):
            wilson(right, n)


def test_mcnemar_is_exact():
    assert mcnemar(10, 3) == mcnemar(3, 10) == pytest.approx(2 * (1 + 13 + 78 + 286) / 2**13)
    assert mcnemar(0, 0) == mcnemar(5, 5) == 1.0
    assert mcnemar(0, 6) == 2 / 64
    assert 0 < mcnemar(900, 1200) < 1e-9, "sums of large binomials neither overflow nor vanish"


@pytest.mark.parametrize(
    ("pairs", "difference", "ratio"),
    [
        (Paired(both=1, only_a=7, only_b=1, neither=12), (-0.50692, -0.02556), (0.06773, 0.92273)),
        (Paired(both=59, only_a=16, only_b=6, neither=80), (-0.11862, -0.00463), (0.75790, 0.99104)),
    ],
    ids=["Bentur et al. 2009", "Cavo et al. 2012"],
)
def test_the_formulas_on_the_examples_of_fagerland(
    pairs: Paired, difference: tuple[float, float], ratio: tuple[float, float]
):
    """Values of both formulas written out in a script apart; the second table needs the continuity correction."""
    assert accuracy_difference(pairs) == pytest.approx(difference, abs=1e-5)
    assert accuracy_ratio(pairs) == pytest.approx(ratio, abs=1e-5)


@given(TABLES)
def test_swapping_the_runs_mirrors_the_intervals(pairs: Paired):
    swapped = Paired(pairs.both, pairs.only_b, pairs.only_a, pairs.neither)
    difference, mirrored = accuracy_difference(pairs), accuracy_difference(swapped)
    assert difference == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-12)
    point = (pairs.right_b - pairs.right_a) / pairs.n
    assert -1 <= difference.low <= point + 1e-12
    assert point - 1e-12 <= difference.high <= 1
    ratio, inverse = accuracy_ratio(pairs), accuracy_ratio(swapped)
    if ratio is None or inverse is None:
        assert pairs.right_a == 0 or pairs.right_b == 0
        return
    assert ratio == pytest.approx((1 / inverse.high, 1 / inverse.low))
    assert ratio.low <= pairs.right_b / pairs.right_a * (1 + 1e-12)
    assert ratio.high >= pairs.right_b / pairs.right_a * (1 - 1e-12)


def test_the_quantiles_are_the_normal_distributions():
    normal = NormalDist()
    assert (normal.cdf(Z), normal.cdf(Z_ONE_SIDED)) == pytest.approx((0.975, 0.95), abs=1e-12)


def test_one_sided_bounds_are_tighter_than_two_sided():
    pairs = Paired(3700, 110, 80, 110)
    both, above = accuracy_ratio(pairs), accuracy_ratio(pairs, Z_ONE_SIDED)
    assert both is not None
    assert above is not None
    assert both.low < above.low < pairs.right_b / pairs.right_a


@pytest.mark.parametrize("shares", [(0.9, 0.03, 0.02), (0.5, 0.15, 0.1), (0.3, 0.05, 0.2)])
def test_the_intervals_cover_the_truth_as_often_as_they_say(shares: tuple[float, float, float]):
    both, only_a, only_b = shares
    difference, ratio = only_b - only_a, (both + only_b) / (both + only_a)
    rng, trials, samples = random.Random(7), 600, 300
    hits = [0, 0, 0]
    for _ in range(trials):
        drawn = rng.choices(range(4), (*shares, 1 - sum(shares)), k=samples)
        pairs = Paired(*(drawn.count(case) for case in range(4)))
        of_difference, of_ratio = accuracy_difference(pairs), accuracy_ratio(pairs)
        bound = accuracy_ratio(pairs, Z_ONE_SIDED)
        assert of_ratio is not None
        assert bound is not None
        hits[0] += of_difference.low <= difference <= of_difference.high
        hits[1] += of_ratio.low <= ratio <= of_ratio.high
        hits[2] += bound.low <= ratio
    for hit in hits:
        assert 0.92 <= hit / trials <= 0.985


def test_the_ratio_of_means_covers_the_truth():
    rng, trials, hit = random.Random(3), 400, 0
    for _ in range(trials):
        a = [rng.gauss(100, 20) for _ in range(150)]
        b = [0.25 * one + rng.gauss(5, 6) for one in a]
        ratio, interval = mean_ratio(a, b)
        assert interval.low < ratio < interval.high
        hit += interval.low <= 0.30 <= interval.high
    assert 0.91 <= hit / trials <= 0.985
    ratio, interval = mean_ratio([2.0, 4.0], [1.0, 2.0])
    assert (ratio, *interval) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="mean is 0"):
        mean_ratio([0.0], [1.0])


def test_variation_is_the_papers():
    """Table 1's GSM8K column: 11.96 / 70.01."""
    values = [70.01 - 11.96, 70.01 + 11.96]
    assert variation(values) == pytest.approx(0.1709, abs=1e-4)
    assert deviation([1, 2, 3, 4]) == pytest.approx(math.sqrt(1.25))
    assert variation([0, 0]) is None
    with pytest.raises(ValueError, match="nothing"):
        mean([])
