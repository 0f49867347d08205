"""Where the grouped kernels are told that an expert's matrices lie, and torch where its outputs go."""

from __future__ import annotations

import pytest
import torch

from offload_engine.core import RoutingDecision
from offload_engine.model.moe import ExpertOutputs
from tests.grouped_layers import make_layer


@pytest.mark.parametrize(("form", "group"), [("plain", 0), ("int8", 1), ("int4", 16)])
def test_places_are_those_of_the_layout(form: str, group: int) -> None:
    layer = make_layer("cpu", form=form)
    slabs, layout = layer.slabs.slabs, layer.slabs.layouts[0]
    assert (slabs.group, slabs.width, slabs.aligned) == (group, 48, 16)
    wanted = [where or 0 for one in (layout.gate, layout.up, layout.down) for where in (one.offset, one.scales)]
    assert slabs.places.tolist() == [wanted] * 6


@pytest.mark.parametrize("chosen", [[[3, -1], [0, 3]], [[-1, -1], [-1, -1]]])
def test_places_are_found_by_what_the_host_knows(chosen: list[list[int]]) -> None:
    """The decision itself, which may be on a device, is not looked at."""
    experts = torch.tensor(chosen)
    decision = RoutingDecision(torch.full_like(experts, 7), torch.ones(2, 2))
    outputs = ExpertOutputs(torch.randn(2, 4), decision, experts)
    wanted = ExpertOutputs(torch.randn(2, 4), RoutingDecision(experts, torch.ones(2, 2))).places
    assert list(outputs.places) == list(wanted)
    assert all(torch.equal(outputs.places[expert], wanted[expert]) for expert in wanted)
