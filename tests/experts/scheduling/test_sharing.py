"""Sharing misses with the CPU: the decision against every other that could be made."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.experts.scheduling.sharing import Missing, Rates, cheapest_first, choose, soonest

SECONDS = st.integers(0, 40).map(lambda value: value / 8)  # exact in binary: sums in any order are the same
RATES = st.builds(
    Rates, copy=SECONDS, expert=SECONDS, token=SECONDS, trip=SECONDS, row=SECONDS, own=SECONDS, read=SECONDS
)
WAITING = st.integers(0, 4).map(lambda value: value / 2)
LAYERS = st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=7).map(
    lambda rows: [Missing(expert, tokens, hosted) for expert, (tokens, hosted) in enumerate(rows)]
)


def ends(missing: Sequence[Missing], computed: Collection[int], rates: Rates, waiting: float) -> float:
    """When the layer has all of `missing`, of which the CPU computes `computed`; infinite where it can't."""
    mine = [one for one in missing if one.expert in computed]
    theirs = [one for one in missing if one.expert not in computed]
    if not all(one.hosted for one in mine):
        return math.inf
    link = (waiting + len(theirs)) * rates.copy if theirs else 0.0
    read = sum(rates.read for one in theirs if not one.hosted)
    if not all(one.hosted for one in theirs):
        link = max(link, read + rates.copy)
    if not mine:
        return link
    cpu = rates.trip
    for one in mine:
        cpu += rates.expert + one.tokens * (rates.token + rates.row)
    return rates.own + max(link, cpu)


@given(missing=LAYERS, rates=RATES, waiting=WAITING)
def test_no_other_set_of_experts_ends_the_layer_sooner_and_none_as_soon_is_smaller(
    missing: list[Missing], rates: Rates, waiting: float
) -> None:
    computed = choose("auto", missing, rates, waiting)
    reached = ends(missing, computed, rates, waiting)
    for count in range(len(missing) + 1):
        for other in itertools.combinations(range(len(missing)), count):
            soon = ends(missing, other, rates, waiting)
            assert reached <= soon
            assert count >= len(computed) or soon > reached


@given(missing=LAYERS, rates=RATES, waiting=WAITING, share=st.floats(0, 1))
def test_only_what_is_in_host_memory_is_computed_and_the_least_of_it(
    missing: list[Missing], rates: Rates, waiting: float, share: float
) -> None:
    tokens = {one.expert: one.tokens for one in missing if one.hosted}
    for computed in (choose("auto", missing, rates, waiting), choose(share, missing, rates)):
        assert len(set(computed)) == len(computed)
        assert set(computed) <= set(tokens)
        most = max((tokens[expert] for expert in computed), default=0)
        assert all(tokens[expert] >= most for expert in set(tokens) - set(computed))
    assert len(computed) == min(len(tokens), round(share * len(missing)))


def test_of_equals_the_least_wanted_goes_to_the_cpu() -> None:
    missing = [Missing(7, 2), Missing(3, 2), Missing(5, 1), Missing(1, 2, hosted=False)]
    assert [one.expert for one in cheapest_first(missing)] == [5, 3, 7]


def test_where_a_copy_and_an_expert_take_the_same_half_of_them_go_either_way() -> None:
    same = Rates(copy=4.0, expert=2.0, token=0.125)
    missing = [Missing(expert, 16) for expert in range(6)]
    assert choose("auto", missing, same) == [5, 4, 3]
    assert ends(missing, [5, 4, 3], same, 0.0) == 12.0


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (40, 0)])
def test_a_layer_that_misses_one_expert_computes_it_where_that_is_faster(tokens: int, count: int) -> None:
    assert soonest([Missing(0, tokens)], Rates(copy=1.0, expert=0.25, token=0.0625, trip=0.125)) == count


def test_copies_under_way_speak_for_the_cpu() -> None:
    rates = Rates(copy=1.0, expert=2.5, token=0.0)
    assert choose("auto", [Missing(0, 1)], rates) == []
    assert choose("auto", [Missing(0, 1)], rates, waiting=1.5) == []
    assert choose("auto", [Missing(0, 1)], rates, waiting=2.0) == [0]


def test_where_all_wait_for_the_disk_nothing_is_gained() -> None:
    missing = [Missing(expert, 1, hosted=expert > 1) for expert in range(6)]
    assert choose("auto", missing, Rates(copy=1.0, expert=0.25, token=0.0, read=4.0)) == []
    assert choose("auto", missing, Rates(copy=1.0, expert=0.25, token=0.0, read=1.0)) == [5, 4, 3]


def test_a_gain_that_the_decision_itself_eats_up_is_none() -> None:
    assert choose("auto", [Missing(0, 1)], Rates(copy=1.0, expert=0.5, token=0.0, own=0.375)) == [0]
    assert choose("auto", [Missing(0, 1)], Rates(copy=1.0, expert=0.5, token=0.0, own=0.5)) == []


def test_off_is_off() -> None:
    assert choose("off", [Missing(0, 1)], Rates(copy=9.0, expert=0.0, token=0.0)) == []
