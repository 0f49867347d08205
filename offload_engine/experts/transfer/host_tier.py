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
from offload_engine.experts.scheduling.cache import ExpertCache, Occupancy, SlotState
from offload_engine.experts.scheduling.eviction import make_eviction
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.pinned import HostSlab, PinnedSlabs

EVICTION = "lfu"


class Held(NamedTuple):
    """A slab that stays its expert's until it is released."""

    slab: HostSlab
    number: int
    filled: bool
    """Whether the expert is there; else whoever holds it fills it, once the last copy from it has run."""


class HostTier:
    """At most `slots` experts in host memory, which is taken and pinned as they come. May be used by several threads at
    once.
    """

    def __init__(self, driver: StreamDriver, slots: int, slab_bytes: int) -> None:
        """Raises `MemoryBudgetError` when the system refuses the addresses; of what it refuses later see `notices`."""
        self._memory = PinnedSlabs(driver, slots, slab_bytes)
        self._cache = ExpertCache(slots, make_eviction(EVICTION))
        self._lock = threading.Lock()

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know so far; empty where everything taken is pinned, or will be."""
        told, memory = [], self._memory
        if memory.shortage is not None:
            told.append(
                f"host memory ran short ({memory.shortage}): of {memory.room} host slots there are "
                f"{len(memory.slabs)}, and what they don't hold is read from disk; free memory, or set host_mem to less"
            )
        if memory.refusal is not None:
            told.append(
                f"the system pinned {memory.pinned} of {memory.room} host slots, then refused ({memory.refusal}): "
                "experts in the others are copied in host memory once more on their way; set host_mem to less, or "
                "raise the limit of locked memory (ulimit -l)"
            )
        return tuple(told)

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
            slot = self._reserve(key)
            return None if slot is None else Held(self._memory.slabs[slot], slot, filled=False)

    def release(self, key: ExpertKey, held: Held, *, filled: bool) -> None:
        """The holder needs it no more but for the copies that it has enqueued; `filled`: the expert is there now."""
        chunk = None
        with self._lock:
            if held.filled:
                self._cache.unpin(key)
            elif filled:
                self._cache.loaded(key)
                chunk = self._memory.filled(held.number)
            else:
                self._cache.failed(key)
                return
            self._cache.use(key, 1.0)
        if chunk is not None:
            self._memory.pin(chunk)

    def _reserve(self, key: ExpertKey) -> int | None:
        """A slot for `key` whose memory is there. Free slots are handed out from the lowest, so that no chunk of memory
        is taken before the one below is in use.
        """
        reservation = self._cache.reserve(key, prefetch=False)
        if reservation is not None and not self._memory.have(reservation.slot):
            self._cache.failed(key)
            self._cache.shrink(len(self._memory.slabs))
            reservation = self._cache.reserve(key, prefetch=False)
        return None if reservation is None else reservation.slot

    def _found(self, key: ExpertKey) -> Held | None:
        slot = self._cache.slot(key)
        if slot is None:
            return None
        self._cache.pin(key)
        return Held(self._memory.slabs[slot], slot, filled=True)

    def occupancy(self) -> Occupancy:
        """Its slots by state."""
        with self._lock:
            self._cache.check()
            return self._cache.occupancy()

    def close(self) -> None:
        """Free it, after every copy from here has run. Idempotent."""
        self._memory.close()
