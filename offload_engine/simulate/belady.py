"""The fewest misses that any eviction can have which fetches on demand: Belady's MIN, with the future known."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from offload_engine.core import ExpertKey
from offload_engine.errors import UsageError

NEVER = 2**62
"""Next use of an expert that no later demand asks for."""


def belady_misses(demands: Sequence[Sequence[ExpertKey]], slots: int) -> list[int]:
    """Misses of each demand when the expert whose next use is farthest makes room (Belady, IBM Syst. J. 5(2), 1966).

    `demands` are the experts of one layer run after the other, taken one by one in their order; every miss takes a
    slot, and the cache starts empty. That is the optimum for this order of uses; a scheduler that computes what is
    resident first uses the experts of one demand in another order, which can gain it a tie. O(n log n) in the experts
    demanded. Raises `UsageError` for less than one slot.
    """
    if slots < 1:
        raise UsageError(f"a replay with {slots} slots; wanted at least 1")
    uses = [key for demand in demands for key in demand]
    resident: dict[ExpertKey, int] = {}
    """Next use of each."""
    farthest: list[tuple[int, ExpertKey]] = []
    """Heap of (-next use, key); an entry that `resident` doesn't confirm is out of date."""
    next_uses = iter(_next_uses(uses))
    misses = [0] * len(demands)
    for place, demand in enumerate(demands):
        for key in demand:
            if key not in resident:
                misses[place] += 1
                if len(resident) == slots:
                    _evict_farthest(resident, farthest)
            resident[key] = next_use = next(next_uses)
            heapq.heappush(farthest, (-next_use, key))
    return misses


def _evict_farthest(resident: dict[ExpertKey, int], farthest: list[tuple[int, ExpertKey]]) -> None:
    while True:
        use, key = heapq.heappop(farthest)
        if resident.get(key) == -use:
            del resident[key]
            return


def _next_uses(uses: Sequence[ExpertKey]) -> list[int]:
    """For each use the number of the next one of the same expert."""
    upcoming: dict[ExpertKey, int] = {}
    found = []
    for number in range(len(uses) - 1, -1, -1):
        found.append(upcoming.get(uses[number], NEVER))
        upcoming[uses[number]] = number
    return found[::-1]
