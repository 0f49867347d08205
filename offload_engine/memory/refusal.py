"""What becomes of memory that the system refuses after the plan said that it was there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from offload_engine.config import format_bytes
from offload_engine.errors import MemoryBudgetError
from offload_engine.memory.plan import MemoryPlan

_ALLOCATOR = re.compile(r"can't allocate memory|not enough memory|bad_alloc|out of memory", re.IGNORECASE)
"""How torch tells of it: in a RuntimeError without a type of its own."""
_THREAD = "can't start new thread"


@contextmanager
def refusals(doing: str) -> Iterator[None]:
    """Turn every way in which Python, torch and our kernels say that there is no memory into `MemoryBudgetError`.

    `doing` completes "memory ran out while ...".
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error)
        if not isinstance(error, MemoryError) and not _ALLOCATOR.search(told) and _THREAD not in told:
            raise
        raise MemoryBudgetError(
            f"memory ran out while {doing} ({_reason(error)}): something else has taken what the plan counted on, or a "
            "limit on this process is below it; free memory, raise the limit, or ask for a smaller --gpu-mem"
        ) from error


def check_still_there(plan: MemoryPlan, available: int) -> None:
    """Refuse what is still to be allocated after the weights, if it has gone since the plan was made: better than to
    swap, or to be killed. `available` bytes.
    """
    wanted = plan.expert_slots + plan.kv_cache + plan.workspace
    if wanted > available:
        missing = format_bytes(wanted - available, round_up=True)
        raise MemoryBudgetError(
            f"{format_bytes(available)} of memory are left, less than when the plan was made a moment ago, but "
            f"{plan.slots} expert slots, the KV cache and the workspace take {format_bytes(wanted, round_up=True)}; "
            f"free memory, or lower --gpu-mem by {missing}"
        )


def _reason(error: Exception) -> str:
    told = str(error)
    asked = re.search(r"(\d+) bytes", told)
    if asked:
        return f"{asked[1]} bytes refused"
    return told.splitlines()[0] if told else "an allocation was refused"
