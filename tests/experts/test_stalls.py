"""Stalls by the device's clock, on a device of which every copy and launch takes a given time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.errors import TransferError
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.stalls import DeviceStalls
from tests.contracts.transfer_contract import Inbox, TransferContract
from tests.experts.test_executor import Model
from tests.streams.engines import on_device
from tests.streams.simulator import SimulatedDevice, WatchedStore

COPY, LAUNCH = 3.0, 2.0


class Bench:
    """Two slots, one reader."""

    def __init__(self, store: SafetensorsStore) -> None:
        self.device = SimulatedDevice()
        self.device.takes = COPY, LAUNCH
        arena = DeviceArena(2, store.slab_bytes, self.device.allocate)
        watched = WatchedStore(store, self.device)
        self.backend = CudaTransfers(watched, arena, self.device, threads=1)  # type: ignore[arg-type]
        self.inbox, self.asked = Inbox(), 0
        self.backend.start(self.inbox)

    def bring(self, slot: int) -> None:
        """Enqueue a copy."""
        self.asked += 1
        self.backend.copy(Stream.COPY, ExpertKey(1, self.asked), slot)
        self.inbox.wait_for(self.asked)

    def compute(self, *slots: int) -> None:
        self.backend.launch(Stream.COMPUTE, lambda: None, reads=slots)

    def stalled(self) -> float:
        """Once the device has done everything."""
        self.device.finish()
        return self.backend.stalled()


class TestOnTheDevice:
    store = TransferContract.store

    @pytest.fixture
    def bench(self, store: SafetensorsStore) -> Iterator[Bench]:
        bench = Bench(store)
        yield bench
        bench.backend.close()
        bench.device.check()

    def test_an_idle_device_waits_for_the_whole_copy_and_once(self, bench: Bench) -> None:
        bench.bring(0)
        bench.compute(0)
        bench.compute(0)
        assert bench.stalled() == COPY
        assert bench.stalled() == 0, "a stall is told of once"

    def test_what_is_computed_meanwhile_is_no_stall(self, bench: Bench) -> None:
        bench.compute()
        bench.bring(0)
        bench.compute(0)
        assert bench.stalled() == COPY - LAUNCH

    def test_a_copy_that_is_over_when_its_turn_comes_costs_nothing(self, bench: Bench) -> None:
        bench.bring(0)
        bench.compute()
        bench.compute()
        bench.compute(0)
        assert bench.stalled() == 0

    def test_two_copies_that_one_launch_waits_for_are_one_stall(self, bench: Bench) -> None:
        bench.bring(0)
        bench.bring(1)
        bench.compute(0, 1)
        assert bench.stalled() == 2 * COPY

    def test_while_the_host_waits_for_the_disk_the_device_stalls_once_it_is_idle(self, bench: Bench) -> None:
        bench.compute()
        with bench.backend.waiting():
            bench.device.now += 10.0
            bench.bring(0)
        bench.compute(0)
        assert bench.stalled() == 10.0 + COPY - LAUNCH

    def test_what_the_host_waits_for_while_the_device_is_busy_is_no_stall(self, bench: Bench) -> None:
        for _ in range(4):
            bench.compute()
        with bench.backend.waiting():
            bench.device.now += 1.0
            bench.bring(0)
        bench.compute(0)
        assert bench.stalled() == 0

    def test_a_copy_that_does_not_come_was_no_stall(self, bench: Bench) -> None:
        with bench.backend.waiting():
            pass
        bench.backend.abandon()
        bench.device.now += 100.0
        bench.compute()
        with bench.backend.waiting():
            pass
        bench.backend.withdraw()
        bench.device.now += 100.0
        bench.compute()
        assert bench.stalled() == 0

    def test_what_the_device_has_not_reached_is_told_of_later(self, bench: Bench) -> None:
        bench.bring(0)
        bench.compute(0)
        assert bench.backend.stalled() == 0
        assert bench.stalled() == COPY


@given(stalls=st.lists(st.booleans(), max_size=30))
def test_events_are_used_again(stalls: list[bool]) -> None:
    device = SimulatedDevice([3])
    found = DeviceStalls(device)
    for ends in stalls:
        found.begin()
        found.begin()
        found.end() if ends else found.forget()
        found.end()
        device.finish()
        assert found.seconds() == 0
    found.close()
    found.close()
    assert len(device.events) <= 2
    device.check()


def test_the_engines_stalls_are_the_devices(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six slots and nothing predicted: layers wait for copies that nothing overlaps with but other experts. Each is
    read only once the host waits for it: how far a reader gets ahead of a host that is slow depends on the machine.
    """
    model = Model(tmp_path_factory.mktemp("stalls"), torch.float32)
    read, waited_for = type(model.store).read, threading.Semaphore(0)

    def read_what_is_waited_for(store: SafetensorsStore, key: ExpertKey, slab: memoryview) -> int:
        waited_for.acquire()
        return read(store, key, slab)

    monkeypatch.setattr(type(model.store), "read", read_what_is_waited_for)
    found = []
    for takes in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        device = SimulatedDevice()
        device.takes = takes
        experts = on_device(device, model.store, 6, predictor="none", threads=1)
        waiting = experts.transfers.waiting

        @contextmanager
        def telling(waiting: Callable[[], AbstractContextManager[None]] = waiting) -> Iterator[None]:
            with waiting():
                waited_for.release()
                yield

        monkeypatch.setattr(experts.transfers, "waiting", telling)
        for step in range(2):
            model.hidden(experts, "original", torch.arange(12) + 7 * step, step)
        experts.idle()
        found.append(experts.stats.stall_seconds)
        loads = experts.stats.loads
        experts.close()
        device.check()
    assert found == [0, loads, 0], "copies are waited for, one after the other, and nothing else"


def test_after_an_expert_that_could_not_be_read_nothing_is_waited_for(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, device = Model(tmp_path_factory.mktemp("failing"), torch.float32), SimulatedDevice()
    device.takes = 1.0, 0.0
    experts = on_device(device, model.store, 6, predictor="none", threads=1)
    read, calls = type(model.store).read, iter(range(10**6))

    def failing(store: SafetensorsStore, key: ExpertKey, slab: memoryview) -> int:
        if next(calls) == 5:
            raise TransferError("the disk has gone")
        return read(store, key, slab)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.store), "read", failing)
        with pytest.raises(TransferError, match="the disk has gone"):
            model.hidden(experts, "original", torch.arange(12), 0)
    experts.idle()
    device.finish()
    before = experts.stats.stall_seconds + experts.transfers.stalled()
    device.now += 1000.0
    model.hidden(experts, "original", torch.arange(12), 0)
    experts.idle()
    assert experts.stats.stall_seconds < before + 500
    experts.close()
    device.check()
