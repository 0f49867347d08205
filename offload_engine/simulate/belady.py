"""The fewest misses that any eviction can have which fetches on demand: Belady's MIN, with the future known."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from offload_engine.core import ExpertKey
from offload_engine.errors import UsageError

NEVER = 2**62
"""Next use of an expert that no later demand asks for."""


def belady_misses(demands: Sequence[Sequence[ExpertKey]], slots: int) -> int:
    """Misses when the expert whose next use is farthest makes room (L. A. Belady, IBM Systems Journal 5(2), 1966).

    `demands` are the distinct experts of one layer run after the other. Within a demand what is resident is computed
    first, as the scheduler does, so that nothing of it is evicted before its use; every miss takes a slot. The cache
    starts empty. O(n log n) in the experts demanded. Raises `UsageError` for less than one slot.
    """
    if slots < 1:
        raise UsageError(f"a replay with {slots} slots; wanted at least 1")
    next_uses = _next_uses(demands)
    resident: dict[ExpertKey, int] = {}
    """Next use of each."""
    farthest: list[tuple[int, ExpertKey]] = []
    """Heap of (-next use, key); an entry that `resident` doesn't confirm is out of date."""
    misses = 0
    for demand, uses in zip(demands, next_uses, strict=True):
        missing = []
        for key, use in zip(demand, uses, strict=True):
            if key in resident:
                resident[key] = use
                heapq.heappush(farthest, (-use, key))
            else:
                missing.append((key, use))
        for key, use in missing:
            if len(resident) == slots:
                _evict_farthest(resident, farthest)
            resident[key] = use
            heapq.heappush(farthest, (-use, key))
        misses += len(missing)
    return misses


def _evict_farthest(resident: dict[ExpertKey, int], farthest: list[tuple[int, ExpertKey]]) -> None:
    while True:
        use, key = heapq.heappop(farthest)
        if resident.get(key) == -use:
            del resident[key]
            return


def _next_uses(demands: Sequence[Sequence[ExpertKey]]) -> list[list[int]]:
    """For each expert of each demand the number of the next demand that holds it."""
    upcoming: dict[ExpertKey, int] = {}
    reversed_uses = []
    for number in range(len(demands) - 1, -1, -1):
        reversed_uses.append([upcoming.get(key, NEVER) for key in demands[number]])
        upcoming |= dict.fromkeys(demands[number], number)
    return reversed_uses[::-1]
