"""The executor on a simulated device: what it computes ahead, what it tells watchers, and when it refuses to go on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload_engine.core import ExpertKey, ForwardInfo, RoutingDecision
from offload_engine.errors import InternalError, TransferError
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.observe import ObservedExperts
from offload_engine.experts.scheduling.scheduler import Compute
from tests.experts.test_executor import Faulty, Model
from tests.streams.engines import EmulatedOutputs, on_device
from tests.streams.simulator import SimulatedDevice

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


@pytest.mark.parametrize("emulated", [False, True])
def test_watchers_see_decisions_on_the_host_after_the_layer_ran(model: Model, emulated: bool) -> None:
    device = SimulatedDevice()
    experts = on_device(device, model.store, 40, emulated=emulated)
    told: list[tuple[int, RoutingDecision]] = []

    def watch(_info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        told.append((layer, decision))

    ran: list[RoutingDecision] = []
    run = experts.run

    def noting(layer: int, hidden: Tensor, decision: RoutingDecision) -> Tensor:
        ran.append(decision)
        return run(layer, hidden, decision)

    experts.run = noting  # type: ignore[method-assign]
    model.hidden(ObservedExperts(experts, [watch]), "dmoe", IDS)
    assert [layer for layer, _decision in told] == [1, 2, 3]
    for (_layer, seen), decision in zip(told, ran, strict=True):
        assert seen is not decision
        assert torch.equal(seen.experts, decision.experts)
        assert seen.experts.data_ptr() != decision.experts.data_ptr()
    assert experts.read_back(ran[0]) is ran[0], "of an earlier layer nothing is kept"
    experts.idle()
    experts.close()


def test_a_compute_from_another_slot_than_the_tables_is_a_defect(model: Model) -> None:
    experts = on_device(SimulatedDevice(), model.store, 96, emulated=True)
    forwards(model, experts, 2)
    ahead = experts._ahead
    assert ahead is not None
    assert ahead.computed is not None
    expert = int(ahead.computed.argmax())
    with pytest.raises(InternalError, match=rf"was computed from slot {ahead.computed[expert]}, but is in 99"):
        experts._launch([Compute(ExpertKey(ahead.layer, expert), 99)], lambda _work: None)
    experts.close()


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
    assert experts.scheduler.cache._lent is None
    faulty.broken = False
    forwards(model, experts, 2)
    experts.close()
    device.check()
