"""What it costs in rounding that some experts of a layer are computed by another processor than the others."""

from __future__ import annotations

import pytest
import torch

from offload_engine import kernels
from offload_engine.kernels import library
from offload_engine.model.moe import ExpertOutputs, ExpertWork, tokens_by_expert
from tests.grouped_layers import EPSILON, FORMS, Layer, by_torch, exact, make_layer, off_by


def mixed(layer: Layer, experts: set[int], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The layer's sum where our CPU kernel has computed `experts`, and torch, in place of a device, the others."""
    used = [group.expert for group in tokens_by_expert(layer.decision.experts)]
    ours = [ExpertWork(expert, layer.weights[expert]) for expert in used if expert in experts]
    theirs = [ExpertWork(expert, layer.weights[expert]) for expert in used if expert not in experts]
    places = torch.isin(layer.decision.experts.flatten(), torch.tensor(sorted(experts))).nonzero().flatten()
    with torch.inference_mode():
        monkeypatch.delenv(library.CHOICE, raising=False)
        library.status.cache_clear()
        host = ExpertOutputs(layer.hidden, layer.decision)
        host.compute(ours)
        monkeypatch.setenv(library.CHOICE, "off")
        library.status.cache_clear()
        device = ExpertOutputs(layer.hidden, layer.decision)
        device.compute(theirs)
        device.put(places, host.outputs[places])
        return device.combine()


@pytest.mark.parametrize("experts", [{0, 2, 4}, {0, 1, 2, 3, 4, 5}, {5}])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_layer_is_as_exact_whoever_computes_which_of_its_experts(
    torch_computes: None, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: str, experts: set[int]
) -> None:
    layer = make_layer("cpu", form=form, dtype=dtype, tokens=20)
    found = mixed(layer, experts, monkeypatch)
    assert off_by(found, exact(layer)) < 3 * EPSILON[dtype]
    assert off_by(found, by_torch(layer)) < 6 * EPSILON[dtype]


def test_the_two_do_differ(torch_computes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tolerance would be tested against nothing."""
    monkeypatch.delenv(library.CHOICE)
    library.status.cache_clear()
    if kernels.status().variant is None:
        pytest.skip(f"no kernel: {kernels.status().reason}")
    layer = make_layer("cpu", tokens=20, hidden=64, width=96)
    assert not torch.equal(mixed(layer, {0, 1, 2, 3, 4, 5}, monkeypatch), by_torch(layer))
