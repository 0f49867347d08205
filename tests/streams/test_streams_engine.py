"""The engine on a simulated device: equal to `ResidentExperts` bit for bit in every order, and nothing unordered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine.experts.eviction import EVICTION
from offload_engine.experts.transfer.cuda import CudaTransfers
from tests.experts.test_executor import KINDS, Model
from tests.streams.engines import on_device
from tests.streams.planted import PLANTED, FaultyDevice
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
    assert len(marks) <= 2 * slots + in_flight + (host_slots or 0) + 2, "events are used again"
    assert isinstance(experts.transfers, CudaTransfers)
    if experts.transfers.host is not None:
        held = experts.transfers.host.occupancy()
        assert (held.loading, held.pinned) == (0, 0)


def run(model: Model, device: SimulatedDevice, slots: int, host_slots: int | None) -> bool:
    """Some forwards, and a prefetch that nobody waits for; whether all outputs were those of the oracle."""
    experts = on_device(device, model.store, slots, host_slots=host_slots)
    try:
        equal = True
        for step in range(3):
            ids = torch.arange(12) + 7 * step
            out = model.hidden(experts, "original", ids, step)
            equal = equal and torch.equal(out, model.hidden(model.resident, "original", ids, step))
        experts.prepare(1, lambda _layer: pytest.fail("no preview was wanted"))
        return equal
    finally:
        experts.close()


@pytest.mark.parametrize("order", [[0], [1, 0, 2], [7]])
@pytest.mark.parametrize(("slots", "host_slots"), [(6, None), (6, 10), (40, None), (40, 100)])
def test_without_a_planted_defect_nothing_is_reported(
    model: Model, slots: int, host_slots: int | None, order: list[int]
) -> None:
    device = SimulatedDevice(order)
    assert run(model, device, slots, host_slots)
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


def test_the_documents_table_names_every_planted_defect_and_what_it_shows() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in (Path(__file__).parents[2] / "docs" / "streams.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("|")
    ]
    table = {row[0]: row[-1] for row in rows[2:]}
    assert list(table) == list(PLANTED)
    for name, planted in PLANTED.items():
        shown = "; ".join(planted.faults) or "the outputs are not those of the oracle"
        assert table[name] == shown
