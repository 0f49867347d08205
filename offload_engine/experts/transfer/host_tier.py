"""The tier between disk and device: a second `ExpertCache`, whose slots are slabs of pinned host memory.

It sees only what the device's cache has missed, which comes back seldom and late: what was asked for often says more
about it than what was asked for last (Zhou, Philbin and Li, USENIX 2001, on second-level caches). It holds what the
device holds too: nothing is ever copied back.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import NamedTuple

from offload_engine.core import ExpertKey
from offload_engine.experts.cache import ExpertCache, Occupancy, SlotState
from offload_engine.experts.eviction import make_eviction
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.pinned import HostSlab, PinnedSlabs

EVICTION = "lfu"


class Held(NamedTuple):
    """A slab that stays its expert's until it is released."""

    slab: HostSlab
    filled: bool
    """Whether the expert is there; else whoever holds it fills it, once the last copy from it has run."""


class HostTier:
    """`slots` experts in host memory. May be used by several threads at once."""

    def __init__(self, driver: StreamDriver, slots: int, slab_bytes: int) -> None:
        """Raises `MemoryBudgetError` when the system refuses the memory; where it only refuses to pin, see `notice`."""
        self._memory = PinnedSlabs(driver, slots, slab_bytes)
        self._slabs = self._memory.slabs
        self._cache = ExpertCache(slots, make_eviction(EVICTION))
        self._lock = threading.Lock()

    @property
    def notice(self) -> str | None:
        """What the user should know; None where all of it is pinned."""
        if self._memory.refusal is None:
            return None
        return (
            f"the system pinned {self._memory.pinned} of {len(self._slabs)} host slots, then refused "
            f"({self._memory.refusal}): experts in the others are copied more slowly; set host_mem to less, or raise "
            "the limit of locked memory (ulimit -l)"
        )

    def present(self, keys: Iterable[ExpertKey]) -> list[bool]:
        """Which of these are there now; unless held, they may be gone at once."""
        with self._lock:
            return [self._cache.slot(key) is not None for key in keys]

    def find(self, key: ExpertKey) -> Held | None:
        """As `hold`, where the expert is there already; else None."""
        with self._lock:
            return self._found(key)

    def hold(self, key: ExpertKey) -> Held | None:
        """The slab of `key`, which is the caller's until `release`; None where all are in use."""
        with self._lock:
            found = self._found(key)
            if found is not None:
                return found
            if self._cache.state(key) is not SlotState.FREE:
                return None  # another thread is filling it
            reservation = self._cache.reserve(key, prefetch=False)
            return None if reservation is None else Held(self._slabs[reservation.slot], filled=False)

    def release(self, key: ExpertKey, held: Held, *, filled: bool) -> None:
        """The holder needs it no more but for the copies that it has enqueued; `filled`: the expert is there now."""
        with self._lock:
            if held.filled:
                self._cache.unpin(key)
            elif filled:
                self._cache.loaded(key)
            else:
                self._cache.failed(key)
                return
            self._cache.use(key, 1.0)

    def _found(self, key: ExpertKey) -> Held | None:
        slot = self._cache.slot(key)
        if slot is None:
            return None
        self._cache.pin(key)
        return Held(self._slabs[slot], filled=True)

    def occupancy(self) -> Occupancy:
        """Its slots by state."""
        with self._lock:
            self._cache.check()
            return self._cache.occupancy()

    def close(self) -> None:
        """Free it, after every copy from here has run. Idempotent."""
        self._memory.close()
