from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.errors import UsageError
from offload_engine.simulate.belady import belady_misses

A, B, C, D = (ExpertKey(1, expert) for expert in range(4))
demand_lists = st.lists(st.lists(st.sampled_from((A, B, C, D)), min_size=1, max_size=4, unique=True), max_size=6)


def fewest_misses(demands: list[list[ExpertKey]], slots: int) -> int:
    """Every choice of victims tried."""
    uses = [key for demand in demands for key in demand]

    @cache
    def from_here(number: int, resident: frozenset[ExpertKey]) -> int:
        if number == len(uses):
            return 0
        key = uses[number]
        if key in resident:
            return from_here(number + 1, resident)
        ends = [resident - {victim} | {key} for victim in resident] if len(resident) == slots else [resident | {key}]
        return 1 + min(from_here(number + 1, end) for end in ends)

    return from_here(0, frozenset())


@given(demands=demand_lists, slots=st.integers(1, 4))
def test_no_choice_of_victims_misses_less(demands: list[list[ExpertKey]], slots: int) -> None:
    assert sum(belady_misses(demands, slots)) == fewest_misses(demands, slots)


def test_a_cycle_one_larger_than_the_cache_misses_once_in_three() -> None:
    """The textbook case in which recency misses every time: A B C A B C ... with two slots."""
    demands = [[key] for key in (A, B, C) * 4]
    assert sum(belady_misses(demands, 2)) == 7
    assert sum(belady_misses(demands, 3)) == 3


def test_misses_are_counted_where_they_happen() -> None:
    """With two slots A stays through: C takes B's place, which is not wanted before A is."""
    assert belady_misses([[A, B], [C], [A], [B]], 2) == [2, 1, 0, 1]


def test_less_than_one_slot_is_refused() -> None:
    with pytest.raises(UsageError, match="a replay with 0 slots; wanted at least 1"):
        belady_misses([[A]], 0)
