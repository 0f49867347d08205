"""What is ordered after what: vector clocks of streams and host, and the accesses that they have to order.

An operation is ordered after another if a chain of stream order, events and host waits leads from one to the other.
Two accesses to the same memory, at least one of which writes, are a race unless they are ordered, however they happened
to be executed. Whatever runs on a stream is checked when it is enqueued, whatever the host does, when it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

HOST = "host"
"""The host as one component beside the streams. Its threads are taken to be ordered as they came."""

Clock = dict[str, int]


class Fault(StrEnum):
    """What may be wrong with a program."""

    READ_UNORDERED = "a slot is read, but not after the copy into it"
    READ_EMPTY = "a slot is read into which nothing was copied"
    OVERWRITE = "a slot is overwritten, but not after its last reader"
    WRITE_TWICE = "a slot is overwritten, but not after the copy into it"
    STAGING = "a staging buffer is filled, but not after the copy out of it"
    SOURCE_UNORDERED = "host memory is copied from, but not after it was filled"
    HOST_READ = "the host reads what the device writes, but not after its event"
    UNDECLARED = "work reads a slot that it did not say it reads"
    LEAK = "an event was not closed"
    CLOSED = "an event was closed while what it marks had not run"
    FREED = "host memory was unpinned while a copy was under way"
    GIVEN_BACK = "slots were given back, but not after their last reader"
    STUCK = "the host waits for what can never run"
    LOST = "work was enqueued and never waited for"


@dataclass(frozen=True)
class Moment:
    """One operation: the `tick`-th of its component, and what it is ordered after."""

    component: str
    tick: int
    clock: Clock

    def after(self, other: Moment) -> bool:
        """Whether it is ordered after `other`, or the same."""
        return self.clock.get(other.component, 0) >= other.tick


def join(clock: Clock, other: Clock) -> None:
    """Order `clock` after `other` too."""
    for component, tick in other.items():
        clock[component] = max(clock.get(component, 0), tick)


@dataclass
class Accesses:
    """Who last wrote a piece of memory, and who has read it since."""

    writer: Moment | None = None
    readers: list[Moment] = field(default_factory=list)

    def read(self, moment: Moment) -> Fault | None:
        """`moment` reads it."""
        self.readers = [one for one in self.readers if not moment.after(one)] + [moment]
        if self.writer is None:
            return None if moment.component == HOST else Fault.READ_EMPTY
        if moment.after(self.writer):
            return None
        if moment.component == HOST:
            return Fault.HOST_READ
        return Fault.SOURCE_UNORDERED if self.writer.component == HOST else Fault.READ_UNORDERED

    def write(self, moment: Moment) -> Fault | None:
        """`moment` writes it."""
        reader = next((one for one in self.readers if not moment.after(one)), None)
        writer, self.writer, self.readers = self.writer, moment, []
        if reader is not None:
            return Fault.STAGING if moment.component == HOST else Fault.OVERWRITE
        if writer is not None and not moment.after(writer):
            return Fault.HOST_READ if moment.component == HOST else Fault.WRITE_TWICE
        return None
