"""The grouped kernels as compiled for the GPU at hand."""

from __future__ import annotations

import pytest
import torch

from offload_engine.experts.grouped import KernelOutputs
from offload_engine.kernels import grouped
from tests.contracts.grouped_contract import GroupedContract
from tests.gpu.conftest import never_waiting
from tests.grouped_layers import EPSILON, FORMS, by_torch, computed, make_layer, off_by

MINI = {"tokens": 32, "choices": 8, "experts": 64, "hidden": 2048, "width": 512, "group": 128, "missing": 0.0}
"""LLaDA2.0-mini's experts, a quarter of a layer of them."""


@pytest.fixture(autouse=True)
def kernels_run(cuda: torch.device) -> None:
    reason = grouped.why_not(cuda)
    if reason is not None:
        pytest.skip(reason)


class TestGrouped(GroupedContract):
    DEVICE = "cuda"
    EXAMPLES = 8  # every shape is compiled for


@pytest.mark.parametrize("tokens", [1, 32, 512])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_full_size(form: str, tokens: int, torch_computes: None) -> None:
    layer = make_layer("cuda", form=form, **MINI | {"tokens": tokens})
    assert off_by(computed(layer), by_torch(layer)) < 4 * EPSILON[torch.bfloat16]
    assert torch.equal(computed(layer, layer.absent(*range(0, 64, 3)), layer.slots), computed(layer))


def test_the_host_never_waits_for_the_device() -> None:
    layer = make_layer("cuda", **MINI)
    some = layer.absent(1, 2, 3)
    wanted = computed(layer)  # and compiled
    with never_waiting():
        outputs = KernelOutputs(layer.hidden, layer.decision, layer.slabs)
        outputs.compute(some)
        outputs.compute(layer.slots)
        found = outputs.combine()
    assert torch.equal(found, wanted)


def test_a_layer_can_be_captured_in_a_graph() -> None:
    layer, other = make_layer("cuda", seed=0, **MINI), make_layer("cuda", seed=1, **MINI)
    computed(layer)  # compiled
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = KernelOutputs(layer.hidden, layer.decision, layer.slabs)
        outputs.compute(layer.slots)
        found = outputs.combine()
    layer.hidden.copy_(other.hidden)
    layer.decision.experts.copy_(other.decision.experts)
    layer.decision.weights.copy_(other.decision.weights)
    graph.replay()
    assert torch.equal(found, computed(layer))
