"""What goes between host and device around a layer: a row of the slot table there, a record of the layer's wants back.

Both are small and go by the compute stream, in order with the work they belong to. The host waits for the record alone.
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
    """One exchange at a time: `begin`, then `send` if need be, `bring`, and `take`, which waits.

    The wait of `take` says of everything before it on the compute stream that it has run; so the next exchange may
    write the host's memory again. One that was broken off is waited for by the next. To be closed once everything
    enqueued has run. Raises `MemoryBudgetError` when there is no memory.
    """

    def __init__(self, driver: StreamDriver) -> None:
        self._driver = driver
        self._event = driver.event()
        self._under_way = False
        self._slabs: PinnedSlabs | None = None
        self._make_room(FIRST_ROOM)

    def begin(self, nbytes: int) -> None:
        """The record will have `nbytes`."""
        if self._under_way:
            self._event.record(Stream.COMPUTE)
            self._event.wait()
            self._under_way = False
        if nbytes > self._record.numel():
            self._make_room(nbytes)
        self._under_way = True

    def send(self, row: bytes, target: Tensor) -> None:
        """Enqueue the copy of `row` to the device memory `target`, of the same size."""
        self._write(self._row, row)
        self._driver.copy(Stream.COMPUTE, self._row.tensor[: len(row)], target)

    def bring(self, nbytes: int, pieces: Callable[[], Sequence[Tensor]], reads: Sequence[Tensor]) -> None:
        """Enqueue the making of a record of `nbytes`, contiguous tensors one behind the other, and its way to the host.
        `pieces` is called on the device's time, and reads of the slot table's memory `reads`.
        """
        record = self._record[:nbytes]

        def pack() -> None:
            torch.cat([piece.flatten().view(torch.uint8) for piece in pieces()], out=record)

        self._driver.launch(Stream.COMPUTE, pack, reads, [record])
        self._driver.fetch(Stream.COMPUTE, record, self._found.tensor[:nbytes])
        self._event.record(Stream.COMPUTE)

    def take(self, nbytes: int) -> Tensor:
        """Wait for the record and return it, uint8 [nbytes], the caller's own."""
        self._event.wait()
        found = self._read(self._found, nbytes)
        self._under_way = False
        return found

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if self._slabs is not None:
            self._slabs.close()
            self._slabs = None
            self._event.close()

    def _make_room(self, nbytes: int) -> None:
        size = -(-nbytes // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        slabs = pinned_buffers(self._driver, 2, size)
        if self._slabs is not None:
            self._slabs.close()
        self._slabs = slabs
        self._row, self._found = slabs.slabs
        self._record = self._driver.allocate(size)

    def _write(self, slab: HostSlab, row: bytes) -> None:
        slab.data[: len(row)] = row

    def _read(self, slab: HostSlab, nbytes: int) -> Tensor:
        return slab.tensor[:nbytes].clone()
