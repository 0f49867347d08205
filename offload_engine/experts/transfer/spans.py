"""Spans of time on a device's stream, each between two timed events, which are used again."""

from __future__ import annotations

from collections import deque

from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import Event, StreamDriver


class Spans:
    """What lies between two marks on one stream, by the device's clock. Events are made as they are needed at once, and
    free again once their span is over. Calls must be serialised, and their cost is that of enqueuing.
    """

    def __init__(self, driver: StreamDriver, stream: Stream) -> None:
        self._driver = driver
        self._stream = stream
        self._under_way: deque[tuple[Event, Event]] = deque()
        """Spans whose length is not known yet, oldest first."""
        self._free: list[Event] = []
        self._all: list[Event] = []

    def __len__(self) -> int:
        """Spans that have an end and have not been told of."""
        return len(self._under_way)

    def mark(self) -> Event:
        """Mark everything enqueued so far. To be handed to `end` or to `drop`, once."""
        if not self._free:
            event = self._driver.event(timed=True)
            self._all.append(event)
            self._free.append(event)
        event = self._free.pop()
        event.record(self._stream)
        return event

    def end(self, began: Event) -> None:
        """A span reaches from there to what is enqueued just now."""
        self._under_way.append((began, self.mark()))

    def drop(self, began: Event) -> None:
        """No span begins there."""
        self._free.append(began)

    def over(self) -> list[float]:
        """Seconds of the spans that the device has got past since the last call, in the order in which they ended."""
        seconds = []
        while self._under_way and self._under_way[0][1].done():
            began, ended = self._under_way.popleft()
            seconds.append(ended.seconds_since(began))
            self._free += (began, ended)
        return seconds

    def close(self) -> None:
        """Give all events back, those of spans under way too, once the device is idle. Idempotent."""
        self._under_way.clear()
        self._free.clear()
        while self._all:
            self._all.pop().close()
