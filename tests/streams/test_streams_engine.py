"""The engine on a simulated device: equal to `ResidentExperts` bit for bit in every order, and nothing unordered."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.errors import InternalError
from offload_engine.experts.device import record
from offload_engine.experts.device.executor import PLACES, PREVIEWED, DeviceExperts
from offload_engine.experts.scheduling.eviction import EVICTION
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.kernels import cuda_selection
from offload_engine.kernels.build import BuildError
from offload_engine.kernels.cuda import CudaLibrary
from tests.experts.test_executor import KINDS, Model
from tests.kernels.cuda_emulation import emulate
from tests.streams.engines import EmulatedOutputs, on_device
from tests.streams.planted import MISDEEDS, PLANTED, RESIZING, SHARING, FaultyDevice
from tests.streams.simulator import SimulatedDevice, StreamError

ORDERS = st.lists(st.integers(0, 7), min_size=1, max_size=24)


@pytest.fixture(scope="module", params=["fp32", "bf16", "bf16-int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), *KINDS[request.param])


@settings(max_examples=40)
@given(
    slots=st.integers(1, 70),
    eviction=st.sampled_from(sorted(EVICTION)),
    predictor=st.sampled_from(["none", "previous-step", "cross-layer-gate"]),
    routing=st.sampled_from(["original", "dmoe"]),
    order=ORDERS,
    in_flight=st.integers(1, 3),
    threads=st.integers(1, 3),
    host_slots=st.none() | st.integers(1, 100),
    pinned=st.booleans(),
    emulated=st.booleans(),
    seed=st.integers(0, 100),
)
def test_the_engine_on_streams_equals_the_resident_one_in_every_order(
    model: Model,
    slots: int,
    eviction: str,
    predictor: str,
    routing: str,
    order: list[int],
    in_flight: int,
    threads: int,
    host_slots: int | None,
    pinned: bool,
    emulated: bool,
    seed: int,
) -> None:
    device = SimulatedDevice(order, None if pinned else "no pages left to lock")
    experts = on_device(
        device,
        model.store,
        slots,
        eviction=eviction,
        predictor=predictor,
        in_flight=in_flight,
        threads=threads,
        host_slots=host_slots,
        emulated=emulated,
    )
    generator = torch.Generator().manual_seed(seed)
    try:
        for step in range(3):
            ids = torch.randint(0, 94, (12,), generator=generator)
            expected = model.hidden(model.resident, routing, ids, step)
            assert torch.equal(model.hidden(experts, routing, ids, step), expected)
        ids = torch.randint(0, 94, (64,), generator=generator)
        expected = model.prefilled(model.resident, routing, ids, 2)
        assert torch.equal(model.prefilled(experts, routing, ids, 2), expected)
        experts.idle()
    finally:
        experts.close()
    device.check()
    assert device.most_copies <= in_flight
    marks = [event for event in device.events if not event.timed]
    assert len(marks) <= 2 * slots + in_flight + (host_slots or 0) + 3 + 4 * (PLACES + PREVIEWED), (
        "events are used again"
    )
    assert isinstance(experts.transfers, CudaTransfers)
    if experts.transfers.host is not None:
        held = experts.transfers.host.occupancy()
        assert (held.loading, held.pinned) == (0, 0)


@pytest.fixture(scope="session")
def emulated_selection(tmp_path_factory: pytest.TempPathFactory) -> CudaLibrary:
    try:
        return emulate(tmp_path_factory.mktemp("cuda") / "libdmoe_cuda_emulated.so")
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("slots", [1, 40, 96])
@pytest.mark.parametrize("order", [[0], [1, 0, 2], [7]])
@pytest.mark.parametrize("routing", ["original", "dmoe"])
def test_the_engine_with_emulated_kernels_equals_the_resident_one(
    model: Model,
    emulated_selection: CudaLibrary,
    monkeypatch: pytest.MonkeyPatch,
    routing: str,
    order: list[int],
    slots: int,
) -> None:
    """The look-up and what is missing come out of the kernel that routes: nothing is looked up by torch."""
    monkeypatch.setattr(cuda_selection, "library_for", lambda _device: emulated_selection)
    monkeypatch.setattr(EmulatedOutputs, "look_up", lambda *_given: pytest.fail("torch has looked up"))
    monkeypatch.setattr(record, "missing_first", lambda *_given: pytest.fail("torch has ranked"))
    device = SimulatedDevice(order)
    experts = on_device(device, model.store, slots, host_slots=60, predictor="combined", emulated=True)
    try:
        for step in range(3):
            ids = torch.arange(12) + 5 * step
            expected = model.hidden(model.resident, routing, ids, step)
            assert torch.equal(model.hidden(experts, routing, ids, step), expected)
        experts.idle()
    finally:
        experts.close()
    device.check()
    stats = experts.stats
    assert stats.hits + stats.late + stats.misses == stats.expert_requests
    assert slots == 1 or stats.hits > 0


Asked = list[tuple[int, list[int], list[float]]]


def what_is_asked_for(
    model: Model, emulated_selection: CudaLibrary, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> Asked:
    """Layer, experts and scores, whenever some are missing; `fused`: by the kernel's look-up."""
    with monkeypatch.context() as patch:
        # The same decisions, which the kernel's sigmoid might differ from in the last bit of a score.
        patch.setattr(cuda_selection, "library_for", lambda _device: emulated_selection)
        if not fused:
            patch.setattr(record.Record, "pieces", without_lookup)
        device = SimulatedDevice()
        # One copy at a time: which of two comes first decides what is evicted.
        experts = on_device(device, model.store, 40, predictor="none", emulated=True, in_flight=1, threads=1)
        told: Asked = []
        ask = experts.scheduler.ask
        patch.setattr(
            experts.scheduler,
            "ask",
            lambda layer, wanted, scores, *rest: (
                told.append((layer, wanted, scores)),
                ask(layer, wanted, scores, *rest),
            )[1],
        )
        for step in range(3):
            device.finish()  # what has landed doesn't depend on threads
            model.hidden(experts, "dmoe", torch.arange(12) + 5 * step, step)
            experts.idle()
        experts.close()
    return told


def test_with_the_kernel_and_without_it_the_same_is_fetched(
    model: Model, emulated_selection: CudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reader that is slow for once, on a busy machine, has another expert evicted: what differs always is a defect.
    for _attempt in range(3):
        without, with_ = (what_is_asked_for(model, emulated_selection, monkeypatch, fused) for fused in (False, True))
        assert len(with_) > 3
        if without == with_:
            return
    assert without == with_


PIECES = record.Record.pieces


def without_lookup(one: record.Record, slots: Tensor | None = None) -> list[Tensor]:
    plain = record.Record(replace(one.decision, lookup=None), 0 if slots is None else len(slots))
    return PIECES(plain, slots)


def test_a_row_that_is_not_there_when_the_kernel_looks_is_caught(
    model: Model, emulated_selection: CudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_selection, "library_for", lambda _device: emulated_selection)
    device = SimulatedDevice()
    experts = on_device(device, model.store, 70, emulated=True)
    synchronize = experts.transfers.synchronize
    monkeypatch.setattr(experts.transfers, "synchronize", lambda: None if experts._offered else synchronize())

    def forwards() -> None:
        for step in range(3):
            fetch_some(experts)
            model.hidden(experts, "original", torch.arange(12) + 7 * step, step)

    with pytest.raises(InternalError, match=DISAGREE):
        forwards()
    experts.close()


def fetch_some(experts: DeviceExperts) -> None:
    """Four of layer 1's that are not here. When the layer runs, the last two copies need not have landed."""
    scheduler = experts.scheduler
    absent = [ExpertKey(1, expert) for expert in range(32) if not scheduler.cache.held([ExpertKey(1, expert)])]
    with experts._changed:
        experts._carry_out(scheduler.predict(absent[:4]))
    experts.idle()


def run(
    model: Model,
    device: SimulatedDevice,
    slots: int,
    host_slots: int | None,
    *,
    emulated: bool = False,
    plant: Callable[[DeviceExperts], None] = lambda _experts: None,
) -> bool:
    """Some forwards, and a prefetch that nobody waits for; whether all outputs were those of the oracle."""
    experts = on_device(device, model.store, slots, host_slots=host_slots, emulated=emulated)
    plant(experts)
    try:
        equal = True
        for step in range(3):
            ids = torch.arange(12) + 7 * step
            if emulated:
                fetch_some(experts)
            out = model.hidden(experts, "original", ids, step)
            equal = equal and torch.equal(out, model.hidden(model.resident, "original", ids, step))
        experts.prepare(1, lambda _layer: pytest.fail("no preview was wanted"))
        return equal
    finally:
        experts.close()


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("order", [[0], [1, 0, 2], [7]])
@pytest.mark.parametrize(("slots", "host_slots"), [(6, None), (6, 10), (40, None), (40, 100)])
def test_without_a_planted_defect_nothing_is_reported(
    model: Model, slots: int, host_slots: int | None, order: list[int], emulated: bool
) -> None:
    device = SimulatedDevice(order)
    assert run(model, device, slots, host_slots, emulated=emulated)
    device.check()
    assert device.executed > 0


CASES = [
    (name, every, host_slots)
    for name, planted in PLANTED.items()
    for every in (1, 3)
    for host_slots in (None, 10)
    if (planted.call, every, host_slots)
    != ("wait", 3, 10)  # with a tier a buffer's wait covers a slab's, and vice versa
]


@pytest.mark.parametrize(("name", "every", "host_slots"), CASES)
def test_a_planted_defect_is_caught_in_the_engine(model: Model, name: str, every: int, host_slots: int | None) -> None:
    planted = PLANTED[name]
    device = FaultyDevice(planted, [0], 1 if planted.call == "finish" else every)
    try:
        equal = run(model, device, 6, host_slots)
    except StreamError:
        equal = False
    if not planted.faults:
        assert not equal
        return
    with pytest.raises(StreamError):
        device.check()
    assert set(device.faults) & set(planted.faults), device.faults


DISAGREE = r"but the slot table on the device said|was computed from slot|but the books had all"


@pytest.mark.parametrize("order", [[0], [1, 0, 2], [7]])
@pytest.mark.parametrize("name", MISDEEDS)
def test_a_misdeed_of_the_slot_table_is_caught(model: Model, name: str, order: list[int]) -> None:
    misdeed = MISDEEDS[name]
    device = SimulatedDevice(order)
    if misdeed.fault is None:
        with pytest.raises(InternalError, match=DISAGREE):
            run(model, device, 70, None, emulated=True, plant=misdeed.plant)
        return
    with contextlib.suppress(InternalError, StreamError, KeyError):  # what is missing may be anything then
        run(model, device, 70, None, emulated=True, plant=misdeed.plant)
    assert misdeed.fault in device.faults


def test_the_documents_table_names_every_planted_defect_and_what_it_shows() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (Path(__file__).parents[2] / "docs" / "streams.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    table = {row[0]: row[-1] for row in rows[2:]}
    assert list(table) == [*PLANTED, *MISDEEDS, *SHARING, *RESIZING]
    for name, misdeed in MISDEEDS.items():
        assert table[name] == (misdeed.fault or "an error: table and books disagree")
    for name, misdeed in (SHARING | RESIZING).items():
        shown = "an error: table and books disagree" if misdeed.error else "the outputs are not those of the oracle"
        assert table[name] == (misdeed.fault or shown)
    for name, planted in PLANTED.items():
        shown = "; ".join(planted.faults) or "the outputs are not those of the oracle"
        assert table[name] == shown
