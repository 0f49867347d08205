"""What copies and reads take while a run is under way: copies by the device's clock, reads by the host's."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import Event, StreamDriver
from offload_engine.experts.transfer.spans import Spans

PENDING = 8
"""Copies that are timed at once, at most; others go by untimed."""
KEPT = 64
"""Times that are kept for who asks seldom, the last ones."""


class Times(NamedTuple):
    """Seconds, oldest first."""

    copies: list[float]
    """Of one expert's copy to the device each, from when the link was free for it."""
    reads: list[float]
    """Of one expert's read from disk each, divided by the reads that were under way: a disk's time, not a reader's."""


class CopyTimes:
    """Times copies and reads once somebody `wanted` it. Calls of `begin` and `end` must be serialised."""

    def __init__(self, driver: StreamDriver, clock: Callable[[], float] = time.perf_counter) -> None:
        self.wanted = False
        self.clock = clock
        self._lock = threading.Lock()
        self._spans = Spans(driver, Stream.COPY)
        self._copies: deque[float] = deque(maxlen=KEPT)
        self._reads: deque[float] = deque(maxlen=KEPT)
        self._reading = 0

    def begin(self) -> Event | None:
        """A copy is enqueued next, and waits for nothing any more but the link."""
        if not self.wanted:
            return None
        self._collect()
        return None if len(self._spans) >= PENDING else self._spans.mark()

    def end(self, began: Event | None) -> None:
        """It is enqueued."""
        if began is not None:
            self._spans.end(began)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """To be entered while an expert is read. One that fails is not counted."""
        with self._lock:
            self._reading += 1
            together = self._reading
        began = self.clock()
        try:
            yield
            with self._lock:
                self._reads.append((self.clock() - began) / together)
        finally:
            with self._lock:
                self._reading -= 1

    def take(self) -> Times:
        """What was timed since the last call, and is over. Serialised with `begin` and `end`."""
        self._collect()
        with self._lock:
            found = Times(list(self._copies), list(self._reads))
            self._copies.clear()
            self._reads.clear()
        return found

    def close(self) -> None:
        """Give all events back, once the device is idle. Idempotent."""
        self._spans.close()

    def _collect(self) -> None:
        self._copies += self._spans.over()
