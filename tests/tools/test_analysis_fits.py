from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.analysis.fits import clustered_pearson, linear_fit, pearson, spearman

ANSCOMBE_X = [10, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
ANSCOMBE_Y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
"""Anscombe's first data set (The American Statistician 27, 1973): y = 3.00 + 0.500 x, r = 0.816."""


def test_a_known_line() -> None:
    line = linear_fit(ANSCOMBE_X, ANSCOMBE_Y)
    assert line.slope == pytest.approx(0.5001, abs=1e-4)
    assert line.intercept == pytest.approx(3.0001, abs=1e-4)
    assert line.r_squared == pytest.approx(0.6665, abs=1e-4)


def test_a_known_correlation() -> None:
    assert pearson(ANSCOMBE_X, ANSCOMBE_Y) == pytest.approx(0.8164, abs=1e-4)
    assert spearman(ANSCOMBE_X, ANSCOMBE_Y) == pytest.approx(0.8182, abs=1e-4)


def test_equals_share_their_rank() -> None:
    assert spearman([1, 2, 2, 3], [1, 5, 5, 9]) == pytest.approx(1.0)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9487, abs=1e-4)


@given(st.floats(-5, 5), st.floats(-5, 5), st.lists(st.integers(-50, 50), min_size=2, max_size=20, unique=True))
def test_points_on_a_line_are_found_again(slope: float, intercept: float, xs: list[int]) -> None:
    line = linear_fit(xs, [intercept + slope * x for x in xs])
    assert line.slope == pytest.approx(slope, abs=1e-6)
    assert line.intercept == pytest.approx(intercept, abs=1e-5)


@pytest.mark.parametrize(("xs", "ys"), [([1.0], [2.0]), ([1.0, 1.0], [2.0, 3.0])])
def test_what_has_no_line_is_refused(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(ValueError, match="two distinct x"):
        linear_fit(xs, ys)


def test_what_does_not_vary_has_no_correlation() -> None:
    with pytest.raises(ValueError, match="both sides must vary"):
        pearson([1, 2, 3], [4, 4, 4])


def test_the_interval_of_independent_points_is_fishers() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=400)
    y = 0.5 * x + rng.normal(size=400)
    found = clustered_pearson(x.tolist(), y.tolist(), range(400))
    centre, half = np.arctanh(found.r), 1.96 / np.sqrt(397)
    assert found.low == pytest.approx(np.tanh(centre - half), abs=0.03)
    assert found.high == pytest.approx(np.tanh(centre + half), abs=0.03)


def test_points_that_repeat_each_other_count_once() -> None:
    """Ten copies of forty points know no more than forty points."""
    draw = random.Random(5)
    x = [draw.gauss(0, 1) for _ in range(40)]
    y = [value + draw.gauss(0, 1) for value in x]
    once = clustered_pearson(x, y, range(40))
    copied = clustered_pearson(x * 10, y * 10, list(range(40)) * 10)
    taken_for_400 = clustered_pearson(x * 10, y * 10, range(400))
    assert copied.high - copied.low == pytest.approx(once.high - once.low, rel=0.15)
    assert taken_for_400.high - taken_for_400.low < 0.5 * (copied.high - copied.low)
