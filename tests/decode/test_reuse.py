"""Which lane a prompt gets, on lists of ids."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from offload_engine.decode.reuse import Start, choose, common_positions

ids = st.lists(st.integers(0, 2), max_size=40)


@given(ids, ids, st.integers(1, 8))
def test_positions_in_common_are_whole_blocks_that_agree_and_no_further_block_does(
    held: Sequence[int], prompt: Sequence[int], length: int
) -> None:
    common = common_positions(held, prompt, length)
    assert common % length == 0
    assert held[:common] == prompt[:common]
    following = slice(common, common + length)
    assert held[following] != prompt[following] or len(held[following]) < length


def test_a_conversation_goes_on_where_it_was() -> None:
    held = [[1, 2, 3, 4], [1, 2, 5, 6], [], [1, 2, 5, 6, 7, 8]]
    assert choose(held, [2, 0, 1, 3], [1, 2, 5, 6, 9, 9], 2) == Start(1, 1, 4)
    assert choose(held, [2, 0, 1, 3], [1, 2, 5, 6, 7, 8, 9, 9], 2) == Start(3, 3, 6)
    assert choose(held, [2, 0, 1], [1, 2, 5, 6, 7, 8, 9, 9], 2) == Start(1, 3, 6), "the other lane is busy"


def test_a_beginning_that_many_share_is_copied_to_the_lane_used_least_recently() -> None:
    held = [[1, 2, *range(10, 20)], [8, 8], [1, 2, *range(20, 30)]]
    assert choose(held, [1, 2, 0], [1, 2, 3, 4], 2) == Start(1, 0, 2)
    assert choose(held, [2, 0], [1, 2, 3, 4], 2) == Start(2, 2, 2), "the one to be overwritten has it itself"


def test_the_last_turn_asked_again_takes_its_own_lane() -> None:
    held = [[*range(8), 90, 91], [5, 5]]
    assert choose(held, [1, 0], [*range(8), 70, 71], 2) == Start(0, 0, 8)


def test_with_nothing_in_common_the_least_recently_used_lane_is_taken() -> None:
    assert choose([[1, 2], [3, 4]], [1, 0], [5, 6], 2) == Start(1, 1, 0)
    assert choose([[1, 2], [3, 4]], [0, 1], [], 2) == Start(0, 0, 0)
    assert choose([[], []], [1, 0], [5, 6], 2) == Start(1, 1, 0)


@given(st.lists(ids, min_size=1, max_size=4), ids, st.integers(1, 4), st.randoms())
def test_nothing_in_common_is_left_unused(held: list[list[int]], prompt: list[int], length: int, drawn: object) -> None:
    free = list(range(len(held)))
    drawn.shuffle(free)  # type: ignore[attr-defined]
    start = choose(held, free, prompt, length)
    assert start.lane in free
    assert start.positions == common_positions(held[start.source], prompt, length)
    assert start.positions == max(common_positions(one, prompt, length) for one in held)
