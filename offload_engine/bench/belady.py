"""The fewest loads that any cache could have done with: Belady's rule on a recorded sequence of requests."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence


def belady_misses(requests: Sequence[Collection[Hashable]], slots: int) -> list[int]:
    """How many of each request's keys have to be loaded by a cache of `slots` that starts empty and knows the future.

    A request's keys, one layer's experts of one forward, are used one after the other, and each may be evicted once it
    is used. The victim is the key whose next use is furthest away (Belady 1966): no choice of victims needs fewer loads
    for this sequence, and no prefetch saves one.
    """
    if slots < 1:
        raise ValueError(f"{slots} slots, wanted at least 1")
    uses: dict[Hashable, list[float]] = defaultdict(list)
    for place, key in enumerate(key for keys in requests for key in keys):
        uses[key].append(place)
    for places in uses.values():
        places.append(math.inf)
        places.reverse()  # the next use is the last item
    cache = _ClairvoyantCache(slots)
    misses = []
    for keys in requests:
        missed = 0
        for key in keys:
            missed += key not in cache.next_use
            uses[key].pop()
            cache.put(key, uses[key][-1])
        misses.append(missed)
    return misses


class _ClairvoyantCache:
    """Keys with their next use; full, it gives up the one that is furthest away."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.next_use: dict[Hashable, float] = {}
        self._furthest: list[tuple[float, int, Hashable]] = []
        """A heap of (-next use, serial, key); an entry that `next_use` no longer agrees with is out of date."""
        self._serial = 0

    def put(self, key: Hashable, next_use: float) -> None:
        """Hold `key`, and note when it will be wanted again."""
        if key not in self.next_use and len(self.next_use) == self.slots:
            self._evict()
        self.next_use[key] = next_use
        self._serial += 1
        heapq.heappush(self._furthest, (-next_use, self._serial, key))

    def _evict(self) -> None:
        while True:
            negative, _serial, key = heapq.heappop(self._furthest)
            if self.next_use.get(key) == -negative:
                del self.next_use[key]
                return
