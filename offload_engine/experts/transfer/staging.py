"""Bounce buffers: pinned host memory in which an expert waits between disk and device."""

from __future__ import annotations

import queue

from torch import Tensor

from offload_engine.experts.arena import SlotArena
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.marks import Mark


class Bounce:
    """One buffer, and the copy that last read from it."""

    def __init__(self, data: memoryview, tensor: Tensor) -> None:
        self.data = data
        """Writable bytes, which start on a page."""
        self.tensor = tensor
        """The same, uint8."""
        self.copied: Mark | None = None
        """When it may be written to again; None: now."""


class Staging:
    """A number of buffers, handed out in turn: the one whose copy was enqueued first comes first."""

    def __init__(self, driver: StreamDriver, buffers: int, slab_bytes: int) -> None:
        """Raises `MemoryBudgetError` when the system refuses the memory; where it only refuses to pin it, see
        `refusal`.
        """
        self._driver = driver
        self._memory = SlotArena(buffers, slab_bytes)
        self._all: Tensor | None = None
        self.refusal: str | None = None
        """Why the buffers are pageable, which makes copies slower and keeps the host waiting for them; None: they are
        pinned.
        """
        self._idle: queue.SimpleQueue[Bounce] = queue.SimpleQueue()
        try:
            self._memory.wait_touched()
            self._all = self._memory.whole()
            self.refusal = driver.pin(self._all, slab_bytes)
        except BaseException:
            self._memory.close()
            raise
        for number in range(buffers):
            self._idle.put(Bounce(self._memory.buffer(number), self._memory.slab(number)))

    def take(self) -> Bounce:
        """The next buffer, once there is one. The host has yet to wait for its last copy."""
        return self._idle.get()

    def give_back(self, bounce: Bounce) -> None:
        """For whoever comes next."""
        self._idle.put(bounce)

    def close(self) -> None:
        """Unpin and free, after all copies have run and all buffers were given back. Idempotent."""
        if self._all is not None and self.refusal is None:
            self._driver.unpin(self._all, self._memory.slab_bytes)
        self._all = None
        while not self._idle.empty():
            self._idle.get_nowait()
        self._memory.close()
