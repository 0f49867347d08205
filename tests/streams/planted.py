"""Defects to plant in `CudaTransfers`: each thing that it asks of the device, left out."""

from __future__ import annotations

from dataclasses import dataclass

from offload_engine.experts.transfer.base import Stream
from tests.streams.order import Fault
from tests.streams.simulator import SimulatedDevice, SimulatedEvent


@dataclass(frozen=True)
class Planted:
    """A call to the driver that is left out."""

    call: str
    stream: Stream | None
    """Only on this stream; None: the call has none."""
    faults: tuple[Fault, ...]
    """As what it may show."""


PLANTED = {
    "a launch does not wait for the copy": Planted("before", Stream.COMPUTE, (Fault.READ_UNORDERED,)),
    "a copy does not wait for the last launch": Planted("before", Stream.COPY, (Fault.OVERWRITE,)),
    "a copy is not marked": Planted("record", Stream.COPY, (Fault.READ_UNORDERED, Fault.STAGING)),
    "a launch is not marked": Planted("record", Stream.COMPUTE, (Fault.OVERWRITE,)),
    "the host does not wait before it fills a buffer": Planted("wait", None, (Fault.STAGING,)),
    "what is launched is not joined": Planted("join", Stream.COMPUTE, ()),
    "close does not wait": Planted("finish", None, (Fault.FREED, Fault.CLOSED, Fault.LOST)),
    "events are not closed": Planted("close", None, (Fault.LEAK,)),
}
"""By what is wrong then. What joins nothing shows in the results alone."""


class FaultyEvent(SimulatedEvent):
    """An event of a device on which something is left out."""

    device: FaultyDevice

    def record(self, stream: Stream) -> None:
        if self.timed or not self.device.left_out("record", stream):  # what keeps the time orders nothing
            super().record(stream)

    def before(self, stream: Stream) -> None:
        if not self.device.left_out("before", stream):
            super().before(stream)

    def wait(self) -> None:
        if not self.device.left_out("wait"):
            super().wait()

    def close(self) -> None:
        if not self.device.left_out("close"):
            super().close()


class FaultyDevice(SimulatedDevice):
    """A device that doesn't hear every `every`-th of the calls that are planted."""

    def __init__(self, planted: Planted, order: list[int], every: int = 1) -> None:
        super().__init__(order)
        self.planted, self.every = planted, every
        self.heard = 0

    def left_out(self, call: str, stream: Stream | None = None) -> bool:
        if (call, stream) != (self.planted.call, self.planted.stream):
            return False
        self.heard += 1
        return self.heard % self.every == 0

    def event(self, *, timed: bool = False) -> FaultyEvent:
        event = FaultyEvent(self, timed)
        self.events.append(event)
        return event

    def join(self, stream: Stream) -> None:
        if not self.left_out("join", stream):
            super().join(stream)

    def finish(self) -> None:
        if not self.left_out("finish"):
            super().finish()
