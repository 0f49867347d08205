"""The driver of machines with a GPU: experts go from the store through pinned memory to slots on the device.

Which work waits for which, and why nothing else has to:

- A launch waits for the copies into the slots that it reads, the first launch after each copy.
- A copy waits for the last launch that used its slot, and no later one: it overlaps with everything computed since.
- The host waits for the copy out of a bounce buffer before it fills the buffer again. As there are as many buffers as
  copies may be under way, this is also what keeps copies from queueing on the device, where no demand could overtake.

A copy is reported as soon as it is enqueued, so that the work on what it brings is enqueued while it still runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

from offload_engine.errors import InternalError
from offload_engine.experts.arena import Slots
from offload_engine.experts.store import ExpertStore
from offload_engine.experts.transfer.base import Stream, TransferTicket
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.marks import Mark, Marks
from offload_engine.experts.transfer.readers import ReaderThreads
from offload_engine.experts.transfer.staging import Bounce, Staging


class CudaTransfers(ReaderThreads):
    """A `TransferBackend` over a device's streams. At most `in_flight` copies are enqueued and not finished.

    Raises `MemoryBudgetError` when the host memory for `in_flight` bounce buffers can't be had. The slots' memory must
    outlive `close`.
    """

    def __init__(
        self, store: ExpertStore, arena: Slots, driver: StreamDriver, *, threads: int = 2, in_flight: int = 2
    ) -> None:
        super().__init__(threads)
        self.store = store
        self.arena = arena
        self.driver = driver
        self._books = threading.Lock()
        """Guards the marks, and that what is enqueued is enqueued together with them."""
        self._marks = Marks(driver)
        self._copied: dict[int, Mark] = {}
        """By slot, the copy into it that the compute stream has not waited for yet."""
        self._used: dict[int, Mark] = {}
        """By slot, the last launch that used it, if no copy has waited for that yet."""
        self._staging = Staging(driver, in_flight, arena.slab_bytes)
        self._finished = False

    @property
    def notice(self) -> str | None:
        """What the user should know about the copies; None where they are as fast as they can be."""
        if self._staging.refusal is None:
            return None
        return (
            f"the system refused to pin host memory ({self._staging.refusal}): experts are copied from pageable "
            "memory, more slowly and without overlap; raise the limit of locked memory (ulimit -l)"
        )

    def withdraw(self) -> Collection[TransferTicket]:
        """See `TransferBackend`. What is copied from now on runs after everything launched so far: an interrupted
        launch may have left no mark.
        """
        begun = super().withdraw()
        with self._books:
            mark = self._marks.record(Stream.COMPUTE, holders=1)
            mark.event.before(Stream.COPY)
            self._marks.drop(mark)
        return begun

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[int], writes: Sequence[int] = ()) -> None:
        """See `TransferBackend`. Copies into these slots may be asked for again once it has returned."""
        if stream is not Stream.COMPUTE:
            raise InternalError(f"work was launched on the {stream} stream; wanted the compute stream")
        with self._books:
            for slot in (*reads, *writes):
                copied = self._copied.get(slot)
                if copied is not None:
                    copied.event.before(Stream.COMPUTE)
                    self._marks.drop(self._copied.pop(slot))
        try:
            self.driver.launch(
                stream, fn, [self.arena.slab(slot) for slot in reads], [self.arena.slab(slot) for slot in writes]
            )
        finally:  # a part of it may be enqueued whatever went wrong
            self._mark_used({*reads, *writes})

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
            self._staging.close()

    def _bring(self, ticket: TransferTicket) -> None:
        bounce = self._staging.take()
        try:
            if bounce.copied is not None:
                bounce.copied.event.wait()
                with self._books:
                    self._marks.drop(bounce.copied)
                bounce.copied = None
            ticket.bytes_read = self.store.read(ticket.key, bounce.data)
            self._enqueue(bounce, ticket.slot)
        finally:
            self._staging.give_back(bounce)

    def _enqueue(self, bounce: Bounce, slot: int) -> None:
        with self._books:
            used = self._used.pop(slot, None)
            if used is not None:
                used.event.before(Stream.COPY)
                self._marks.drop(used)
            self.driver.copy(Stream.COPY, bounce.tensor, self.arena.slab(slot))
            mark = self._marks.record(Stream.COPY, holders=2)
            bounce.copied = mark
            self._marks.drop(self._copied.get(slot))
            self._copied[slot] = mark

    def _mark_used(self, slots: Collection[int]) -> None:
        if not slots:
            return
        with self._books:
            mark = self._marks.record(Stream.COMPUTE, holders=len(slots))
            for slot in slots:  # each dropped last: an interrupt may leave a mark held for ever, never one too few
                before, self._used[slot] = self._used.get(slot), mark
                self._marks.drop(before)
