"""Another number of slots in host memory, which change their number where they are.

`experts.device.resizing` is the same for a device.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

from offload_engine.errors import MemoryBudgetError, UsageError
from offload_engine.experts.arena import Slots
from offload_engine.experts.scheduling.scheduler import ExpertScheduler

REFUSALS = MemoryBudgetError, UsageError
"""What `Slots.resize` raises, having changed nothing."""


def change_slots(slots: int, arena: Slots, scheduler: ExpertScheduler, books: AbstractContextManager[object]) -> None:
    """Have `slots` slots while nothing is under way and nobody holds a view of any. `books` guards the scheduler.

    Raises `REFUSALS`; books and memory have as many slots as before then. After anything else that is raised they may
    disagree, and no book can be trusted.
    """
    try:
        if slots > arena.slots:
            arena.resize(slots)
        with books:
            moves = scheduler.resize(slots)
        for source, target in moves:
            arena.slab(target).copy_(arena.slab(source))
        if slots < arena.slots:
            arena.resize(slots)
    except REFUSALS:
        with books:
            scheduler.resize(arena.slots)
        raise
