"""Defects to plant: each thing that `CudaTransfers` asks of the device, left out; and what `DeviceExperts` does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from offload_engine.experts.cpu_experts import Errand, HostExperts
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.transfer.base import Stream
from offload_engine.model.moe import ExpertOutputs, LayerOutputs
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


def table_names_what_has_not_landed(experts: DeviceExperts) -> None:
    transfers = experts.transfers

    def unasked(slot: int) -> bool:
        with transfers._books:  # type: ignore[attr-defined]
            transfers._marks.drop(transfers._copied.pop(slot, None))  # type: ignore[attr-defined]
        return True

    experts._landed = unasked


def missing_is_not_waited_for(experts: DeviceExperts) -> None:
    for exchange in experts.accounts.exchanges:
        exchange._front_here.wait = lambda: None  # type: ignore[method-assign]


def record_is_not_waited_for(experts: DeviceExperts) -> None:
    for exchange in experts.accounts.exchanges:
        exchange._here.wait = lambda: None  # type: ignore[method-assign]


def nothing_is_taken_to_be_missing(experts: DeviceExperts) -> None:
    experts._may_miss = lambda _row: False  # type: ignore[method-assign]


def layer_is_not_lent(experts: DeviceExperts) -> None:
    experts.scheduler.lend = lambda _layer: None  # type: ignore[method-assign]


def work_does_not_say_what_it_reads(experts: DeviceExperts) -> None:
    launch = experts.transfers.launch

    def silent(stream: Stream, fn: Callable[[], None], reads: Sequence[int], writes: Sequence[int] = ()) -> None:
        launch(stream, fn, [] if getattr(fn, "__name__", "") == "compute_found" else reads, writes)

    experts.transfers.launch = silent  # type: ignore[method-assign]


def entry_is_not_cleared(experts: DeviceExperts) -> None:
    experts.table.clear = lambda _slot: None  # type: ignore[method-assign]


def stale_row_is_not_sent(experts: DeviceExperts) -> None:
    experts.table.is_stale = lambda _layer: False  # type: ignore[method-assign]


class Misdeed(NamedTuple):
    """A defect of the slot table, of the work enqueued by it, of the read-back, or of what is shared with the CPU."""

    plant: Callable[[DeviceExperts], None]
    left_out: str
    fault: Fault | None
    """What it shows; None: see the table that it stands in."""
    error: bool = False
    """Whether it is, in a table of outputs that are not those of the oracle, an error as of `MISDEEDS`."""


MISDEEDS = {
    "the slot table names an expert whose copy has not landed": Misdeed(
        table_names_what_has_not_landed, "`landed(slot)`", Fault.READ_UNORDERED
    ),
    "what is missing is looked at before its event": Misdeed(
        missing_is_not_waited_for, "`front`'s `event.wait()`", Fault.HOST_READ
    ),
    "the books hear of a record before its event": Misdeed(
        record_is_not_waited_for, "`rest`'s `event.wait()`", Fault.HOST_READ
    ),
    "a layer is not waited for that may miss something": Misdeed(
        nothing_is_taken_to_be_missing, "`Exchange.front`", None
    ),
    "an expert is evicted before the books hear that its layer uses it": Misdeed(
        layer_is_not_lent, "`ExpertScheduler.lend`", None
    ),
    "a slot is evicted while enqueued work still reads it": Misdeed(
        work_does_not_say_what_it_reads, "the `reads` of the launch", Fault.UNDECLARED
    ),
    "an entry is not cleared before its slot is overwritten": Misdeed(entry_is_not_cleared, "`SlotTable.clear`", None),
    "a row of the slot table is not sent": Misdeed(stale_row_is_not_sent, "`Exchange.send`", None),
}
"""By what is wrong then. Without a fault the books disagree, and the run ends with an error that says so."""


def activations_are_not_waited_for(experts: DeviceExperts) -> None:
    _cpu(experts)._arrived.wait = lambda: None  # type: ignore[method-assign]


def activations_are_not_marked(experts: DeviceExperts) -> None:
    _cpu(experts)._arrived.record = lambda _stream: None  # type: ignore[method-assign]


def activations_are_not_copied_down(experts: DeviceExperts) -> None:
    cpu = _cpu(experts)
    cpu._copy_down = lambda _hidden: cpu._arrived.record(Stream.COMPUTE)  # type: ignore[method-assign]


def results_go_up_too_early(experts: DeviceExperts) -> None:
    """They are asked for before the worker has begun with them, and it is waited for only then."""
    cpu, asked = _cpu(experts), threading.Event()
    compute = cpu.compute

    def later(layer: int, chosen: Sequence[int], outputs: ExpertOutputs) -> int:
        assert asked.wait(20)
        asked.clear()
        return compute(layer, chosen, outputs)

    def at_once(errand: Errand, outputs: LayerOutputs) -> None:
        errand.deliver(outputs)
        asked.set()
        errand.wait()

    cpu.compute = later  # type: ignore[method-assign]
    experts._fetch_results = at_once  # type: ignore[method-assign]


def results_are_not_copied_up(experts: DeviceExperts) -> None:
    cpu = _cpu(experts)

    class Deaf:
        def copy(self, stream: Stream, source: Tensor, target: Tensor) -> None: ...

        def __getattr__(self, name: str) -> object:
            return getattr(driver, name)

    driver, cpu.driver = cpu.driver, Deaf()  # type: ignore[assignment]


def _cpu(experts: DeviceExperts) -> HostExperts:
    assert experts.cpu is not None
    return experts.cpu


SHARING = {
    "the CPU does not wait for its activations": Misdeed(
        activations_are_not_waited_for, "the worker's `event.wait()`", Fault.HOST_READ
    ),
    "activations are not marked": Misdeed(activations_are_not_marked, "`event.record(compute)`", Fault.HOST_READ),
    "activations are not copied down": Misdeed(activations_are_not_copied_down, "`fetch(compute)`", None),
    "results go up before the CPU is through": Misdeed(
        results_go_up_too_early, "the wait for the worker", Fault.STAGING
    ),
    "results are not copied up": Misdeed(results_are_not_copied_up, "`copy(compute)`", Fault.READ_EMPTY),
}
"""The same of experts that the CPU computes. Without a fault, the outputs are not those of the oracle."""


def resize_does_not_wait(experts: DeviceExperts) -> None:
    experts.copies.settle = lambda: None  # type: ignore[method-assign]


def what_stays_is_not_copied(experts: DeviceExperts) -> None:
    """It is said to have been."""
    experts.copies.carry = lambda slots, targets: experts.copies.driver.launch(  # type: ignore[method-assign]
        Stream.COMPUTE, lambda: None, [experts.memory.slab(slot) for slot in slots], targets
    )


def what_stays_is_copied_too_early(experts: DeviceExperts) -> None:
    transfers = experts.copies
    carry, wait = transfers.carry, transfers._wait_for_copies

    def early(slots: Sequence[int], targets: Sequence[Tensor]) -> None:
        transfers._wait_for_copies = lambda _slots: None  # type: ignore[method-assign]
        carry(slots, targets)
        transfers._wait_for_copies = wait  # type: ignore[method-assign]

    transfers.carry = early  # type: ignore[method-assign]


def table_does_not_follow(experts: DeviceExperts) -> None:
    """It has everything where it was."""
    table, rename = experts.table, experts.table.rename

    def stay(slots: int, _moves: Mapping[int, int]) -> None:
        rename(slots, {slot: slot for slot in range(min(slots, table._slots))})

    table.rename = stay  # type: ignore[method-assign]


RESIZING = {
    "slots are given back before their last reader": Misdeed(
        resize_does_not_wait, "`CudaTransfers.settle`", Fault.GIVEN_BACK
    ),
    "experts that stay are copied before they are there": Misdeed(
        what_stays_is_copied_too_early, "`event.before(compute)`", Fault.READ_UNORDERED
    ),
    "experts that stay are not copied": Misdeed(what_stays_is_not_copied, "`CudaTransfers.carry`", None),
    "the slot table doesn't follow experts that move": Misdeed(
        table_does_not_follow, "`SlotTable.rename`", None, error=True
    ),
}
"""The same of another number of slots. Without a fault, the outputs are not those of the oracle."""


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
