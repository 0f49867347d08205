"""Shares of missed bytes, from events made by hand."""

from __future__ import annotations

import pytest

from offload_engine.bench.overlap import Interval, LayerRun, Transfer, missed_bytes
from offload_engine.core import ExpertKey


def transfer(expert: int, began: float, ended: float, nbytes: int = 100, layer: int = 1) -> Transfer:
    return Transfer(ExpertKey(layer, expert), began, ended, nbytes)


RUNS = [LayerRun(1, 10, 20, [1, 2]), LayerRun(2, 30, 40, [1]), LayerRun(1, 50, 60, [1, 3])]


def test_a_prefetch_is_early_and_a_demand_is_not() -> None:
    missed = missed_bytes(RUNS, [transfer(1, 5, 8), transfer(2, 11, 14), transfer(1, 45, 55)], [])
    assert missed == (300, 200, 300.0)
    assert missed.early_share == pytest.approx(2 / 3)


def test_what_is_hidden_is_the_time_in_which_nobody_waited() -> None:
    stalls = [Interval(11, 13), Interval(14, 17)]
    missed = missed_bytes(RUNS, [transfer(2, 10, 15, 100)], stalls)  # 3 of 5 seconds stood still
    assert missed.hidden == pytest.approx(40)
    assert missed.hidden_share == pytest.approx(0.4)


def test_two_transfers_of_one_stall_are_both_exposed() -> None:
    missed = missed_bytes(RUNS, [transfer(1, 10, 14, 100), transfer(2, 10, 18, 60)], [Interval(10, 14)])
    assert missed.hidden == pytest.approx(0 + 30)


def test_what_nobody_asked_for_is_left_out() -> None:
    wasted = [transfer(9, 1, 2), transfer(1, 62, 63), transfer(3, 5, 8, layer=2)]
    assert missed_bytes(RUNS, wasted, []).nbytes == 0
    assert missed_bytes(RUNS, wasted, []).hidden_share is None
    assert missed_bytes(RUNS, wasted, []).early_share is None


def test_of_two_fetches_for_one_use_the_one_that_stayed_counts() -> None:
    missed = missed_bytes(RUNS, [transfer(3, 22, 24, 1000), transfer(3, 51, 53, 100)], [Interval(51, 53)])
    assert missed == (100, 0, 0.0)


def test_uses_before_the_window_are_left_out_but_not_their_transfers() -> None:
    kept = transfer(3, 5, 6)  # before the window, for a use within it
    missed = missed_bytes(RUNS, [kept, transfer(1, 5, 8)], [], since=25)
    assert missed.nbytes == kept.nbytes
