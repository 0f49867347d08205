"""Another number of slots on a simulated device: outputs stay those of the oracle, nothing is given back while it is
read, and no more memory is taken than there is room for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.errors import EngineClosedError, InternalError, MemoryBudgetError
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.transfer.cuda import CudaTransfers
from tests.experts.test_executor import KINDS, Model
from tests.interrupts import Interrupt
from tests.streams.engines import on_device
from tests.streams.order import Fault
from tests.streams.planted import RESIZING
from tests.streams.simulator import SimulatedDevice, StreamError

ORDERS = st.lists(st.integers(0, 7), min_size=1, max_size=24)
IDS = torch.arange(12)


@pytest.fixture(scope="module", params=["fp32", "bf16-int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), *KINDS[request.param])


def exact(model: Model, experts: DeviceExperts, ids: torch.Tensor = IDS, step: int = 0) -> bool:
    """Whether a forward is that of the oracle."""
    expected = model.hidden(model.resident, "original", ids, step)
    return torch.equal(model.hidden(experts, "original", ids, step), expected)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 96), min_size=2, max_size=5),
    tight=st.booleans(),
    order=ORDERS,
    in_flight=st.integers(1, 3),
    host_slots=st.none() | st.integers(2, 100),
    emulated=st.booleans(),
    share=st.sampled_from(["off", 0.5]),
    idle=st.booleans(),
    seed=st.integers(0, 100),
)
def test_outputs_are_those_of_the_oracle_at_every_size_in_every_order(
    model: Model,
    sizes: list[int],
    tight: bool,
    order: list[int],
    in_flight: int,
    host_slots: int | None,
    emulated: bool,
    share: Any,
    idle: bool,
    seed: int,
) -> None:
    device = SimulatedDevice(order)
    slab = model.store.slab_bytes
    named: dict[str, Any] = {"share": share, "in_flight": in_flight, "emulated": emulated, "dtype": model.dtype}
    experts = on_device(device, model.store, sizes[0], host_slots=host_slots, predictor="combined", **named)
    beside = device.allocated - experts.arena.nbytes
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 94, (64,), generator=generator)
    cached = model.prefilled(model.resident, "original", prompt, 2)
    try:
        before = sizes[0]
        for step, slots in enumerate(sizes):
            assert exact(model, experts, torch.randint(0, 94, (12,), generator=generator), step)
            if idle:
                experts.idle()
            device.most_allocated = device.allocated
            experts.resize(slots, max(slots, before) * slab if tight else None)
            assert sum(experts.occupancy()[:3]) == slots == experts.arena.slots == experts.scheduler.cache.slots
            assert device.allocated == beside + slots * slab, "nothing else is kept"
            together = max(slots, before) if tight else slots + before
            assert device.most_allocated == beside + together * slab
            assert exact(model, experts, torch.randint(0, 94, (12,), generator=generator), step)
            before = slots
        assert torch.equal(model.prefilled(experts, "original", prompt, 2), cached)
        experts.idle()
    finally:
        experts.close()
    device.check()


@pytest.mark.parametrize("emulated", [False, True])
def test_experts_that_fit_are_copied_on_the_device(model: Model, emulated: bool) -> None:
    device = SimulatedDevice([1, 0, 2])
    experts = on_device(device, model.store, 96, emulated=emulated, predictor="none")
    assert exact(model, experts)
    wanted = experts.scheduler.cache.resident_keys()
    for slots in (len(wanted) + 3, len(wanted), 90):
        experts.resize(slots)
        assert sorted(experts.scheduler.cache.resident_keys()) == sorted(wanted)
        loads = experts.stats.loads
        assert exact(model, experts)
        assert experts.stats.loads == loads, "nothing is read again"
    experts.resize(5)
    kept = experts.scheduler.cache.resident_keys()
    assert len(kept) == 5
    assert set(kept) < set(wanted)
    assert exact(model, experts)
    experts.close()
    device.check()


def test_where_there_is_no_room_for_both_experts_come_again_in_the_background(model: Model) -> None:
    device = SimulatedDevice([1, 0, 2])
    experts = on_device(device, model.store, 40, host_slots=96, predictor="none")
    assert exact(model, experts)
    experts.idle()
    for slots in (30, 50):
        wanted, read = set(experts.scheduler.cache.resident_keys()), experts.stats.bytes_read
        experts.resize(slots, 50 * model.store.slab_bytes)
        experts.wait_warm(20)
        assert set(experts.scheduler.cache.resident_keys()) <= wanted
        assert experts.occupancy().resident == min(slots, len(wanted))
        assert experts.stats.bytes_read == read, "they were in host memory"
        assert exact(model, experts)
    experts.close()
    device.check()


def test_memory_that_the_device_refuses_leaves_as_many_slots_as_there_were(model: Model) -> None:
    device = SimulatedDevice([1, 0, 2])
    experts = on_device(device, model.store, 12, emulated=True, predictor="none")
    slab = model.store.slab_bytes
    assert exact(model, experts)
    experts.idle()
    device.size = device.allocated + slab  # not enough for both
    experts.resize(8)
    experts.resize(13)
    assert experts.arena.slots == 13
    assert exact(model, experts)
    experts.idle()
    held = set(experts.scheduler.cache.resident_keys())
    with pytest.raises(MemoryBudgetError, match="refused"):
        experts.resize(14)
    assert experts.arena.slots == experts.scheduler.cache.slots == 13
    experts.wait_warm(20)
    assert set(experts.scheduler.cache.resident_keys()) == held
    assert exact(model, experts)
    experts.close()
    device.check()


def test_without_memory_for_the_slots_that_were_there_either_the_error_says_to_close_the_engine(model: Model) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 12, predictor="none")
    assert exact(model, experts)
    free = device.free

    def another_process_takes_it(memory: torch.Tensor) -> None:
        free(memory)
        device.size = device.allocated

    device.free = another_process_takes_it  # type: ignore[method-assign]
    with pytest.raises(MemoryBudgetError, match=r"its 12 slots were given back .* close this engine and make another"):
        experts.resize(8, 12 * model.store.slab_bytes)
    with pytest.raises(EngineClosedError):
        exact(model, experts)
    experts.close()
    device.check()


def prefetched(model: Model, experts: DeviceExperts) -> None:
    """A forward whose work is still on the device, and experts whose copies nobody waits for."""
    experts.resize(experts.arena.slots + 1)
    assert exact(model, experts)
    scheduler = experts.scheduler
    absent = [ExpertKey(1, expert) for expert in range(32) if not scheduler.cache.held([ExpertKey(1, expert)])]
    with experts._changed:
        experts._carry_out(scheduler.predict(absent[:4]))
    experts.idle()


def run(
    model: Model, device: SimulatedDevice, tight: bool, plant: Callable[[DeviceExperts], None] = lambda _experts: None
) -> bool:
    """Another number of slots, twice, while the device is behind; whether all outputs were those of the oracle."""
    experts = on_device(device, model.store, 40, emulated=True, predictor="none")
    slab = model.store.slab_bytes
    try:
        prefetched(model, experts)
        plant(experts)
        equal = True
        for slots in (60, 20):
            experts.resize(slots, max(slots, experts.arena.slots) * slab if tight else None)
            for step in range(4):
                equal = exact(model, experts, IDS + 9 * step, step) and equal
        return equal
    finally:
        experts.close()


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("order", [[0], [1, 0, 2], [7]])
def test_without_a_planted_defect_nothing_is_reported_of_resizing(model: Model, order: list[int], tight: bool) -> None:
    device = SimulatedDevice(order)
    assert run(model, device, tight)
    device.check()


@pytest.mark.parametrize("name", RESIZING)
def test_a_planted_defect_of_resizing_is_caught(model: Model, name: str) -> None:
    misdeed, device = RESIZING[name], SimulatedDevice([0])
    if misdeed.error:
        with pytest.raises(InternalError, match=r"was computed from slot|slot table on the device said"):
            run(model, device, False, misdeed.plant)
        return
    equal = False
    with contextlib.suppress(StreamError):
        equal = run(model, device, False, misdeed.plant)
    if misdeed.fault is None:
        assert not equal
        return
    with pytest.raises(StreamError):
        device.check()
    assert misdeed.fault in device.faults


def test_memory_that_is_given_up_first_is_waited_for_as_well(model: Model) -> None:
    device = SimulatedDevice([0])
    with contextlib.suppress(StreamError):
        run(model, device, True, RESIZING["slots are given back before their last reader"].plant)
    assert Fault.GIVEN_BACK in device.faults


@pytest.mark.parametrize("tight", [False, True])
def test_an_interrupt_anywhere_leaves_slots_and_books_in_agreement(model: Model, tight: bool) -> None:
    device = SimulatedDevice([1, 0, 2])
    experts = on_device(device, model.store, 12, emulated=True, predictor="none")
    room = 20 * model.store.slab_bytes if tight else None
    places, at = set(), 0
    try:
        while True:
            assert exact(model, experts)
            interrupt = Interrupt(lambda path: "offload_engine/experts/" in path, at)
            slots = 20 if experts.arena.slots == 12 else 12
            try:
                with interrupt.armed():
                    experts.resize(slots, room)
            except KeyboardInterrupt:
                places.add(interrupt.place)
            else:
                break
            assert exact(model, experts)
            assert experts.arena.slots == experts.scheduler.cache.slots
            experts.idle()
            at += 7
        assert len(places) > 5
    finally:
        experts.close()
    assert set(device.faults) <= {Fault.LEAK}


def test_nothing_is_marked_once_everything_has_run(model: Model) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 12)
    assert exact(model, experts)
    experts.idle()
    transfers = experts.transfers
    assert isinstance(transfers, CudaTransfers)
    assert transfers._used
    transfers.settle()
    assert not transfers._used
    assert not transfers._copied
    experts.close()
    device.check()
