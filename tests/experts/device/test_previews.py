"""Previews on a simulated device: ranked there, told when they have come, waited for by nobody for their own sake."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.device.executor import PREVIEWED, DeviceExperts
from offload_engine.experts.device.previews import Previews
from offload_engine.experts.ranked import ranked_experts
from tests.experts.test_executor import Model
from tests.streams.engines import WatchedExchange, on_device
from tests.streams.simulator import SimulatedDevice

COUNTS = {1: 6, 2: 4}
IDS = torch.arange(12)
ORDERS = [(0,), (1, 0, 2), (7,)]


def decision_of(layer: int, scored: bool = True) -> RoutingDecision:
    chosen = torch.tensor([[3, 0, -1], [2, 3, 1]])
    scores = torch.rand(2, COUNTS[layer], generator=torch.Generator().manual_seed(layer)) if scored else None
    return RoutingDecision(chosen, torch.ones(2, 3), None, scores)


def made(device: SimulatedDevice) -> Previews:
    return Previews([WatchedExchange(device) for _ in range(PREVIEWED)], COUNTS, device.device)


def closed(previews: Previews, device: SimulatedDevice) -> None:
    device.finish()
    previews.close()
    previews.close()
    device.check()


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_what_coming_layers_would_choose_is_told_once_it_has_come(order: tuple[int, ...], scored: bool) -> None:
    device = SimulatedDevice(order)
    previews = made(device)
    assert previews.heard() is None, "nothing was asked"
    for layers in ([1, 2], [2]):
        assert previews.ask(layers[0], layers, lambda layer: decision_of(layer, scored))
        if order == (0,):
            assert previews.heard() is None
        device.finish()
        heard = previews.heard()
        assert heard is not None
        assert heard == (layers[0], [(layer, ranked_experts(decision_of(layer, scored))) for layer in layers])
        assert previews.heard() is None, "it was told"
    closed(previews, device)


def test_what_comes_too_late_is_forgotten_and_nobody_waits_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    previews = made(device)
    waits = [0]
    host_waits = device.host_waits

    def counted(operation: object) -> None:
        waits[0] += not operation.done  # type: ignore[attr-defined]
        host_waits(operation)  # type: ignore[arg-type]

    monkeypatch.setattr(device, "host_waits", counted)
    assert [previews.ask(1, [1], decision_of) for _ in range(PREVIEWED + 1)] == [True] * PREVIEWED + [False]
    assert previews.heard() is None
    assert waits == [0]
    device.finish()
    assert previews.heard() is None, "what could not be asked has taken the place of what was"
    assert previews.ask(2, [2], decision_of), "there is room again"
    previews.drop()
    device.finish()
    assert previews.heard() is None
    closed(previews, device)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), torch.float32)


def waits_behind_what_is_enqueued(experts: DeviceExperts, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers at which previews are waited for from now on. Each must be enqueued, and be waited for itself."""
    layers: list[int] = []
    for exchange in experts.previews.exchanges:
        assert isinstance(exchange, WatchedExchange)

        def wait(event=exchange._here) -> None:  # type: ignore[no-untyped-def]
            if event.marked is not None and not event.marked.done:
                account = experts.accounts.open[-1]
                layers.append(account.layer)
                assert account.record.front > 0 or not len(account.row), "a guess alone was waited for"
            type(event).wait(event)

        monkeypatch.setattr(exchange._here, "wait", wait)
    return layers


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_layers_are_predicted_by_previews_that_are_not_waited_for_alone(
    model: Model, order: tuple[int, ...], emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is guessed is what would be guessed by a host that waits."""
    device = SimulatedDevice(order)
    experts = on_device(device, model.store, 40, predictor="cross-layer-gate", emulated=emulated)
    waiting = model.offloaded(40, predictor="cross-layer-gate")
    layers = waits_behind_what_is_enqueued(experts, monkeypatch)
    for step in range(3):
        ids = torch.arange(12) + step
        expected = model.hidden(waiting, "dmoe", ids, step)
        assert torch.equal(model.hidden(experts, "dmoe", ids, step), expected)
    assert experts.predictor.counts == waiting.predictor.counts
    assert experts.predictor.counts.predicted > 0
    assert experts.stats.prefetches_issued > 0
    assert order != (0,) or layers
    for one in (experts, waiting):
        one.idle()
        one.close()
    device.check()


def test_where_no_layer_is_waited_for_no_preview_is(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 96, predictor="cross-layer-gate", emulated=True)
    for key in model.store.keys():  # noqa: SIM118 (no mapping)
        with experts._changed:
            experts._carry_out(experts.scheduler.predict([key]))
        experts.idle()
    device.finish()
    layers = waits_behind_what_is_enqueued(experts, monkeypatch)
    assert torch.equal(model.hidden(experts, "dmoe", IDS), model.hidden(model.resident, "dmoe", IDS))
    assert not layers
    experts.close()
    device.check()


def test_a_preview_that_is_read_before_its_event_is_caught(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 40, predictor="cross-layer-gate")
    for exchange in experts.previews.exchanges:
        monkeypatch.setattr(exchange, "landed", lambda: True)
        monkeypatch.setattr(exchange._here, "wait", lambda: None)
    seen: list[Tensor] = []
    try:
        seen.append(model.hidden(experts, "dmoe", torch.arange(12)))
    except Exception:  # what is read so may name experts that there are none of
        seen.clear()
    experts.close()
    with pytest.raises(AssertionError, match="the host reads what the device writes, but not after its event"):
        device.check()
