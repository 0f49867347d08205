"""Times of copies by the device's clock, and of reads by the host's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload_engine.core import ExpertKey
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.times import PENDING, CopyTimes
from tests.contracts.transfer_contract import Inbox, TransferContract
from tests.streams.simulator import SimulatedDevice, WatchedStore


class TestOnTheDevice:
    store = TransferContract.store

    def test_copies_are_timed_without_what_they_waited_for(self, store: Any) -> None:
        device = SimulatedDevice()
        arena = DeviceArena(2, store.slab_bytes, device.allocate)
        backend, inbox = CudaTransfers(WatchedStore(store, device), arena, device, threads=1), Inbox()  # type: ignore[arg-type]
        backend.start(inbox)
        backend.times.wanted = True
        for number, seconds in enumerate((3.0, 5.0, 2.0, 2.0)):
            device.takes = seconds, 7.0
            backend.copy(Stream.COPY, ExpertKey(1, number), number % 2)
            inbox.wait_for(number + 1)
            backend.launch(Stream.COMPUTE, lambda: None, reads=(number % 2,))  # the copy after next waits for this
        device.finish()
        found = backend.timed()
        assert found.copies == [3.0, 5.0, 2.0, 2.0]
        assert len(found.reads) == 4
        assert backend.timed() == ([], [])
        backend.close()
        device.check()


def test_nothing_is_timed_that_nobody_wants_or_beyond_what_may_be_pending() -> None:
    device = SimulatedDevice()
    device.takes = 1.0, 0.0
    times, source, target = CopyTimes(device), torch.zeros(4096, dtype=torch.uint8), device.allocate(4096)

    def copy() -> None:
        began = times.begin()
        device.copy(Stream.COPY, source, target)
        times.end(began)

    copy()
    assert not device.events
    times.wanted = True
    for _ in range(PENDING + 3):
        copy()
    device.finish()
    assert times.take().copies == [1.0] * PENDING
    assert len(device.events) == 2 * PENDING
    copy()
    device.finish()
    assert len(device.events) == 2 * PENDING, "they are used again"
    times.close()
    device.check()


def test_reads_at_once_share_a_disk_and_one_that_fails_does_not_count() -> None:
    now = [0.0]
    times = CopyTimes(SimulatedDevice(), lambda: now[0])
    with times.reading():
        now[0] = 4.0
    with times.reading():
        with times.reading():
            now[0] += 6.0
        now[0] += 2.0
    with pytest.raises(OSError, match="gone"), times.reading():
        raise OSError("gone")
    assert times.take().reads == [4.0, 3.0, 8.0]
