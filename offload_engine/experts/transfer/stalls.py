"""How long compute stood still because an expert was not there yet.

Where the host computes, that is how long it waited. A device is given its work ahead, and the host may wait for a copy
while the device is busy, or hand it work that then stands still behind one: there the device's own clock tells.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import Event, StreamDriver
from offload_engine.experts.transfer.spans import Spans


class HostStalls:
    """The part of a `TransferBackend` that tells of stalls, where launches run on the calling thread."""

    def __init__(self) -> None:
        self._stalled = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """See `TransferBackend`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._stalled += time.perf_counter() - began

    def abandon(self) -> None:
        """See `TransferBackend`: the time until then was lost all the same."""

    def stalled(self) -> float:
        """See `TransferBackend`."""
        seconds, self._stalled = self._stalled, 0.0
        return seconds


class DeviceStalls:
    """A compute stream's stalls, each between two events: one marks that it has done all that it had, the other that it
    may go on. Calls must be serialised, and their cost is that of enqueuing.
    """

    def __init__(self, driver: StreamDriver) -> None:
        self._spans = Spans(driver, Stream.COMPUTE)
        self._open: Event | None = None
        self._untold = 0.0

    def begin(self) -> None:
        """Nothing more is enqueued until a copy is. Said again before the end, it changes nothing."""
        if self._open is None:
            self._open = self._spans.mark()

    def end(self) -> None:
        """What is enqueued next waits for no copy any more, but for those that are enqueued already."""
        if self._open is not None:
            began, self._open = self._open, None
            self._spans.end(began)
            self._untold += sum(self._spans.over())

    def forget(self) -> None:
        """What was waited for doesn't come: what has begun was no stall."""
        if self._open is not None:
            self._spans.drop(self._open)
            self._open = None

    def seconds(self) -> float:
        """Of the stalls that are over on the device and have not been told of."""
        total, self._untold = self._untold + sum(self._spans.over()), 0.0
        return total

    def close(self) -> None:
        """Give all events back, once the device is idle. Idempotent."""
        self._open = None
        self._spans.close()
