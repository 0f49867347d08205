"""Host memory from which a device copies by itself: slabs of exactly the size they have, pinned where they are.

torch's own `pin_memory` rounds sizes up to a power of two, and pins only what it has allocated itself.
"""

from __future__ import annotations

from torch import Tensor

from offload_engine.config import format_bytes
from offload_engine.errors import MemoryBudgetError
from offload_engine.experts.arena import HostSlots
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.marks import Mark
from offload_engine.memory import available_memory
from offload_engine.pages import touch

CHUNK_BYTES = 2**28
"""Taken, and later pinned, at a time: what the system grants before it refuses is kept, and a reader is held up for
some tenths of a second at most.
"""
LEAST_FREE = 2**29
"""RAM that is left to everybody else: memory that is pinned can't be swapped."""


class HostSlab:
    """Host memory for one expert, and the copy that last read from it."""

    __slots__ = ("copied", "data", "pinned", "tensor")

    def __init__(self, data: memoryview, tensor: Tensor) -> None:
        self.data = data
        """Writable bytes, which start on a page."""
        self.tensor = tensor
        """The same, uint8."""
        self.pinned = False
        """Whether copies from here run by themselves. Once it is, it stays so."""
        self.copied: Mark | None = None
        """What has to run before it may be filled again; None: nothing."""


class PinnedSlabs:
    """Room for `count` slabs of `slab_bytes` bytes, of which a chunk is taken when the first slab in it is wanted, and
    pinned when all of it has been filled: to take and pin 24 GB takes many seconds, in which a run can have begun.

    Where the system refuses to pin, that chunk and the rest stay pageable: the same bytes, more slowly. Where a chunk
    isn't given, or RAM is short, `have` says so, and there are no more slabs than before. Raises `MemoryBudgetError`
    when the system refuses the addresses. Calls must be serialised, but for `pin` and `close`.
    """

    def __init__(self, driver: StreamDriver, count: int, slab_bytes: int, least_free: int = LEAST_FREE) -> None:
        """`least_free`: bytes of RAM below which no further chunk is taken."""
        self._driver = driver
        self._least_free = least_free
        self._memory = HostSlots(count, slab_bytes)
        self._per_chunk = max(1, CHUNK_BYTES // slab_bytes)
        self._unfilled: list[set[int]] = []
        """By chunk that is there, its slabs that were never filled."""
        self._pinned: list[Tensor] = []
        self.slabs: list[HostSlab] = []
        """Those that are there, the first ones."""
        self.refusal: str | None = None
        """Why some slabs are pageable; None: the system has not refused to pin any."""
        self.shortage: str | None = None
        """Why there are fewer slabs than there is room for; None: more are given when they are wanted."""

    @property
    def room(self) -> int:
        """How many slabs there may be."""
        return self._memory.slots

    @property
    def pinned(self) -> int:
        """How many slabs are pinned."""
        return sum(chunk.numel() for chunk in self._pinned) // self._memory.slab_bytes

    def have(self, number: int) -> bool:
        """See that slab `number` is there; the next after those that are is the last that may be asked for."""
        if number < len(self.slabs):
            return True
        if self.shortage is None:
            self.shortage = self._take()
        return self.shortage is None

    def filled(self, number: int) -> int | None:
        """Slab `number` is filled. Returns the chunk to `pin` if it was the last of its chunk to be."""
        chunk = number // self._per_chunk
        if number not in self._unfilled[chunk]:
            return None
        self._unfilled[chunk].remove(number)
        return None if self._unfilled[chunk] else chunk

    def pin(self, chunk: int) -> None:
        """Pin a chunk, whether or not its slabs are in use; each chunk once."""
        if self.refusal is not None:
            return
        first = chunk * self._per_chunk
        memory = self._memory.slabs(first, self._per_chunk)
        refusal = self._driver.pin(memory)
        if refusal is not None:
            self.refusal = refusal
            return
        self._pinned.append(memory)
        for slab in self.slabs[first : first + self._per_chunk]:
            slab.pinned = True

    def close(self) -> None:
        """Unpin and free, after every copy from here has run. Idempotent."""
        while self._pinned:
            self._driver.unpin(self._pinned.pop())
        self.slabs.clear()
        self._memory.close()

    def _take(self) -> str | None:
        """Have one more chunk; None, or why there is none."""
        first = len(self.slabs)
        memory = self._memory.slabs(first, self._per_chunk)
        wanted, left = memory.numel(), available_memory()
        if left < wanted + self._least_free:
            return f"{format_bytes(left)} of RAM are left, wanted {format_bytes(wanted + self._least_free)}"
        if not touch(memory):
            return f"the system refused {wanted} bytes"
        numbers = range(first, first + wanted // self._memory.slab_bytes)
        self.slabs += [HostSlab(self._memory.buffer(number), self._memory.slab(number)) for number in numbers]
        self._unfilled.append(set(numbers))
        return None


def pinned_buffers(driver: StreamDriver, count: int, slab_bytes: int) -> PinnedSlabs:
    """`count` slabs that are there and, unless the system refuses, pinned: for what doesn't stay.

    Raises `MemoryBudgetError` when there is no memory for them.
    """
    buffers = PinnedSlabs(driver, count, slab_bytes, least_free=0)
    try:
        for number in range(count):
            if not buffers.have(number):
                raise MemoryBudgetError(
                    f"{count} buffers of {slab_bytes} bytes, between host and device, can't be had: "
                    f"{buffers.shortage}; free memory, or lower host_mem"
                )
            chunk = buffers.filled(number)
            if chunk is not None:
                buffers.pin(chunk)
    except BaseException:
        buffers.close()
        raise
    return buffers
