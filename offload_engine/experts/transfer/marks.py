"""Events that several hold on to, and that are used again once nobody does."""

from __future__ import annotations

from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import Event, StreamDriver


class Mark:
    """One moment of a stream, and by how many it is still needed."""

    __slots__ = ("event", "holders")

    def __init__(self, event: Event, holders: int) -> None:
        self.event = event
        self.holders = holders


class Marks:
    """Makes marks out of a stock of events that grows to what is needed at once. Calls must be serialised."""

    def __init__(self, driver: StreamDriver) -> None:
        self._driver = driver
        self._all: list[Event] = []
        self._free: list[Event] = []

    def record(self, stream: Stream, holders: int) -> Mark:
        """Mark everything enqueued on `stream` so far; each of the `holders`, at least one, drops the mark once."""
        if not self._free:
            event = self._driver.event()
            self._all.append(event)
            self._free.append(event)
        event = self._free.pop()
        event.record(stream)
        return Mark(event, holders)

    def drop(self, mark: Mark | None) -> None:
        """One holder needs it no more."""
        if mark is None:
            return
        mark.holders -= 1
        if mark.holders == 0:
            self._free.append(mark.event)

    def close(self) -> None:
        """Give all events back, those of marks still held too. Idempotent."""
        self._free.clear()
        while self._all:
            self._all.pop().close()
