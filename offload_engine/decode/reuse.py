"""Which lane a prompt gets, and whose keys and values it begins with. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Start(NamedTuple):
    """Where an answer is worked out."""

    lane: int
    source: int
    """The lane that holds what the prompt begins with; another one if that is to be copied."""
    positions: int
    """How many of its positions are reused, in whole blocks; 0: none."""


def choose(held: Sequence[Sequence[int]], free: Sequence[int], prompt: Sequence[int], block_length: int) -> Start:
    """A lane of the `free` ones, which are in the order of their last use, for `prompt`.

    `held`: by lane, the token ids whose keys and values it holds, as far as they are of use to this prompt; busy lanes
    too. A lane that would lose at most half of what it holds goes on with it, the one that shares most first: that is
    the next turn of a conversation, or another version of its last one. Else the least recently used lane is taken, so
    that a beginning that many prompts share costs no conversation its place; it is copied there.
    """
    common = [common_positions(one, prompt, block_length) for one in held]
    going_on = [lane for lane in free if common[lane] and 2 * common[lane] >= len(held[lane])]
    lane = max(going_on, key=lambda one: common[one]) if going_on else free[0]
    source = max([lane, *range(len(held))], key=lambda one: common[one])
    return Start(lane, source, common[source])


def common_positions(held: Sequence[int], prompt: Sequence[int], block_length: int) -> int:
    """Leading positions in which both agree, in whole blocks."""
    longest = min(len(held), len(prompt)) // block_length * block_length
    for start in range(0, longest, block_length):
        if list(held[start : start + block_length]) != list(prompt[start : start + block_length]):
            return start
    return longest
