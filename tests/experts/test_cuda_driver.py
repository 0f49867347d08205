"""What our side of torch.cuda asks for, without a GPU to ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offload_engine.errors import MemoryBudgetError
from offload_engine.experts.transfer import pinned
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.cuda_driver import CudaDriver
from offload_engine.experts.transfer.pinned import PinnedSlabs

CUDA = torch.device("cuda", 0)


class FakeStream:
    """Notes whom it waits for."""

    def __init__(self, _device: Any = None) -> None:
        self.waited: list[Any] = []
        self.finished = False

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def synchronize(self) -> None:
        self.finished = True


class FakeEvent:
    def __init__(self, *, blocking: bool, enable_timing: bool) -> None:
        assert blocking, "a host that waits must not spin"
        self.timed = enable_timing
        self.recorded: list[Any] = []
        self.synchronized = 0

    def record(self, stream: Any) -> None:
        self.recorded.append(stream)

    def synchronize(self) -> None:
        self.synchronized += 1

    def query(self) -> bool:
        return self.synchronized > 0

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.timed
        assert later.timed
        return 2500.0


class FakeRuntime:
    """The calls of the CUDA runtime that we use; registrations are refused after some that are granted."""

    def __init__(self, refuses: int = 0, grants: int = 0) -> None:
        self.refuses, self.grants = refuses, grants
        self.held: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 (its name)
        assert flags == 0
        if self.grants:
            self.grants -= 1
        elif self.refuses:
            self.refuses -= 1
            return 2
        self.held[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.held[address]
        return 0

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        return {2: "out of memory"}[error]


class Torch:
    """What of torch.cuda the driver sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: FakeRuntime) -> None:
        self.current = FakeStream()
        self.entered: list[Any] = []
        self.forgotten = 0
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: self.current)
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
        monkeypatch.setattr(torch.cuda, "stream", self.entering)
        monkeypatch.setattr(torch.cuda, "device", self.entering)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
        monkeypatch.setattr(torch, "ones", self.launch)

    @contextmanager
    def entering(self, what: Any) -> Iterator[None]:
        self.entered.append(what)
        yield
        self.entered.append(None)

    def launch(self, *_arguments: Any, **_options: Any) -> None:
        self.forgotten += 1
        raise RuntimeError("CUDA error: out of memory, left behind by an earlier call")


@pytest.mark.parametrize("refuses", [0, 1])
def test_memory_is_registered_as_it_is_and_a_refusal_leaves_no_error_behind(
    monkeypatch: pytest.MonkeyPatch, refuses: int
) -> None:
    runtime = FakeRuntime(refuses)
    seen = Torch(monkeypatch, runtime)
    driver, memory = CudaDriver(CUDA), torch.empty(3 * 4096, dtype=torch.uint8)
    refusal = driver.pin(memory)
    assert seen.forgotten == refuses
    if refuses:
        assert refusal == f"cudaHostRegister of {3 * 4096} bytes: out of memory"
        assert not runtime.held
        return
    assert refusal is None
    assert runtime.held == {memory.data_ptr(): 3 * 4096}
    driver.unpin(memory)
    assert not runtime.held


@pytest.mark.parametrize("grants", [0, 1, 2, 3])
def test_chunks_are_registered_once_filled_and_what_is_refused_stays_pageable(
    monkeypatch: pytest.MonkeyPatch, grants: int
) -> None:
    slab = 2 * 4096
    monkeypatch.setattr(pinned, "CHUNK_BYTES", 2 * slab)
    runtime = FakeRuntime(refuses=9, grants=grants)
    seen = Torch(monkeypatch, runtime)
    slabs, registered = PinnedSlabs(CudaDriver(CUDA), 5, slab), []
    for number in range(5):
        assert slabs.have(number)
        slabs.slabs[number].data[:] = bytes([number]) * slab
        chunk = slabs.filled(number)
        assert (chunk is None) == (number in (0, 2)), "a chunk is pinned with the last of its slabs"
        if chunk is not None:
            slabs.pin(chunk)
        assert slabs.filled(number) is None, "filled again"
        registered.append(sorted(runtime.held.values()))
    whole = [2 * slab, 2 * slab, slab]
    assert registered == [sorted(whole[: min(grants, done)]) for done in (0, 1, 1, 2, 3)]
    assert list(runtime.held) == [slabs.slabs[number].tensor.data_ptr() for number in (0, 2, 4)][:grants]
    assert all(address % 4096 == 0 for address in runtime.held)
    assert [one.pinned for one in slabs.slabs] == [number < 2 * grants for number in range(5)]
    assert slabs.pinned == min(2 * grants, 5)
    assert seen.forgotten == (grants < 3), "one refusal is enough"
    assert slabs.refusal == (None if grants == 3 else f"cudaHostRegister of {whole[grants]} bytes: out of memory")
    slabs.close()
    assert not runtime.held


def test_host_memory_is_copied_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    Torch(monkeypatch, FakeRuntime())
    source, target = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    CudaDriver(CUDA).move(source, target)
    assert torch.equal(source, target)


def test_copies_go_to_their_stream_and_launches_to_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Torch(monkeypatch, FakeRuntime())
    driver = CudaDriver(CUDA)
    copying, computing = driver.stream(Stream.COPY), driver.stream(Stream.COMPUTE)
    assert computing is seen.current
    assert copying is not computing
    source, target = torch.arange(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    driver.copy(Stream.COPY, source, target)
    assert torch.equal(source, target)
    driver.launch(Stream.COMPUTE, lambda: seen.entered.append("work"), [target], [])
    assert seen.entered == [copying, None, computing, "work", None]
    found = torch.zeros(8, dtype=torch.uint8)
    driver.fetch(Stream.COMPUTE, target, found)
    assert torch.equal(found, target)
    assert seen.entered[-2:] == [computing, None]
    driver.join(Stream.COMPUTE)
    assert not copying.waited
    assert not computing.waited
    driver.finish()
    assert copying.finished
    assert computing.finished


def test_whoever_computes_on_another_stream_is_ordered_around_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Torch(monkeypatch, FakeRuntime())
    driver = CudaDriver(CUDA)
    computing, other = driver.stream(Stream.COMPUTE), FakeStream()
    seen.current = other
    driver.launch(Stream.COMPUTE, lambda: None, [], [])
    assert computing.waited == [other]
    driver.join(Stream.COMPUTE)
    assert other.waited == [computing]


def test_an_event_marks_one_stream_and_holds_up_another(monkeypatch: pytest.MonkeyPatch) -> None:
    Torch(monkeypatch, FakeRuntime())
    driver = CudaDriver(CUDA)
    event = driver.event()
    inner = event._event
    assert not inner.timed, "keeping the time costs time"
    event.record(Stream.COPY)
    event.before(Stream.COMPUTE)
    assert not event.done()
    event.wait()
    assert event.done()
    event.close()
    assert inner.recorded == [driver.stream(Stream.COPY)]
    assert driver.stream(Stream.COMPUTE).waited == [inner]
    assert inner.synchronized == 1
    assert event._event is None


def test_the_devices_milliseconds_are_our_thousandths_of_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    Torch(monkeypatch, FakeRuntime())
    driver = CudaDriver(CUDA)
    earlier, later = driver.event(timed=True), driver.event(timed=True)
    assert later.seconds_since(earlier) == 2.5


def test_a_card_without_room_is_a_budget_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Torch(monkeypatch, FakeRuntime())
    driver = CudaDriver(CUDA)

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 8000))
    with pytest.raises(MemoryBudgetError, match=r"cuda:0 refused 4096 bytes for expert slots, 1000 being free"):
        driver.allocate(4096)


def test_memory_goes_back_whoever_holds_a_view_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Torch(monkeypatch, FakeRuntime())
    driver, memory = CudaDriver(CUDA), torch.empty(3 * 4096, dtype=torch.uint8)
    held, emptied = memory[4096:], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held.untyped_storage().nbytes()))
    driver.free(memory)
    assert emptied == [0], "nothing of it is left by then"
    assert seen.entered == [CUDA, None]
