"""Whose turn it is: which lanes share the next forward. No torch, no clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable

GroupSize = Callable[[Hashable, int], int]
"""Given a kind and how many lanes of it there are: how many of them should share forwards, at least 1."""


class Turns:
    """Lanes of one kind share forwards, in groups; a place in the group changes hands only where a block ends.

    A lane keeps its place from block to block. It gives it up to one of its kind that waits once it has had `blocks`
    blocks in a row, since every change costs loads; to one of another kind, with which it can't share a forward, at the
    end of the block under way. Who gives up goes behind all who wait. So every lane is served within one turn of each
    of the groups before it.

    `blocks` None: lanes of a kind don't take turns, and the first to come are the first to end. That is what moves the
    fewest bytes: on a recorded trace of llada2-mini's shape under dMoE (44 slots per layer), changing after every block
    of 32 tokens took 1.7 times the loads (docs/LOG.md).
    """

    def __init__(self, group_size: GroupSize, blocks: int | None = None) -> None:
        self._group_size = group_size
        self._blocks = blocks
        self._kinds: dict[int, Hashable] = {}
        """Of every lane in use."""
        self._waiting: deque[int] = deque()
        """Lanes without a place, who comes next first."""
        self._had: dict[int, int] = {}
        """Lanes with a place, by how many blocks they ended in it."""
        self._inside: set[int] = set()
        """Of these, the ones within a block."""

    def enter(self, lane: int, kind: Hashable) -> None:
        """`lane` has a block to be denoised."""
        self._kinds[lane] = kind
        self._waiting.append(lane)

    def end_block(self, lane: int) -> None:
        """A lane with a place has ended its block and has another one."""
        self._inside.discard(lane)
        self._had[lane] += 1

    def leave(self, lane: int) -> None:
        """`lane` has nothing more to be denoised."""
        del self._kinds[lane]
        self._inside.discard(lane)
        if self._had.pop(lane, None) is None:
            self._waiting.remove(lane)

    def next(self) -> list[int]:
        """The lanes that share the next forward, all of one kind; empty only where no lane is in use."""
        if not self._kinds:
            return []
        if any(self._kinds[lane] != self._kind for lane in self._waiting):
            self._give_up(self._resting())
        elif self._blocks is not None and self._waiting:
            most = self._blocks
            self._give_up(lane for lane in self._resting() if self._had[lane] >= most)
        kind = self._kind
        room = self._group_size(kind, sum(one == kind for one in self._kinds.values()))
        self._shrink(room)
        self._fill(kind, room)
        self._inside.update(self._had)
        return list(self._had)

    @property
    def _kind(self) -> Hashable:
        """Of the group, or of the one that comes next where there is none."""
        lane = next(iter(self._had), self._waiting[0] if self._waiting else None)
        return None if lane is None else self._kinds[lane]

    def _resting(self) -> list[int]:
        """Lanes with a place that are between two blocks."""
        return [lane for lane in self._had if lane not in self._inside]

    def _give_up(self, lanes: Iterable[int]) -> None:
        for lane in list(lanes):
            del self._had[lane]
            self._waiting.append(lane)

    def _shrink(self, room: int) -> None:
        """The group has become too large: who rests gives up its place for now, and comes first again."""
        surplus = len(self._had) - room
        for lane in self._resting()[::-1][: max(0, surplus)]:
            del self._had[lane]
            self._waiting.appendleft(lane)

    def _fill(self, kind: Hashable, room: int) -> None:
        """Give free places to who comes next: to a new group all of its kind may come, to one that is under way nobody
        past a lane of another kind.
        """
        new = not self._had
        for lane in list(self._waiting):
            if len(self._had) >= room or (self._kinds[lane] != kind and not new):
                break
            if self._kinds[lane] == kind:
                self._waiting.remove(lane)
                self._had[lane] = 0
