"""The driver of machines with a GPU: experts go from the store through pinned memory to slots on the device.

Which work waits for which, and why nothing else has to:

- A launch waits for the copies into the slots that it reads, the first launch after each copy.
- A copy waits for the last launch that used its slot, and no later one: it overlaps with everything computed since.
- The host waits for the last copy out of a host slab before it fills the slab again.
- The host waits for the copy before last, or as many back as may be under way, before it enqueues another: copies must
  not queue on the device, where no demand could overtake.

A copy is reported as soon as it is enqueued, so that the work on what it brings is enqueued while it still runs.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from offload_engine.errors import InternalError
from offload_engine.experts.arena import Slots
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.base import Stream, TransferTicket
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.host_tier import Held, HostTier
from offload_engine.experts.transfer.marks import Mark, Marks
from offload_engine.experts.transfer.pinned import HostSlab, pinned_buffers
from offload_engine.experts.transfer.readers import ReaderThreads
from offload_engine.experts.transfer.stalls import DeviceStalls
from offload_engine.experts.transfer.times import CopyTimes, Times


class CudaTransfers(ReaderThreads):
    """A `TransferBackend` over a device's streams. At most `in_flight` copies are enqueued and not finished.

    An expert comes from the host tier, where there is one: what isn't there is read from the store into it first. It
    goes through one of `in_flight` bounce buffers where there is no tier, or its slab isn't pinned. Raises
    `MemoryBudgetError` when the memory for these can't be had. `close` closes the tier as well; the slots' memory must
    outlive it.
    """

    def __init__(
        self,
        store: ExpertStore,
        arena: Slots,
        driver: StreamDriver,
        *,
        threads: int = 2,
        in_flight: int = 2,
        host: HostTier | None = None,
    ) -> None:
        super().__init__(threads)
        self.store = store
        self.arena = arena
        self.driver = driver
        self.host = host
        self._books = threading.Lock()
        """Guards the marks, and that what is enqueued is enqueued together with them."""
        self._marks = Marks(driver)
        self.stalls = DeviceStalls(driver)
        self.times = CopyTimes(driver)
        self._copied: dict[int, Mark] = {}
        """By slot, the copy into it that the compute stream has not waited for yet."""
        self._used: dict[int, Mark] = {}
        """By slot, the last launch that used it, if no copy has waited for that yet."""
        self._staging = pinned_buffers(driver, in_flight, arena.slab_bytes)
        self._passages: queue.SimpleQueue[HostSlab] = queue.SimpleQueue()
        """The bounce buffers: who wants to enqueue a copy holds one, used or not, and their marks are those of the last
        copies. The oldest comes first.
        """
        for slab in self._staging.slabs:
            self._passages.put(slab)
        self._finished = False

    @property
    def notices(self) -> tuple[str, ...]:
        """See `TransferBackend`."""
        told = () if self.host is None else self.host.notices
        if self._staging.refusal is None:
            return told
        return (
            f"the system refused to pin host memory ({self._staging.refusal}): experts are copied from pageable "
            "memory, more slowly and without overlap; raise the limit of locked memory (ulimit -l)",
            *told,
        )

    def withdraw(self) -> Collection[TransferTicket]:
        """See `TransferBackend`. What is copied from now on runs after everything launched so far: an interrupted
        launch may have left no mark.
        """
        begun = super().withdraw()
        with self._books:
            self.stalls.forget()
            mark = self._marks.record(Stream.COMPUTE, holders=1)
            mark.event.before(Stream.COPY)
            self._marks.drop(mark)
        return begun

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """See `TransferBackend`. The device stalls once it has done what was launched before."""
        with self._books:
            self.stalls.begin()
        yield

    def abandon(self) -> None:
        """See `TransferBackend`: a stall that ends with nothing is none."""
        with self._books:
            self.stalls.forget()

    def stalled(self) -> float:
        """See `TransferBackend`."""
        with self._books:
            return self.stalls.seconds()

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[int], writes: Sequence[int] = ()) -> None:
        """See `TransferBackend`. Copies into these slots may be asked for again once it has returned."""
        if stream is not Stream.COMPUTE:
            raise InternalError(f"work was launched on the {stream} stream; wanted the compute stream")
        with self._books:
            self._wait_for_copies((*reads, *writes))
            self.stalls.end()
        try:
            self.driver.launch(
                stream, fn, [self.arena.slab(slot) for slot in reads], [self.arena.slab(slot) for slot in writes]
            )
        finally:  # a part of it may be enqueued whatever went wrong
            self._mark_used({*reads, *writes})

    def carry(self, slots: Sequence[int], targets: Sequence[Tensor]) -> None:
        """Enqueue on the compute stream that what each of `slots` holds is copied to device memory of its size, which
        is no slot. `settle` is called before any of these slots is given to another expert.
        """
        sources = [self.arena.slab(slot) for slot in slots]

        def carry() -> None:
            for source, target in zip(sources, targets, strict=True):
                target.copy_(source)

        with self._books:
            self._wait_for_copies(slots)
            self.stalls.forget()
            self.driver.launch(Stream.COMPUTE, carry, sources, targets)

    def timed(self) -> Times:
        """What copies and reads took since the last call, where `times` are wanted."""
        with self._books:
            return self.times.take()

    def settle(self) -> None:
        """Wait until everything enqueued has run, while nothing more is: no slot is read or written after that."""
        self.driver.finish()
        with self._books:
            for book in (self._copied, self._used):
                while book:
                    self._marks.drop(book.popitem()[1])

    def landed(self, slot: int) -> bool:
        """Whether the last copy into `slot`, once it is enqueued, has run: launches that read it wait for nothing."""
        with self._books:
            copied = self._copied.get(slot)
            if copied is None:
                return True
            if not copied.event.done():
                return False
            self._marks.drop(self._copied.pop(slot))
            return True

    def synchronize(self) -> None:
        """See `TransferBackend`."""
        self.driver.join(Stream.COMPUTE)

    def close(self) -> None:
        """See `TransferBackend`."""
        super().close()
        if self._finished:
            return
        self._finished = True
        try:
            self.driver.finish()
        finally:
            self._marks.close()
            self.stalls.close()
            self.times.close()
            while not self._passages.empty():
                self._passages.get_nowait()
            self._staging.close()
            if self.host is not None:
                self.host.close()

    def _bring(self, ticket: TransferTicket) -> None:
        passage = self._passages.get()
        try:
            self._wait_for_copy(passage)
            held = None if self.host is None else self.host.hold(ticket.key)
            if self.host is None or held is None:
                ticket.bytes_read = self._read(ticket, passage)
                self._enqueue(passage, ticket.slot, passage)
            else:
                self._bring_through(self.host, held, ticket, passage)
        finally:
            self._passages.put(passage)

    def _bring_through(self, host: HostTier, held: Held, ticket: TransferTicket, passage: HostSlab) -> None:
        filled = held.filled
        try:
            if not filled:
                self._wait_for_copy(held.slab)
                ticket.bytes_read = self._read(ticket, held.slab)
                filled = True
            if held.slab.pinned or not passage.pinned:
                self._enqueue(held.slab, ticket.slot, passage, held.slab)
            else:  # the driver would copy it just so, but keep this thread, and who waits for the books, until it can
                self.driver.move(held.slab.tensor, passage.tensor)
                self._enqueue(passage, ticket.slot, passage)
        finally:
            host.release(ticket.key, held, filled=filled)

    def _read(self, ticket: TransferTicket, slab: HostSlab) -> int:
        with self.times.reading():
            return self.store.read(ticket.key, slab.data)

    def _wait_for_copy(self, slab: HostSlab) -> None:
        """Until the copy that `slab` stands for has run."""
        if slab.copied is not None:
            slab.copied.event.wait()
            with self._books:
                self._marks.drop(slab.copied)
            slab.copied = None

    def _enqueue(self, source: HostSlab, slot: int, *marked: HostSlab) -> None:
        """Enqueue the copy, for which `marked` stand from then on."""
        with self._books:
            used = self._used.pop(slot, None)
            if used is not None:
                used.event.before(Stream.COPY)
                self._marks.drop(used)
            began = self.times.begin()
            self.driver.copy(Stream.COPY, source.tensor, self.arena.slab(slot))
            self.times.end(began)
            mark = self._marks.record(Stream.COPY, holders=1 + len(marked))
            for slab in marked:
                self._marks.drop(slab.copied)
                slab.copied = mark
            self._marks.drop(self._copied.get(slot))
            self._copied[slot] = mark

    def _wait_for_copies(self, slots: Sequence[int]) -> None:
        """Have the compute stream wait for the copies into `slots` that it has not waited for."""
        for slot in slots:
            copied = self._copied.get(slot)
            if copied is not None:
                if not copied.event.done():
                    self.stalls.begin()
                copied.event.before(Stream.COMPUTE)
                self._marks.drop(self._copied.pop(slot))

    def _mark_used(self, slots: Collection[int]) -> None:
        if not slots:
            return
        with self._books:
            mark = self._marks.record(Stream.COMPUTE, holders=len(slots))
            for slot in slots:  # each dropped last: an interrupt may leave a mark held for ever, never one too few
                before, self._used[slot] = self._used.get(slot), mark
                self._marks.drop(before)
