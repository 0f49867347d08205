"""The executor on a simulated device: what it computes ahead, what it tells watchers, and when it refuses to go on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import ExpertKey, ForwardInfo, RoutingDecision
from offload_engine.errors import TransferError
from offload_engine.experts.device.accounts import Told
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.device.record import Record
from offload_engine.experts.device.table import ABSENT, UNUSED
from offload_engine.experts.observe import ObservedExperts
from offload_engine.experts.ranked import ranked_experts
from offload_engine.model.moe import Beside, nothing
from tests.experts.test_executor import Faulty, Model
from tests.streams.engines import EmulatedOutputs, WatchedExchange, on_device
from tests.streams.simulator import SimulatedDevice, SimulatedEvent

IDS = torch.arange(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), torch.float32)


def forwards(model: Model, experts: DeviceExperts, count: int) -> None:
    for step in range(count):
        expected = model.hidden(model.resident, "original", IDS, step)
        assert torch.equal(model.hidden(experts, "original", IDS, step), expected)


@pytest.mark.parametrize("emulated", [False, True])
def test_with_the_kernels_what_is_resident_is_computed_before_the_host_knows(
    model: Model, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []
    compute_found = EmulatedOutputs.compute_found

    def counted(outputs: EmulatedOutputs) -> None:
        assert outputs.found is not None
        ahead.append(int((outputs.found >= 0).sum()))
        compute_found(outputs)

    monkeypatch.setattr(EmulatedOutputs, "compute_found", counted)
    device = SimulatedDevice()
    experts = on_device(device, model.store, 96, emulated=emulated)
    forwards(model, experts, 1)
    wanted = experts.stats.expert_requests
    assert not ahead, "there was nothing"
    experts.idle()
    forwards(model, experts, 2)
    experts.close()
    device.check()
    if emulated:
        # Of the copies of the first forward, the last two may not have landed when they are looked up in the second.
        assert sum(ahead) >= 2 * wanted - 2 * 3
    else:
        assert not ahead


@pytest.mark.parametrize("slots", [40, 96])
@pytest.mark.parametrize("emulated", [False, True])
def test_watchers_hear_of_decisions_on_the_host_before_the_forward_is_over(
    model: Model, emulated: bool, slots: int
) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, slots, predictor="none", emulated=emulated)
    if slots == 96:
        fetch_all(model, experts)
    told: list[tuple[int, int, RoutingDecision]] = []
    ran: list[RoutingDecision] = []
    run = experts.run

    def watch(info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        told.append((info.step, layer, decision))

    def noting(
        layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing, told: Told | None = None
    ) -> Tensor:
        ran.append(decision)
        return run(layer, hidden, decision, beside, told)

    experts.run = noting  # type: ignore[method-assign]
    observed = ObservedExperts(experts, [watch])
    for step in range(2):
        model.hidden(observed, "dmoe", IDS, step)
        assert [(step, layer) for step, layer, _decision in told] == [
            (one, layer) for one in range(step + 1) for layer in (1, 2, 3)
        ]
    for (_step, _layer, seen), decision in zip(told, ran, strict=True):
        assert seen is not decision
        assert torch.equal(seen.experts, decision.experts)
        assert seen.experts.data_ptr() != decision.experts.data_ptr()
    experts.idle()
    experts.close()


def waits(experts: DeviceExperts, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host waits for from now on: parts of records that have not come when they are asked for."""
    waited: list[str] = []

    def watch(exchange: WatchedExchange, part: str, event: SimulatedEvent) -> None:
        wait = event.wait

        def waiting() -> None:
            if event.marked is not None and not event.marked.done:
                waited.append(part)
            wait()

        monkeypatch.setattr(event, "wait", waiting)

    for exchange in experts.accounts.exchanges:
        assert isinstance(exchange, WatchedExchange)
        watch(exchange, "front", exchange._front_here)  # type: ignore[arg-type]
        watch(exchange, "rest", exchange._here)  # type: ignore[arg-type]
    return waited


def fetch_all(model: Model, experts: DeviceExperts, but: int | None = None) -> None:
    """Every expert into a slot, of layer 1 all but one; then what runs knows that they have landed."""
    for key in model.store.keys():  # noqa: SIM118 (no mapping)
        if key != ExpertKey(1, -1 if but is None else but):
            with experts._changed:
                experts._carry_out(experts.scheduler.predict([key]))
            experts.idle()
    experts.transfers.driver.finish()  # type: ignore[attr-defined]


def test_layers_of_which_everything_is_here_are_not_waited_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 96, predictor="none", emulated=True)
    fetch_all(model, experts)
    waited = waits(experts, monkeypatch)
    told: list[int] = []
    observed = ObservedExperts(experts, [lambda _info, layer, _decision: told.append(layer)])
    assert torch.equal(model.hidden(observed, "original", IDS), model.hidden(model.resident, "original", IDS))
    assert waited == []
    assert told == [1, 2, 3]
    assert not experts.accounts.open, "the books have heard of all before the answer leaves"
    assert experts.stats.expert_requests == experts.stats.hits > 0
    experts.close()
    device.check()


def test_where_nothing_is_missing_the_front_alone_is_waited_for(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 96, predictor="none", emulated=True)
    unwanted = unwanted_expert(model, experts)
    fetch_all(model, experts, but=unwanted)
    waited = waits(experts, monkeypatch)
    opened: list[int] = []
    combine = EmulatedOutputs.combine

    def combined(outputs: EmulatedOutputs) -> Tensor:
        opened.append(len(experts.accounts.open))
        return combine(outputs)

    monkeypatch.setattr(EmulatedOutputs, "combine", combined)
    forwards(model, experts, 1)
    assert waited[0] == "front"
    assert waited.count("front") == 1, "of layer 1, the others being here as a whole"
    assert opened[0] == 1, "the layer goes on before the books hear of it"
    assert not experts.accounts.open
    assert experts.stats.misses == 0
    experts.close()
    device.check()


def unwanted_expert(model: Model, experts: DeviceExperts) -> int:
    """One of layer 1 that `forwards` has no use for."""
    seen: list[Tensor] = []
    run = model.resident.run

    def noting(layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:
        if layer == 1:
            seen.append(decision.experts.unique())
        return run(layer, hidden, decision, beside)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.resident, "run", noting)
        model.hidden(model.resident, "original", IDS)
    return next(expert for expert in range(32) if expert not in seen[0].tolist())


@pytest.mark.parametrize("order", [(0,), (1, 0, 2), (7,)])
def test_copies_of_what_is_missing_are_asked_for_before_the_books_hear_of_it(
    model: Model, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = on_device(SimulatedDevice(order), model.store, 40, predictor="none", emulated=True)
    events: list[tuple[str, int]] = []
    scheduler = experts.scheduler
    ask, settle = scheduler.ask, scheduler.settle
    monkeypatch.setattr(scheduler, "ask", lambda layer, *rest: (events.append(("ask", layer)), ask(layer, *rest))[1])
    monkeypatch.setattr(
        scheduler, "settle", lambda layer, *rest: (events.append(("settle", layer)), settle(layer, *rest))[1]
    )
    forwards(model, experts, 2)
    assert events == 2 * [(what, layer) for layer in (1, 2, 3) for what in ("ask", "settle")]
    stats = experts.stats
    assert stats.hits + stats.late + stats.misses == stats.expert_requests
    experts.close()


@given(
    slots=st.lists(st.integers(-2, 3), min_size=1, max_size=40),
    levels=st.integers(0, 5),
    blocks=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_what_is_missing_is_in_the_order_in_which_the_books_would_fetch_it(
    slots: list[int], levels: int, blocks: int, seed: int
) -> None:
    count, generator = len(slots), torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels + 1, (blocks, count), generator=generator) / 7 if blocks else None
    look_up = torch.tensor(slots, dtype=torch.int32)
    chosen = (look_up != UNUSED).nonzero().view(1, -1)
    decision = RoutingDecision(chosen, torch.ones(chosen.shape), None, scores)
    record = Record(decision, count)
    raw = torch.cat([piece.flatten().view(torch.uint8) for piece in record.pieces(look_up)])
    assert raw.numel() == record.nbytes
    missing = record.missing(raw[: record.front])
    ranked = ranked_experts(decision)
    wanted = [pair for pair in zip(*ranked, strict=True) if slots[pair[0]] == ABSENT]
    assert list(zip(*missing, strict=True)) == wanted
    assert torch.equal(record.read(raw[record.front :].clone()).slots, look_up)  # type: ignore[arg-type]


@pytest.mark.parametrize("emulated", [False, True])
def test_an_expert_that_cannot_be_read_leaves_the_engine_usable(model: Model, emulated: bool) -> None:
    device = SimulatedDevice((1, 0, 2))
    experts = on_device(device, model.store, 5, emulated=emulated)
    faulty = Faulty(experts.transfers.store)  # type: ignore[attr-defined]
    experts.transfers.store = faulty  # type: ignore[attr-defined]
    forwards(model, experts, 1)
    faulty.broken = True
    with pytest.raises(TransferError, match="the disk is gone"):
        model.hidden(experts, "original", IDS.flip(0))
    experts.idle()
    assert not experts.scheduler.cache._lent
    faulty.broken = False
    forwards(model, experts, 2)
    experts.close()
    device.check()
