"""The executor by interpreted kernels on a simulated device: few slots give the bits that many do."""

from __future__ import annotations

import pytest
import torch

from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.grouped import SlotExperts, SlotOutputs
from tests.experts.test_executor import KINDS, Model
from tests.streams.engines import on_device
from tests.streams.simulator import SimulatedDevice

ALL = 96


@pytest.fixture(scope="module", params=["fp32", "bf16", "bf16-int4"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), *KINDS[request.param])


def answer(model: Model, experts: OffloadedExperts, routing: str) -> torch.Tensor:
    try:
        return torch.stack([model.hidden(experts, routing, torch.arange(12) + 7 * step, step) for step in range(2)])
    finally:
        experts.idle()
        experts.close()


@pytest.mark.parametrize("routing", ["original", "dmoe"])
def test_what_is_resident_shows_in_no_bit(model: Model, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(slots: SlotExperts, *call: object) -> object:
        made.append(outputs(slots, *call))  # type: ignore[arg-type]
        return made[-1]

    outputs = SlotExperts.outputs
    monkeypatch.setattr(SlotExperts, "outputs", counted)
    wanted = answer(model, on_device(SimulatedDevice([0]), model.store, ALL), routing)
    assert made
    assert all(isinstance(one, SlotOutputs) for one in made), "the kernels compute"
    for slots, order in ((5, [7, 3, 1]), (40, [1, 0, 2])):
        device = SimulatedDevice(order)
        assert torch.equal(answer(model, on_device(device, model.store, slots), routing), wanted)
        device.check()
    resident = torch.stack(
        [model.hidden(model.resident, routing, torch.arange(12) + 7 * step, step) for step in range(2)]
    )
    errors = (wanted.float() - resident.float()).norm(dim=-1) / resident.float().norm(dim=-1)
    rounds = model.dtype == torch.bfloat16
    tied = 3 if rounds else 0  # tokens whose last expert was nearly another: rounding decides, on each CPU its own way
    assert errors.flatten().sort().values[: errors.numel() - tied].max() < (0.03 if rounds else 1e-5)
