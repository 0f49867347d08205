"""Experts that the CPU computes beside a simulated device: equal bit for bit in every order, and nothing unordered.

The device computes with the CPU's own kernels here, so that where an expert was computed can't show at all; what a real
device rounds differently is for `tests/gpu`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.errors import EngineClosedError, InternalError, MemoryBudgetError, TransferError
from offload_engine.experts.cpu_experts import ForwardShape, HostExperts
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.scheduling.cpu_rates import LearnedRates
from offload_engine.experts.scheduling.sharing import Rates, ShareMode
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.host_tier import HostTier
from tests.experts.test_executor import KINDS, Faulty, Model
from tests.experts.test_interrupted_executor import interrupted_everywhere
from tests.streams.engines import on_device
from tests.streams.order import Fault
from tests.streams.planted import SHARING
from tests.streams.simulator import SimulatedDevice, StreamError

ORDERS = st.lists(st.integers(0, 7), min_size=1, max_size=24)
BALANCED = Rates(copy=1.0, expert=0.5, token=0.125)
"""Some of a layer's experts go either way."""


@pytest.fixture(scope="module", params=["fp32", "bf16", "bf16-int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), *KINDS[request.param])


def filled(device: SimulatedDevice, model: Model, slots: int, host_slots: int, share: ShareMode, **named: Any) -> Any:
    """An executor whose host tier holds as many experts as it has slots, the last ones."""
    experts = on_device(
        device, model.store, slots, host_slots=host_slots, share=share, rates=BALANCED, dtype=model.dtype, **named
    )
    transfers = experts.transfers
    assert isinstance(transfers, CudaTransfers)
    assert transfers.host is not None
    for key in model.store.keys():  # noqa: SIM118 (a store is no mapping)
        held = transfers.host.hold(key)
        assert held is not None
        transfers.store.read(key, held.slab.data)
        transfers.host.release(key, held, filled=True)
    return experts


@settings(max_examples=40)
@given(
    slots=st.integers(1, 70),
    routing=st.sampled_from(["original", "dmoe"]),
    order=ORDERS,
    in_flight=st.integers(1, 2),
    host_slots=st.integers(2, 100),
    share=st.sampled_from(["auto", 0.3, 1.0]),
    pinned=st.booleans(),
    emulated=st.booleans(),
    seed=st.integers(0, 100),
)
def test_sharing_with_the_cpu_equals_the_resident_engine_in_every_order(
    model: Model,
    slots: int,
    routing: str,
    order: list[int],
    in_flight: int,
    host_slots: int,
    share: ShareMode,
    pinned: bool,
    emulated: bool,
    seed: int,
) -> None:
    device = SimulatedDevice(order, None if pinned else "no pages left to lock")
    experts = filled(device, model, slots, host_slots, share, in_flight=in_flight, emulated=emulated)
    generator = torch.Generator().manual_seed(seed)
    try:
        for step in range(3):
            ids = torch.randint(0, 94, (12,), generator=generator)
            expected = model.hidden(model.resident, routing, ids, step)
            assert torch.equal(model.hidden(experts, routing, ids, step), expected)
        experts.idle()
        stats = experts.stats
        assert stats.hits + stats.late + stats.misses + stats.computed_on_cpu == stats.expert_requests
        held = experts.transfers.host.occupancy()
        assert (held.loading, held.pinned) == (0, 0)
    finally:
        experts.close()
    device.check()


@pytest.mark.parametrize("share", [0.5, 1.0, "auto"])
def test_the_cpu_takes_its_share_of_what_is_in_host_memory(model: Model, share: ShareMode) -> None:
    device = SimulatedDevice()
    experts = filled(device, model, 8, 100, share, predictor="none")
    before = experts.stats.snapshot()
    model.hidden(experts, "original", torch.arange(12))
    experts.idle()
    done = experts.stats.since(before)
    assert done.computed_on_cpu > 0
    absent = done.computed_on_cpu + done.misses
    assert share == "auto" or done.computed_on_cpu == pytest.approx(share * absent, abs=0.5 * 3)
    assert done.loads == done.misses, "what the CPU computes is not copied"
    assert done.bytes_read == 0
    experts.close()
    device.check()


@pytest.mark.parametrize("emulated", [False, True])
def test_the_share_follows_a_link_that_gets_slower_and_faster(model: Model, emulated: bool) -> None:
    device = SimulatedDevice()
    experts = filled(device, model, 8, 100, "auto", predictor="none", emulated=emulated)
    experts.copies.times.wanted = True
    experts.cpu.rates.learn = lambda *_arguments: None  # the CPU stays as it is
    shares, ids = {}, torch.arange(12)
    expected = model.hidden(model.resident, "original", ids)
    for copy in (1.0, 4.0, 0.25):
        device.takes = copy, 0.0
        for _ in range(4):
            assert torch.equal(model.hidden(experts, "original", ids), expected)
        before = experts.stats.snapshot()
        assert torch.equal(model.hidden(experts, "original", ids), expected)
        shares[copy] = experts.stats.since(before).cpu_share
        assert experts.stats.copy_seconds == copy
        assert experts.stats.cpu_expert_seconds == BALANCED.expert
    assert shares[0.25] < shares[1.0] < shares[4.0]
    experts.idle()
    experts.close()
    device.check()


def test_what_is_only_on_disk_is_never_computed_by_the_cpu(model: Model) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 8, host_slots=2, share=1.0, dtype=model.dtype, predictor="none")
    for step in range(3):
        asked: list[bool] = []
        present = experts.cpu.host.present
        experts.cpu.host.present = lambda keys, present=present, asked=asked: _noted(present(keys), asked)
        before = experts.stats.computed_on_cpu
        model.hidden(experts, "original", torch.arange(12), step)
        assert experts.stats.computed_on_cpu - before <= sum(asked)
        assert not all(asked)
        experts.cpu.host.present = present
    experts.idle()
    experts.close()
    device.check()


def _noted(found: list[bool], asked: list[bool]) -> list[bool]:
    asked += found
    return found


def test_forwards_that_score_and_large_ones_are_left_to_the_device(model: Model) -> None:
    device = SimulatedDevice()
    experts = filled(device, model, 8, 100, 1.0)
    decided = model.hidden(experts, "original", torch.arange(12))
    assert experts.stats.computed_on_cpu > 0
    for phase, tokens in ((Phase.SCORE, 12), (Phase.DENOISE, 24)):
        before = experts.stats.computed_on_cpu
        experts.begin(ForwardInfo(phase))
        hidden = decided.new_zeros(tokens, model.config.hidden_size)
        chosen = torch.arange(2 * tokens).view(tokens, 2) % 32
        with torch.inference_mode():
            experts.run(1, hidden, RoutingDecision(chosen, torch.full((tokens, 2), 0.5)))
        assert experts.stats.misses > 0
        assert experts.stats.computed_on_cpu == before
    experts.close()
    device.check()


def test_an_expert_that_leaves_host_memory_at_the_last_moment_is_read_again(model: Model) -> None:
    device = SimulatedDevice()
    experts = filled(device, model, 8, 100, 1.0, predictor="none")
    experts.cpu.host.find = lambda _key: None
    before = experts.stats.snapshot()
    ids = torch.arange(12)
    expected = model.hidden(model.resident, "original", ids)
    assert torch.equal(model.hidden(experts, "original", ids), expected)
    done = experts.stats.since(before)
    some = next(iter(model.store.keys()))
    assert done.bytes_read >= done.computed_on_cpu * model.store.payload_bytes(some) > 0
    assert experts.cpu.rates.pace == 1.0, "the disk says nothing of the CPU"
    experts.close()
    device.check()


def test_what_goes_wrong_on_the_worker_is_raised_and_the_engine_stays_usable(model: Model) -> None:
    device = SimulatedDevice()
    experts = filled(device, model, 8, 100, 1.0, predictor="none")
    find = experts.cpu.host.find
    faulty = Faulty(experts.cpu.store)
    experts.cpu.store, faulty.broken = faulty, True
    ids = torch.arange(12)
    expected = model.hidden(model.resident, "original", ids)
    experts.cpu.host.find = lambda _key: None
    with pytest.raises(TransferError, match="the disk is gone"):
        model.hidden(experts, "original", ids)
    experts.cpu.host.find = lambda _key: 1 // 0
    with pytest.raises(InternalError, match="experts on the CPU: ZeroDivisionError"):
        model.hidden(experts, "original", ids)
    experts.cpu.host.find = find
    assert torch.equal(model.hidden(experts, "original", ids), expected)
    experts.idle()
    experts.close()
    with pytest.raises(EngineClosedError, match="after the engine was closed"):
        experts.cpu.worker.begin(lambda: None)
    device.check()


def run(
    model: Model,
    device: SimulatedDevice,
    emulated: bool,
    plant: Callable[[DeviceExperts], None] = lambda _experts: None,
) -> bool:
    """Some forwards of which the CPU computes half; whether all outputs were those of the oracle."""
    experts = filled(device, model, 6, 100, 0.5, emulated=emulated)
    try:
        plant(experts)
        equal = True
        for step in range(3):
            ids = torch.arange(12) + 7 * step
            expected = model.hidden(model.resident, "original", ids, step)
            equal = torch.equal(model.hidden(experts, "original", ids, step), expected) and equal
        assert experts.stats.computed_on_cpu > 0
        return equal
    finally:
        experts.close()


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("order", [[0], [1, 0, 2], [7]])
def test_without_a_planted_defect_nothing_is_reported_of_sharing(
    model: Model, order: list[int], emulated: bool
) -> None:
    device = SimulatedDevice(order)
    assert run(model, device, emulated)
    device.check()


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_a_planted_defect_of_sharing_is_caught(model: Model, name: str, emulated: bool) -> None:
    misdeed, device = SHARING[name], SimulatedDevice([0])
    try:
        equal = run(model, device, emulated, misdeed.plant)
    except (StreamError, IndexError):  # what is not copied up may name no place at all
        equal = False
    if misdeed.fault is None:
        assert not equal
        return
    with pytest.raises(StreamError):
        device.check()
    assert misdeed.fault in device.faults


def test_activations_leave_ahead_of_what_is_enqueued_before_misses_are_known(model: Model) -> None:
    """From the second forward on, of a layer that had something for the CPU in the first."""
    device = SimulatedDevice()
    experts = filled(device, model, 8, 100, 0.5, emulated=True, predictor="none")
    order: list[str] = []
    copy_down, present = experts.cpu._copy_down, experts._launch_present
    experts.cpu._copy_down = lambda hidden: (order.append("activations"), copy_down(hidden))
    experts._launch_present = lambda *arguments: (order.append("product"), present(*arguments))[1]
    for step in range(2):
        order.clear()
        model.hidden(experts, "original", torch.arange(12), step)
        pairs = ["product", "activations"] if step == 0 else ["activations", "product"]
        assert order == 3 * pairs
    experts.close()
    device.check()


def test_a_device_without_memory_for_it_refuses_and_nothing_is_left_behind(model: Model) -> None:
    device, before = SimulatedDevice(), threading.active_count()
    host = HostTier(device, 4, model.store.slab_bytes)

    def refuse(_nbytes: int) -> torch.Tensor:
        raise MemoryBudgetError("no room for results")

    device.allocate = refuse  # type: ignore[method-assign]
    with pytest.raises(MemoryBudgetError, match="no room for results"):
        HostExperts(device, host, model.store, ForwardShape(16, 8, 64, 4), 0.5, LearnedRates(Rates.unknown()))
    assert threading.active_count() == before
    host.close()
    device.check()


@pytest.mark.parametrize("order", [[0], [2, 0, 1]])
def test_an_interrupt_anywhere_leaves_sharing_in_order(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    model, devices = Model(tmp_path, torch.bfloat16), []

    def offloaded(_model: Model, slots: int, eviction: str, predictor: str) -> OffloadedExperts:
        devices.append(SimulatedDevice(order))
        named = {"eviction": eviction, "predictor": predictor, "host_slots": 100, "share": 0.5}
        return on_device(devices[-1], model.store, slots, dtype=model.dtype, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "offloaded", offloaded)
    times, places = interrupted_everywhere(model, 6, every=997, first=3)
    assert times > 5
    assert len(places) > 3
    (device,) = devices
    assert set(device.faults) <= {Fault.LEAK}, "an event that nobody has taken note of goes with its object"
