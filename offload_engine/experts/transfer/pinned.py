"""Host memory from which a device copies by itself: slabs of exactly the size they have, pinned where they are.

torch's own `pin_memory` rounds sizes up to a power of two, and pins only what it has allocated itself.
"""

from __future__ import annotations

from torch import Tensor

from offload_engine.experts.arena import SlotArena
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.marks import Mark

CHUNK_BYTES = 2**30
"""Pinned at a time: what the system grants before it refuses is kept."""


class HostSlab:
    """Host memory for one expert, and the copy that last read from it."""

    __slots__ = ("copied", "data", "tensor")

    def __init__(self, data: memoryview, tensor: Tensor) -> None:
        self.data = data
        """Writable bytes, which start on a page."""
        self.tensor = tensor
        """The same, uint8."""
        self.copied: Mark | None = None
        """What has to run before it may be filled again; None: nothing."""


class PinnedSlabs:
    """`count` slabs of `slab_bytes` bytes. Where the system refuses to pin them, the rest is pageable: copies from
    there are slower, keep the host waiting, and bring the same bytes.

    Raises `MemoryBudgetError` when the system refuses the memory itself.
    """

    def __init__(self, driver: StreamDriver, count: int, slab_bytes: int) -> None:
        self._driver = driver
        self._memory = SlotArena(count, slab_bytes)
        self._pinned: list[Tensor] = []
        self.refusal: str | None = None
        """Why some slabs are pageable; None: none is."""
        self.slabs: list[HostSlab] = []
        try:
            self._memory.wait_touched()
            self._pin(max(1, CHUNK_BYTES // slab_bytes) * slab_bytes)
            self.slabs += [HostSlab(self._memory.buffer(number), self._memory.slab(number)) for number in range(count)]
        except BaseException:
            self.close()
            raise

    @property
    def pinned(self) -> int:
        """How many slabs are pinned: the first ones."""
        return sum(chunk.numel() for chunk in self._pinned) // self._memory.slab_bytes

    def close(self) -> None:
        """Unpin and free, after every copy from here has run. Idempotent."""
        while self._pinned:
            self._driver.unpin(self._pinned.pop())
        self.slabs.clear()
        self._memory.close()

    def _pin(self, chunk_bytes: int) -> None:
        """Pin chunks of whole slabs, for no copy may span two of them."""
        for chunk in self._memory.whole().split(chunk_bytes):
            self.refusal = self._driver.pin(chunk)
            if self.refusal is not None:
                return
            self._pinned.append(chunk)
