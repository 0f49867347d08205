"""Whose turn it is: no lane waits for ever, no forward mixes kinds, and places change hands between blocks only."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.decode.turns import Turns


def blocks_in_turn(turns: Turns, lengths: dict[int, list[int]], limit: int = 10_000) -> list[list[int]]:
    """Steps until all is done: lane's remaining blocks as numbers of steps; the lanes of every forward."""
    left = {lane: list(blocks) for lane, blocks in lengths.items()}
    forwards = []
    while lanes := turns.next():
        forwards.append(lanes)
        assert len(forwards) < limit
        for lane in lanes:
            left[lane][0] -= 1
            if left[lane][0] == 0:
                left[lane].pop(0)
                if left[lane]:
                    turns.end_block(lane)
                else:
                    turns.leave(lane)
    return forwards


def entered(turns: Turns, kinds: dict[int, str]) -> Turns:
    for lane, kind in kinds.items():
        turns.enter(lane, kind)
    return turns


def test_the_first_to_come_are_the_first_to_end_where_lanes_take_no_turns() -> None:
    turns = entered(Turns(lambda _kind, _lanes: 2), dict.fromkeys(range(4), "a"))
    forwards = blocks_in_turn(turns, {0: [2, 1], 1: [1], 2: [1, 1], 3: [2]})
    assert forwards == [[0, 1], [0, 2], [0, 2], [3], [3]]


def test_a_place_goes_to_who_waits_after_so_many_blocks() -> None:
    turns = entered(Turns(lambda _kind, _lanes: 1, blocks=2), dict.fromkeys(range(3), "a"))
    forwards = blocks_in_turn(turns, {0: [1] * 5, 1: [1] * 2, 2: [1] * 3})
    assert [lane for (lane,) in forwards] == [0, 0, 1, 1, 2, 2, 0, 0, 2, 0]


def test_who_has_nobody_behind_goes_on() -> None:
    turns = entered(Turns(lambda _kind, _lanes: 2, blocks=1), dict.fromkeys(range(2), "a"))
    assert blocks_in_turn(turns, {0: [1] * 4, 1: [3]}) == [[0, 1]] * 3 + [[0]]


def test_kinds_change_after_every_block() -> None:
    turns = entered(Turns(lambda _kind, lanes: lanes, blocks=4), {0: "a", 1: "b", 2: "a"})
    forwards = blocks_in_turn(turns, {0: [1, 1], 1: [2, 1], 2: [3]})
    assert forwards == [[0, 2], [2], [2], [1], [1], [0], [1]]


def test_no_lane_joins_past_one_that_has_waited_longer() -> None:
    turns = Turns(lambda _kind, lanes: lanes)
    turns.enter(0, "a")
    assert turns.next() == [0]
    turns.enter(1, "b")
    turns.enter(2, "a")
    assert turns.next() == [0]
    turns.end_block(0)
    assert turns.next() == [1]
    turns.leave(1)
    assert turns.next() == [2, 0]


def test_a_lane_joins_at_once_where_there_is_room() -> None:
    turns = Turns(lambda _kind, lanes: lanes)
    turns.enter(0, "a")
    assert turns.next() == [0]
    turns.enter(1, "a")
    assert turns.next() == [0, 1]


def test_a_group_that_became_too_large_shrinks_between_blocks_and_keeps_its_order() -> None:
    size = [3]
    turns = entered(Turns(lambda _kind, _lanes: size[0]), dict.fromkeys(range(3), "a"))
    assert turns.next() == [0, 1, 2]
    size[0] = 1
    assert turns.next() == [0, 1, 2], "all are within a block"
    for lane in (0, 1, 2):
        turns.end_block(lane)
    assert turns.next() == [0]
    turns.leave(0)
    assert turns.next() == [1]


def test_lanes_may_leave_while_they_wait() -> None:
    turns = entered(Turns(lambda _kind, _lanes: 1), dict.fromkeys(range(3), "a"))
    assert turns.next() == [0]
    turns.leave(1)
    turns.leave(0)
    assert turns.next() == [2]
    turns.leave(2)
    assert turns.next() == []


lanes = st.dictionaries(
    st.integers(0, 9),
    st.tuples(st.sampled_from("abc"), st.lists(st.integers(1, 4), min_size=1, max_size=5)),
    min_size=1,
)


@given(lanes, st.integers(1, 4), st.one_of(st.none(), st.integers(1, 3)))
def test_everyone_gets_all_blocks_and_nobody_waits_for_more_than_one_turn_of_each_before(
    asked: dict[int, tuple[str, list[int]]], size: int, blocks: int | None
) -> None:
    turns = entered(Turns(lambda _kind, _lanes: size, blocks), {lane: kind for lane, (kind, _blocks) in asked.items()})
    forwards = blocks_in_turn(turns, {lane: steps for lane, (_kind, steps) in asked.items()})
    for together in forwards:
        assert len({asked[lane][0] for lane in together}) == 1
        assert len(together) == len(set(together)) <= size
    for lane, (_kind, steps) in asked.items():
        taken = [number for number, together in enumerate(forwards) if lane in together]
        assert len(taken) == sum(steps)
        reached = 0
        for block in steps:  # a block is not interrupted
            span = taken[reached : reached + block]
            assert span == list(range(span[0], span[0] + block))
            reached += block
        if blocks is not None:
            gaps = [later - earlier - 1 for earlier, later in pairwise(taken)]
            longest_turn = sum(
                max(sum(other[start : start + blocks]) for start in range(len(other)))
                for name, (_kind, other) in asked.items()
                if name != lane
            )
            assert max([taken[0], *gaps]) <= longest_turn


@pytest.mark.parametrize("blocks", [None, 2])
def test_one_after_the_other_where_only_one_has_room(blocks: int | None) -> None:
    turns = entered(Turns(lambda _kind, _lanes: 1, blocks), {0: "a", 1: "a"})
    forwards = blocks_in_turn(turns, {0: [1] * 3, 1: [1] * 3})
    assert sorted(lane for (lane,) in forwards) == [0] * 3 + [1] * 3
