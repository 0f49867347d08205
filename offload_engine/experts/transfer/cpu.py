"""The driver of machines without a GPU: reader threads fill slots from the store, compute runs on the caller."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.base import Stream, TransferTicket
from offload_engine.experts.transfer.readers import ReaderThreads


class CpuTransfers(ReaderThreads):
    """Reads experts with `threads` threads; the disk releases the interpreter lock, so compute goes on meanwhile.

    A launch runs at once on the calling thread: the scheduler reports a slot computed only afterwards, and hands it to
    a copy only then, which is the order the protocol asks for.
    """

    def __init__(self, store: ExpertStore, arena: SlotArena, threads: int = 2) -> None:
        super().__init__(threads)
        self.store = store
        self.arena = arena

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[int], writes: Sequence[int] = ()) -> None:  # noqa: ARG002
        """See `TransferBackend`."""
        fn()

    def synchronize(self) -> None:
        """See `TransferBackend`: a launch has run by the time it returns."""

    def _bring(self, ticket: TransferTicket) -> None:
        ticket.bytes_read = self.store.read(ticket.key, self.arena.buffer(ticket.slot))
