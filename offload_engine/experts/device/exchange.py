"""What goes between host and device around a layer: a row of the slot table there, a record of the layer's news back.

All is small and goes by the compute stream, in order with the work it belongs to. A record comes in two parts, each
marked by an event of its own: the host waits for the first, and looks at the rest when that has come.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from offload_engine.experts.storage.layout import SLOT_ALIGNMENT
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.pinned import HostSlab, PinnedSlabs, pinned_buffers

FIRST_ROOM: Final = 4 * SLOT_ALIGNMENT
"""Bytes of a record that there is room for to begin with: LLaDA2's, of a forward over four blocks."""


class Exchange:
    """One exchange at a time, in memory of its own: `begin`, then `send` if need be, `bring`, `front` if it brings one,
    and `rest`. The last two wait for their part.

    Whoever has waited for the rest knows that everything before it on the compute stream has run; so the next exchange
    may write the host's memory again. One of which nobody has taken the rest is waited for by the next. To be closed
    once everything enqueued has run. Raises `MemoryBudgetError` when there is no memory.
    """

    def __init__(self, driver: StreamDriver) -> None:
        self._driver = driver
        self._front_here = driver.event()
        self._here = driver.event()
        self._under_way = False
        self._slabs: PinnedSlabs | None = None
        self._sizes = 0, 0
        self._make_room(FIRST_ROOM)

    def begin(self) -> None:
        """The memory is free then."""
        if self._under_way:
            self._drain()
        self._under_way = True

    def send(self, row: bytes, target: Tensor) -> None:
        """Enqueue the copy of `row` to the device memory `target`, of the same size."""
        self._have(len(row))
        self._write(self._row, row)
        self._driver.copy(Stream.COMPUTE, self._row.tensor[: len(row)], target)

    def bring(
        self, front: int, rest: int, pieces: Callable[[], Sequence[Tensor]], reads: Sequence[Tensor] = ()
    ) -> None:
        """Enqueue the making of a record with a first part of `front` bytes, 0 for none, and a second of `rest`:
        contiguous tensors one behind the other; and its way to the host. `pieces` is called on the device's time, and
        reads of the slot table's memory `reads`.
        """
        self._have(front + rest)
        self._sizes = front, rest
        record = self._record[: front + rest]

        def pack() -> None:
            torch.cat([piece.flatten().view(torch.uint8) for piece in pieces()], out=record)

        parts = [part for part in record.split([front, rest]) if part.numel()]
        self._driver.launch(Stream.COMPUTE, pack, reads, parts)
        if front:
            self._driver.fetch(Stream.COMPUTE, record[:front], self._first.tensor[:front])
            self._front_here.record(Stream.COMPUTE)
        self._driver.fetch(Stream.COMPUTE, record[front:], self._second.tensor[:rest])
        self._here.record(Stream.COMPUTE)

    def front(self) -> Tensor:
        """Wait for the first part and return it, uint8, the caller's own."""
        self._front_here.wait()
        return self._read(self._first, self._sizes[0])

    def landed(self) -> bool:
        """Whether `rest` would return at once."""
        return self._here.done()

    def idle(self) -> bool:
        """Whether `begin` would return at once."""
        if self._under_way and self._here.done():
            self._under_way = False
        return not self._under_way

    def rest(self) -> Tensor:
        """Wait for the second part and return it, uint8, the caller's own."""
        self._here.wait()
        found = self._read(self._second, self._sizes[1])
        self._under_way = False
        return found

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if self._slabs is not None:
            self._slabs.close()
            self._slabs = None
            self._front_here.close()
            self._here.close()

    def _drain(self) -> None:
        self._here.record(Stream.COMPUTE)
        self._here.wait()
        self._under_way = False

    def _have(self, nbytes: int) -> None:
        if nbytes > self._record.numel():
            self._drain()  # a row may be on its way
            self._make_room(nbytes)
            self._under_way = True

    def _make_room(self, nbytes: int) -> None:
        size = -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        slabs = pinned_buffers(self._driver, 3, size)
        if self._slabs is not None:
            self._slabs.close()
        self._slabs = slabs
        self._row, self._first, self._second = slabs.slabs
        self._record = self._driver.allocate(size)

    def _write(self, slab: HostSlab, row: bytes) -> None:
        slab.data[: len(row)] = row

    def _read(self, slab: HostSlab, nbytes: int) -> Tensor:
        return slab.tensor[:nbytes].clone()
