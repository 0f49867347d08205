"""The tier between disk and device, on a simulated device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from offload_engine.core import ExpertKey
from offload_engine.errors import TransferError
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.experts.transfer import pinned
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.experts.transfer.pinned import HostSlab
from tests.contracts.transfer_contract import Inbox, TransferContract
from tests.streams.order import Fault
from tests.streams.simulator import SimulatedDevice, WatchedStore

SLAB = 4096


def key(expert: int) -> ExpertKey:
    return ExpertKey(1, expert)


class Limited(SimulatedDevice):
    """A device that pins only so many chunks."""

    def __init__(self, chunks: int) -> None:
        super().__init__()
        self.left = chunks
        self.sources: list[int] = []
        """Of copies, by address."""

    def copy(self, stream, source, target):  # type: ignore[no-untyped-def]
        self.sources.append(source.data_ptr())
        super().copy(stream, source, target)

    def pin(self, memory):  # type: ignore[no-untyped-def]
        if not self.left:
            return "no more pages"
        self.left -= 1
        return super().pin(memory)


@pytest.fixture
def tier() -> Iterator[HostTier]:
    tier = HostTier(SimulatedDevice(), 2, SLAB)
    yield tier
    tier.close()


def filled(tier: HostTier, expert: int) -> None:
    held = tier.hold(key(expert))
    assert held is not None
    tier.release(key(expert), held, filled=True)


def test_what_was_filled_is_found_again(tier: HostTier) -> None:
    first = tier.hold(key(1))
    assert first is not None
    assert not first.filled
    first.slab.data[0] = 7
    tier.release(key(1), first, filled=True)
    again = tier.hold(key(1))
    assert again is not None
    assert again.filled
    assert int(again.slab.tensor[0]) == 7
    tier.release(key(1), again, filled=True)
    assert tier.occupancy().resident == 1


def test_what_could_not_be_filled_leaves_its_slot_free(tier: HostTier) -> None:
    held = tier.hold(key(1))
    assert held is not None
    tier.release(key(1), held, filled=False)
    assert tier.occupancy().free == 2
    again = tier.hold(key(1))
    assert again is not None
    assert not again.filled
    tier.release(key(1), again, filled=True)


def test_nobody_gets_a_slab_that_is_held(tier: HostTier) -> None:
    filled(tier, 1)
    read, written = tier.hold(key(1)), tier.hold(key(2))
    assert read is not None
    assert written is not None
    assert tier.hold(key(3)) is None, "both are in use"
    assert tier.hold(key(2)) is None, "another is filling it"
    tier.release(key(1), read, filled=True)
    third = tier.hold(key(3))
    assert third is not None
    assert third.slab is read.slab
    tier.release(key(3), third, filled=True)
    tier.release(key(2), written, filled=True)
    assert tier.occupancy().resident == 2


def test_what_is_asked_for_most_stays(tier: HostTier) -> None:
    for expert in (1, 1, 1, 2, 3, 4):
        filled(tier, expert)
    held = tier.hold(key(1))
    assert held is not None
    assert held.filled
    tier.release(key(1), held, filled=True)


@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_slabs_that_the_system_does_not_pin_are_pageable_and_a_notice_says_how_many(
    monkeypatch: pytest.MonkeyPatch, chunks: int
) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 2 * SLAB + 100)
    device = Limited(chunks)
    tier = HostTier(device, 5, SLAB)
    assert not tier.notices
    for expert in range(5):
        filled(tier, expert)
    if chunks == 3:
        assert not tier.notices
    else:
        (notice,) = tier.notices
        assert f"pinned {2 * chunks} of 5 host slots, then refused (no more pages)" in notice
    assert len(device._pinned) == chunks
    for expert in range(5):
        held = tier.hold(key(expert))
        assert held is not None
        assert held.filled
        assert held.slab.pinned == (expert < 2 * chunks)
        tier.release(key(expert), held, filled=True)
    tier.close()
    tier.close()
    assert not device._pinned, "what was pinned is unpinned"


def test_where_ram_is_short_the_tier_stays_as_large_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 2 * SLAB)
    left = pinned.LEAST_FREE + 2 * SLAB
    monkeypatch.setattr(pinned, "available_memory", lambda: left)
    tier = HostTier(SimulatedDevice(), 6, SLAB)
    filled(tier, 1)
    filled(tier, 2)
    assert not tier.notices
    left -= 1
    for expert in (3, 4, 5):
        filled(tier, expert)
    (notice,) = tier.notices
    assert "host memory ran short (537 MB of RAM are left, wanted 537 MB): of 6 host slots there are 2" in notice
    assert sum(tier.occupancy()[:3]) == 2
    assert tier.occupancy().resident == 2
    tier.close()


def test_where_no_slab_can_be_had_the_tier_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinned, "touch", lambda _memory: False)
    tier = HostTier(SimulatedDevice(), 6, SLAB)
    assert tier.hold(key(1)) is None
    assert tier.hold(key(1)) is None
    assert "of 6 host slots there are 0, and what they don't hold is read from disk" in tier.notices[0]
    tier.close()


class TestThroughTheTier(TransferContract):
    """The contract of every backend, with fewer host slots than slots of the device."""

    def make(self, store, arena):  # type: ignore[no-untyped-def]
        device = SimulatedDevice([1, 0, 2])
        return CudaTransfers(store, arena, device, threads=1, host=HostTier(device, 3, store.slab_bytes))


class TestReads:
    store = TransferContract.store

    def test_the_disk_is_read_once_for_what_the_tier_holds(self, store: SafetensorsStore) -> None:
        device = SimulatedDevice()
        arena = DeviceArena(1, store.slab_bytes, device.allocate)
        host = HostTier(device, 4, store.slab_bytes)
        backend = CudaTransfers(WatchedStore(store, device), arena, device, host=host)  # type: ignore[arg-type]
        inbox = Inbox()
        backend.start(inbox)
        for count, expert in enumerate((0, 1, 2, 0, 1, 2)):
            ticket = backend.copy(Stream.COPY, key(expert), 0)
            inbox.wait_for(count + 1)
            assert ticket.error is None
            assert ticket.bytes_read == (store.read_bytes(key(expert)) if count < 3 else 0)
        assert host.occupancy().resident == 3
        backend.close()
        device.check()

    @pytest.mark.parametrize("buffers_pinned", [True, False])
    def test_an_expert_in_a_slab_that_is_not_pinned_goes_through_a_bounce_buffer_that_is(
        self, store: SafetensorsStore, buffers_pinned: bool
    ) -> None:
        """The last of a chunk's slabs is filled, and the chunk pinned, between the two rounds."""
        device = Limited(1 if buffers_pinned else 0)
        arena = DeviceArena(1, store.slab_bytes, device.allocate)
        host = HostTier(device, 3, store.slab_bytes)
        backend = CudaTransfers(WatchedStore(store, device), arena, device, host=host)  # type: ignore[arg-type]
        inbox = Inbox()
        backend.start(inbox)
        device.left = 1
        for count, expert in enumerate((0, 1, 2, 0, 1, 2)):
            backend.copy(Stream.COPY, key(expert), 0)
            inbox.wait_for(count + 1)
        buffers = {slab.tensor.data_ptr() for slab in backend._staging.slabs}
        assert [source in buffers for source in device.sources] == [buffers_pinned] * 3 + [False] * 3
        assert bool(backend.notices) == (not buffers_pinned)
        backend.close()
        device.check()

    def test_an_expert_that_cannot_be_read_is_not_kept(self, store: SafetensorsStore) -> None:
        device = SimulatedDevice()
        arena = DeviceArena(1, store.slab_bytes, device.allocate)
        host = HostTier(device, 4, store.slab_bytes)
        backend = CudaTransfers(store, arena, device, host=host)
        inbox = Inbox()
        backend.start(inbox)
        ticket = backend.copy(Stream.COPY, ExpertKey(1, 99), 0)
        inbox.wait_for(1)
        assert isinstance(ticket.error, TransferError)
        assert host.occupancy().free == 4
        backend.close()


class TestDefectsInTheBooks:
    """What no kind of call to the driver shows to be missing: waits for some slabs only."""

    store = TransferContract.store

    def program(self, store: SafetensorsStore, device: SimulatedDevice, host_slots: int) -> None:
        """Sixteen experts, twice, through two slots of the device, each read once."""
        arena = DeviceArena(2, store.slab_bytes, device.allocate)
        host = HostTier(device, host_slots, store.slab_bytes)
        watched = WatchedStore(store, device)
        backend, inbox = CudaTransfers(watched, arena, device, threads=1, host=host), Inbox()  # type: ignore[arg-type]
        backend.start(inbox)
        for number in range(32):
            backend.copy(Stream.COPY, key(number % 16), number % 2)
            inbox.wait_for(number + 1)
            backend.launch(Stream.COMPUTE, lambda: None, reads=(number % 2,))
        backend.synchronize()
        backend.close()

    @pytest.mark.parametrize("host_slots", [1, 3, 16])
    def test_without_a_defect_nothing_is_reported(self, store: SafetensorsStore, host_slots: int) -> None:
        device = SimulatedDevice()
        self.program(store, device, host_slots)
        device.check()
        assert device.most_copies == 2

    def test_slabs_of_the_tier_that_are_filled_without_a_wait_are_reported(
        self, store: SafetensorsStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wait = CudaTransfers._wait_for_copy

        def only_for_passages(backend: CudaTransfers, slab: HostSlab) -> None:
            if slab in backend._staging.slabs:
                wait(backend, slab)

        monkeypatch.setattr(CudaTransfers, "_wait_for_copy", only_for_passages)
        device = SimulatedDevice()
        self.program(store, device, 1)
        assert Fault.STAGING in device.faults

    def test_copies_that_wait_for_no_passage_are_too_many(
        self, store: SafetensorsStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wait = CudaTransfers._wait_for_copy

        def only_for_the_tier(backend: CudaTransfers, slab: HostSlab) -> None:
            if slab not in backend._staging.slabs:
                wait(backend, slab)

        monkeypatch.setattr(CudaTransfers, "_wait_for_copy", only_for_the_tier)
        device = SimulatedDevice()
        self.program(store, device, 16)
        assert device.most_copies > 2
