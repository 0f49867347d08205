"""Candidates for eviction in the order of what they are worth."""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Callable

from offload_engine.core import ExpertKey

Rank = tuple[float, int, ExpertKey]
"""What a candidate is worth, and the number of its last event; the lowest goes first."""


class Ranking:
    """Candidates in rising order of (worth, last event), in a sorted list.

    A search is O(log n); an insertion also moves pointers, 40 KB at 5000 experts: about a microsecond, and less than a
    heap pays for passing over the pinned, who are mostly the newest and therefore the lowest.
    """

    def __init__(self) -> None:
        self._events = itertools.count(1)
        self._ranks: dict[ExpertKey, Rank] = {}
        self._sorted: list[Rank] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def worth(self, key: ExpertKey) -> float:
        """What a candidate was placed at."""
        return self._ranks[key][0]

    def place(self, key: ExpertKey, worth: float) -> None:
        """An event of `key`: it is now worth this, and the most recent."""
        if key in self._ranks:
            self.remove(key)
        rank = (worth, next(self._events), key)
        self._ranks[key] = rank
        insort(self._sorted, rank)

    def remove(self, key: ExpertKey) -> None:
        """`key` is no candidate any more."""
        del self._sorted[bisect_left(self._sorted, self._ranks.pop(key))]

    def rescale(self, change: Callable[[float], float]) -> None:
        """Change every worth; no event."""
        self._ranks = {key: (change(worth), event, key) for key, (worth, event, _key) in self._ranks.items()}
        self._sorted = sorted(self._ranks.values())

    def lowest(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The first candidate that is `evictable`."""
        return next((key for _worth, _event, key in self._sorted if evictable(key)), None)
