"""The transfers of a GPU, on a simulated one."""

from __future__ import annotations

import pytest

from offload_engine.core import ExpertKey
from offload_engine.errors import EngineClosedError, InternalError
from offload_engine.experts.arena import DeviceArena, Slots
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.experts.transfer.marks import Mark, Marks
from offload_engine.experts.transfer.readers import ReaderThreads
from tests.contracts.transfer_contract import Inbox, TransferContract
from tests.streams.order import Fault
from tests.streams.planted import PLANTED, FaultyDevice
from tests.streams.simulator import SimulatedDevice, StreamError, WatchedStore


class TestOnStreams(TransferContract):
    """The order is drawn; the contract's own arena stands for the device's memory."""

    @pytest.fixture(params=[[0], [3, 1, 2], [7]], autouse=True)
    def device(self, request: pytest.FixtureRequest) -> SimulatedDevice:
        self.simulated = SimulatedDevice(request.param)
        return self.simulated

    def make(self, store: SafetensorsStore, arena: Slots) -> CudaTransfers:
        return CudaTransfers(store, arena, self.simulated, threads=1)


class TestCudaTransfers:
    store = TransferContract.store
    SLOTS = 2

    def make(
        self, store: SafetensorsStore, device: SimulatedDevice, host: HostTier | None = None
    ) -> tuple[CudaTransfers, DeviceArena, Inbox]:
        arena = DeviceArena(self.SLOTS, store.slab_bytes, device.allocate)
        watched = WatchedStore(store, device)
        backend = CudaTransfers(watched, arena, device, threads=1, host=host)  # type: ignore[arg-type]
        inbox = Inbox()
        backend.start(inbox)
        return backend, arena, inbox

    def program(self, store: SafetensorsStore, device: SimulatedDevice, host: HostTier | None = None) -> bool:
        """Experts one after the other through two slots, each read once but for the last; whether what was
        read is what is stored.
        """
        backend, arena, inbox = self.make(store, device, host)
        sums: list[float] = []
        keys = [ExpertKey(1, expert) for expert in range(8)]
        for number, key in enumerate(keys):
            slot = number % self.SLOTS
            backend.copy(Stream.COPY, key, slot)
            assert inbox.wait_for(number + 1)[-1].error is None
            gate = arena.weights(slot, store.layout(key)).gate
            backend.launch(Stream.COMPUTE, lambda gate=gate: sums.append(float(gate.sum())), reads=(slot,))
        backend.synchronize()
        found = list(sums)
        backend.copy(Stream.COPY, ExpertKey(2, 0), 0)  # which nobody reads
        inbox.wait_for(len(keys) + 1)
        backend.close()
        wanted = DeviceArena(1, store.slab_bytes, device.allocate)
        expected: list[float] = []
        for key in keys:
            store.read(key, memoryview(wanted.slab(0).numpy()))
            expected.append(float(wanted.weights(0, store.layout(key)).gate.sum()))
        return found == expected

    @pytest.mark.parametrize("order", [[0], [1, 2], [5, 0, 3], [7]])
    def test_a_copy_is_reported_before_it_has_run_and_read_after(
        self, store: SafetensorsStore, order: list[int]
    ) -> None:
        device = SimulatedDevice(order)
        assert self.program(store, device)
        device.check()
        assert device.most_copies == (2 if order == [0] else device.most_copies)
        assert len([event for event in device.events if not event.timed]) <= 4

    @pytest.mark.parametrize("host_slots", [None, 3])
    @pytest.mark.parametrize("name", PLANTED)
    def test_a_planted_defect_is_caught(self, store: SafetensorsStore, name: str, host_slots: int | None) -> None:
        planted = PLANTED[name]
        device = FaultyDevice(planted, [0])
        host = None if host_slots is None else HostTier(device, host_slots, store.slab_bytes)
        equal = self.program(store, device, host)
        assert device.heard > 0
        if not planted.faults:
            assert not equal
            return
        with pytest.raises(StreamError):
            device.check()
        assert set(device.faults) & set(planted.faults), device.faults

    @pytest.mark.parametrize("early", [False, True])
    def test_an_event_used_again_while_somebody_holds_on_to_it_is_reported(
        self, store: SafetensorsStore, monkeypatch: pytest.MonkeyPatch, early: bool
    ) -> None:
        device = SimulatedDevice()
        backend, _arena, inbox = self.make(store, device)
        record = Marks.record

        def at_once(marks: Marks, stream: Stream, holders: int) -> Mark:
            mark = record(marks, stream, holders)
            marks._free.append(mark.event)
            return mark

        if early:
            monkeypatch.setattr(Marks, "record", at_once)
        for number, slot in enumerate((0, 1, 0)):
            backend.copy(Stream.COPY, ExpertKey(1, number), slot)
            inbox.wait_for(number + 1)
            if number == 0:
                backend.launch(Stream.COMPUTE, lambda: None, reads=(0,))
        backend.synchronize()
        backend.close()
        assert (Fault.OVERWRITE in device.faults) == early

    @pytest.mark.parametrize("fenced", [True, False])
    def test_after_an_interrupt_copies_wait_for_launches_that_left_no_mark(
        self, store: SafetensorsStore, monkeypatch: pytest.MonkeyPatch, fenced: bool
    ) -> None:
        device = SimulatedDevice()
        backend, _arena, inbox = self.make(store, device)
        backend.copy(Stream.COPY, ExpertKey(1, 0), 0)
        inbox.wait_for(1)
        monkeypatch.setattr(backend, "_mark_used", lambda _slots: None)
        backend.launch(Stream.COMPUTE, lambda: None, reads=(0,))
        assert not (backend.withdraw() if fenced else ReaderThreads.withdraw(backend))
        backend.copy(Stream.COPY, ExpertKey(1, 1), 0)
        inbox.wait_for(2)
        backend.close()
        assert device.faults == ([] if fenced else [Fault.OVERWRITE])

    def test_where_pinning_is_refused_copies_are_pageable_and_a_notice_says_so(self, store: SafetensorsStore) -> None:
        device = SimulatedDevice(pinning="code 2, out of memory")
        backend, _arena, _inbox = self.make(store, device)
        (notice,) = backend.notices
        backend.close()
        assert "code 2, out of memory" in notice
        assert "ulimit -l" in notice
        pinned, _arena, _inbox = self.make(store, SimulatedDevice())
        assert not pinned.notices
        pinned.close()

    def test_a_launch_elsewhere_than_on_the_compute_stream_is_refused(self, store: SafetensorsStore) -> None:
        backend, _arena, _inbox = self.make(store, SimulatedDevice())
        with pytest.raises(InternalError, match="copy stream"):
            backend.launch(Stream.COPY, lambda: None, reads=())
        backend.close()

    def test_a_launch_that_fails_leaves_its_mark(self, store: SafetensorsStore) -> None:
        device = SimulatedDevice([7])

        class Refusing(SimulatedDevice):
            def launch(self, *arguments: object) -> None:
                super().launch(*arguments)  # type: ignore[arg-type]
                raise RuntimeError("the second kernel was refused")

        device = Refusing([0])
        backend, _arena, inbox = self.make(store, device)
        backend.copy(Stream.COPY, ExpertKey(1, 0), 0)
        inbox.wait_for(1)
        with pytest.raises(RuntimeError, match="second kernel"):
            backend.launch(Stream.COMPUTE, lambda: None, reads=(0,))
        backend.copy(Stream.COPY, ExpertKey(1, 1), 0)
        inbox.wait_for(2)
        backend.close()
        device.check()

    def test_a_copy_after_close_is_refused(self, store: SafetensorsStore) -> None:
        backend, _arena, _inbox = self.make(store, SimulatedDevice())
        backend.close()
        with pytest.raises(EngineClosedError):
            backend.copy(Stream.COPY, ExpertKey(1, 0), 0)

    def test_slots_lie_on_pages(self) -> None:
        arena = DeviceArena(3, 8192, SimulatedDevice().allocate)
        assert all(arena.slab(slot).data_ptr() % 4096 == 0 for slot in range(3))
        assert arena.nbytes == 3 * 8192
        arena.wait_touched()
        arena.close()
        with pytest.raises(EngineClosedError):
            arena.slab(0)
