"""Experts out of slots where there are no kernels: torch computes them, in as many launches as it takes."""

from __future__ import annotations

import pytest
import torch

from offload_engine.experts.grouped import TorchOutputs, grouped_outputs
from tests.grouped_layers import FORMS, by_torch, make_layer

pytestmark = pytest.mark.usefixtures("torch_computes")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_torch_computes_what_has_a_slot_and_leaves_the_rest_for_later(form: str, dtype: torch.dtype) -> None:
    layer = make_layer("cpu", form=form, dtype=dtype, tokens=20, missing=0.0)
    layer.decision.experts[layer.decision.experts == 5] = -1
    outputs = grouped_outputs(layer.hidden, layer.decision, layer.slabs)
    assert isinstance(outputs, TorchOutputs)
    assert outputs.missing().tolist() == [True] * 5 + [False]
    outputs.compute(layer.absent(0, 3))
    assert outputs.missing().tolist() == [True, False, False, True, False, False]
    outputs.compute(layer.absent(1))
    assert not outputs.missing().any()
    assert torch.equal(outputs.combine(), by_torch(layer))
    layer.slabs.slabs.memory.fill_(0xFF)
    outputs.compute(layer.slots)
    assert torch.equal(outputs.combine(), by_torch(layer)), "nothing is computed twice"


@pytest.mark.parametrize(("form", "group"), [("plain", 0), ("int8", 1), ("int4", 16)])
def test_places_are_those_of_the_layout(form: str, group: int) -> None:
    layer = make_layer("cpu", form=form)
    slabs, layout = layer.slabs.slabs, layer.slabs.layouts[0]
    assert (slabs.group, slabs.width, slabs.aligned) == (group, 48, 16)
    wanted = [where or 0 for one in (layout.gate, layout.up, layout.down) for where in (one.offset, one.scales)]
    assert slabs.places.tolist() == [wanted] * 6
