"""Copies asked for and the threads that carry them out, one after the other each: what every backend begins with."""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Collection

from offload_engine.core import ExpertKey
from offload_engine.errors import EngineClosedError, MemoryBudgetError, OffloadError, TransferError
from offload_engine.experts.transfer.base import OnComplete, Stream, TransferTicket
from offload_engine.experts.transfer.stalls import HostStalls


class ReaderThreads(HostStalls):
    """Half of a `TransferBackend`: takes copies, has `_bring` carry them out on threads, reports what became of them.

    Derive from it and define `_bring`.
    """

    def __init__(self, threads: int) -> None:
        super().__init__()
        self._jobs: queue.SimpleQueue[TransferTicket | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._read_forever, name=f"expert-reader-{i}", daemon=True) for i in range(threads)
        ]
        self._on_complete: OnComplete | None = None
        self._waiting: dict[TransferTicket, None] = {}
        """Copies that no reader has begun. What is queued and not in here was withdrawn."""
        self._begun: dict[TransferTicket, None] = {}
        self._closing = threading.Lock()
        """No job may be queued behind the marks that end the readers."""
        self._closed = False

    @property
    def notices(self) -> tuple[str, ...]:
        """See `TransferBackend`."""
        return ()

    def _bring(self, ticket: TransferTicket) -> None:
        """Carry out a copy, on a reader's thread; whatever it raises is put into the ticket."""
        raise NotImplementedError

    def start(self, on_complete: OnComplete) -> None:
        """See `TransferBackend`."""
        self._on_complete = on_complete
        for thread in self._threads:
            thread.start()

    def copy(self, stream: Stream, source: ExpertKey, slot: int) -> TransferTicket:  # noqa: ARG002
        """See `TransferBackend`."""
        ticket = TransferTicket(source, slot)
        with self._closing:
            if self._closed:
                raise EngineClosedError(f"{source} was to be read after the transfers were closed")
            self._waiting[ticket] = None  # before it is queued: an interrupt in between must leave no ghost
            self._jobs.put(ticket)
        return ticket

    def withdraw(self) -> Collection[TransferTicket]:
        """See `TransferBackend`."""
        with self._closing:
            self._waiting.clear()
            return list(self._begun)

    def close(self) -> None:
        """See `TransferBackend`."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
            for _ in self._threads:
                self._jobs.put(None)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()

    def _read_forever(self) -> None:
        while (ticket := self._jobs.get()) is not None:
            with self._closing:
                if ticket not in self._waiting:
                    continue
                self._begun[ticket] = self._waiting.pop(ticket)
            try:
                self._bring(ticket)
            except OffloadError as error:
                ticket.error = error
            except MemoryError as error:
                ticket.error = MemoryBudgetError(
                    f"expert {ticket.key.expert} of layer {ticket.key.layer}: the system refused memory to read it "
                    f"({error or 'no reason given'}); free memory, or ask for a smaller --gpu-mem"
                )
            except Exception as error:  # whatever it is, the engine must hear of it rather than wait for ever
                ticket.error = TransferError(
                    f"expert {ticket.key.expert} of layer {ticket.key.layer} could not be read: "
                    f"{type(error).__name__}: {error}"
                )
            if ticket.error is not None:
                _forget_locals(ticket.error)
            if self._on_complete is not None:
                self._on_complete(ticket)
            del self._begun[ticket]


def _forget_locals(error: BaseException | None) -> None:
    """Whoever keeps an error keeps its frames, and with them the slots they wrote to; from now on the lines alone."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
