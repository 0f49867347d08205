"""Belady's rule against an exhaustive search, and against what any online policy does."""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.bench.belady import belady_misses

Requests = list[frozenset[int]]
requests_of = st.lists(st.frozensets(st.integers(0, 5), max_size=3), max_size=9)


def fewest_misses(requests: Requests, slots: int) -> int:
    """Every victim at every load, tried; a request's keys are used by rising number."""
    uses = [key for keys in requests for key in sorted(keys)]

    @cache
    def least(place: int, held: frozenset[int]) -> int:
        if place == len(uses):
            return 0
        key = uses[place]
        if key in held:
            return least(place + 1, held)
        room = [held] if len(held) < slots else map(frozenset, combinations(held, slots - 1))
        return 1 + min(least(place + 1, kept | {key}) for kept in room)

    return least(0, frozenset())


def lru_misses(requests: Requests, slots: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for key in (key for keys in requests for key in sorted(keys)):
        misses += key not in held
        held[key] = None
        held.move_to_end(key)
        if len(held) > slots:
            held.popitem(last=False)
    return misses


@given(requests_of, st.integers(1, 5))
def test_no_choice_of_victims_does_with_fewer_loads(requests: Requests, slots: int) -> None:
    misses = belady_misses([sorted(keys) for keys in requests], slots)
    assert sum(misses) == fewest_misses(requests, slots)
    assert len(misses) == len(requests)


@given(requests_of, st.integers(1, 5))
def test_no_online_policy_beats_it(requests: Requests, slots: int) -> None:
    assert sum(belady_misses([sorted(keys) for keys in requests], slots)) <= lru_misses(requests, slots)


def test_misses_are_counted_where_they_happen() -> None:
    # With two slots 1 stays through: 3 takes 2's place, which is not wanted before 1 is.
    assert belady_misses([{1, 2}, {3}, {1}, {2}], 2) == [2, 1, 0, 1]


def test_a_request_larger_than_the_cache_is_served_all_the_same() -> None:
    assert belady_misses([[1, 2, 3], [1, 2, 3]], 2) == [3, 1]
    assert belady_misses([[1], [1]], 1) == [1, 0]


def test_a_cache_without_slots_is_refused() -> None:
    with pytest.raises(ValueError, match="0 slots"):
        belady_misses([{1}], 0)
