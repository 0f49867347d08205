"""The driver protocol: all use of a slot goes through it, on every device.

The order it promises is CUDA's, the weakest of all: work on one stream runs in order, and work on different streams is
ordered only through slots. A launch runs after every earlier copy into a slot it reads; a copy into a slot runs after
every earlier launch that reads the slot. A driver that computes at once, as the CPU's does, gives a stronger order, on
which nobody may rely.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from typing import Protocol

from offload_engine.core import ExpertKey
from offload_engine.errors import OffloadError


class Stream(StrEnum):
    """The two queues of a driver."""

    COMPUTE = "compute"
    COPY = "copy"


class TransferTicket:
    """One copy under way. Its fields are final once the driver has reported it complete."""

    __slots__ = ("bytes_read", "error", "key", "reported", "slot")

    def __init__(self, key: ExpertKey, slot: int) -> None:
        self.key = key
        self.slot = slot
        self.bytes_read = 0
        """Bytes asked of the disk; 0 where the source was memory."""
        self.error: OffloadError | None = None
        self.reported = False
        """Whether whoever asked for the copy has taken note of its end."""


OnComplete = Callable[[TransferTicket], None]


class TransferBackend(Protocol):
    """Copies experts into slots and launches work on them."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know so far: whatever makes copies slower than they could be."""

    def start(self, on_complete: OnComplete) -> None:
        """Begin to serve. `on_complete` is called once per copy, from any thread, never from within `copy`, once a
        launch may read the slot: on a device that is when the copy is enqueued, for the launch will wait for it there.
        """

    def copy(self, stream: Stream, source: ExpertKey, slot: int) -> TransferTicket:
        """Enqueue the copy of `source` into `slot`; returns at once. Failure is reported in the ticket."""

    def withdraw(self) -> Collection[TransferTicket]:
        """Forget the copies that are not begun yet, which are then never reported; returns those that are begun.

        After an interrupt came out of `copy`, this says whether the copy is to be had.
        """

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[int], writes: Sequence[int] = ()) -> None:
        """Enqueue `fn`, which reads and writes these slots and no others."""

    def waiting(self) -> AbstractContextManager[None]:
        """To be entered while the caller, who has launched all it can, waits for a copy to be reported."""

    def abandon(self) -> None:
        """No copy is waited for any more: what it was for will not be computed. Copies go on."""

    def stalled(self) -> float:
        """Seconds for which compute stood still for want of an expert, those not told of before; on a device those that
        it has got past by now.
        """

    def synchronize(self) -> None:
        """Order what the caller does next after everything launched on the compute stream."""

    def close(self) -> None:
        """Finish what is under way, join all threads, free everything. Idempotent."""
