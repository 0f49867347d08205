"""Layers of experts in slots, on any device, and what they should compute."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.grouped import KernelOutputs, LayerSlabs
from offload_engine.experts.storage.layout import SlabLayout, packed_layout
from offload_engine.model.moe import ExpertOutputs, ExpertWeights, ExpertWork
from offload_engine.model.quantized import (
    ExpertFormat,
    Matrix,
    QuantizedMatrix,
    in_dtype,
    quantize_int4,
    quantize_int8,
)

FORMS = ("plain", "int8", "int4")
HALVES = (torch.bfloat16, torch.float16)
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
"""The largest relative error of one rounding; in float32, of a sum of some dozens."""


class Layer(NamedTuple):
    """One layer's experts in slots of a device buffer, those without one left out of it."""

    hidden: Tensor
    decision: RoutingDecision
    slabs: LayerSlabs
    slots: Tensor
    """int32 [E]: every expert has one"""
    weights: list[ExpertWeights]
    """By expert, on the device, outside the buffer."""

    def absent(self, *experts: int) -> Tensor:
        """The slot table without these."""
        slots = self.slots.clone()
        slots[list(experts)] = -1
        return slots


def random_matrix(form: str, rows: int, columns: int, dtype: torch.dtype, group: int, seed: torch.Generator) -> Matrix:
    matrix = torch.randn(rows, columns, generator=seed) * columns**-0.5
    if form == "plain":
        return matrix.to(dtype)
    return quantize_int8(matrix) if form == "int8" else quantize_int4(matrix, group)


def write(layout: SlabLayout, slab: Tensor, expert: ExpertWeights) -> None:
    for target, source in zip(layout.weights(slab), expert, strict=True):
        if isinstance(target, QuantizedMatrix):
            assert isinstance(source, QuantizedMatrix)
            target.values.copy_(source.values)
            target.scales.copy_(source.scales)
        else:
            assert isinstance(source, Tensor)
            target.copy_(source)


def to_device(matrix: Matrix, device: str) -> Matrix:
    if isinstance(matrix, QuantizedMatrix):
        return QuantizedMatrix(matrix.values.to(device), matrix.scales.to(device))
    return matrix.to(device)


def random_decision(tokens: int, choices: int, experts: int, share: float, seed: torch.Generator) -> RoutingDecision:
    """Distinct experts per token, every place after some point -1 where `share` says so; weights as they come."""
    ranked = torch.rand(tokens, experts, generator=seed).argsort(dim=1)[:, :choices]
    kept = torch.randint(0, choices + 1, (tokens, 1), generator=seed)
    cut = torch.rand(tokens, 1, generator=seed) < share
    chosen = ranked.masked_fill(cut & (torch.arange(choices) >= kept), -1)
    weights = torch.rand(tokens, choices, generator=seed).masked_fill(chosen < 0, 0.0)
    return RoutingDecision(chosen, weights)


def make_layer(
    device: str,
    *,
    tokens: int = 5,
    choices: int = 3,
    experts: int = 6,
    hidden: int = 32,
    width: int = 48,
    form: str = "plain",
    dtype: torch.dtype = torch.bfloat16,
    stored: torch.dtype | None = None,
    group: int = 16,
    missing: float = 0.3,
    seed: int = 0,
) -> Layer:
    """`stored`: the dtype of plain weights; None: `dtype`. What lies in unused slots, and in gaps, is NaN."""
    generator = torch.Generator().manual_seed(seed)
    stored = stored or dtype
    kind = {"plain": ExpertFormat(stored), "int8": ExpertFormat(stored, 8), "int4": ExpertFormat(stored, 4, group)}
    layout, _payload = packed_layout(kind[form], hidden, width)
    memory = torch.full(((experts + 2) * layout.nbytes,), 0xFF, dtype=torch.uint8)
    slots = torch.randperm(experts + 2, generator=generator)[:experts]
    weights = []
    for slot in slots.tolist():
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        expert = ExpertWeights(*(random_matrix(form, *shape, stored, group, generator) for shape in shapes))
        write(layout, memory[slot * layout.nbytes : (slot + 1) * layout.nbytes], expert)
        weights.append(ExpertWeights(*(to_device(matrix, device) for matrix in expert)))
    decision = random_decision(tokens, choices, experts, missing, generator)
    return Layer(
        torch.randn(tokens, hidden, generator=generator).to(dtype).to(device),
        RoutingDecision(decision.experts.to(device), decision.weights.to(device)),
        LayerSlabs.of([layout] * experts, memory.to(device), layout.nbytes),
        slots.int().to(device),
        weights,
    )


def by_torch(layer: Layer) -> Tensor:
    """What the rest of the project computes with."""
    outputs = ExpertOutputs(layer.hidden, layer.decision)
    used = [expert for expert in layer.decision.experts.unique().tolist() if expert >= 0]
    outputs.compute([ExpertWork(expert, layer.weights[expert]) for expert in used])
    return outputs.combine()


def exact(layer: Layer) -> Tensor:
    """[T, H] float64, nothing rounded but the weights, which the kernels take in 16 bits; int8 fits there unscaled."""
    total = torch.zeros(layer.hidden.shape, dtype=torch.float64, device=layer.hidden.device)
    kept = torch.float32 if layer.slabs.slabs.group == 1 else layer.hidden.dtype
    for token, choices in enumerate(layer.decision.experts.tolist()):
        x = layer.hidden[token].double()
        for choice, expert in enumerate(choices):
            if expert >= 0:
                gate, up, down = (in_dtype(matrix, kept).double() for matrix in layer.weights[expert])
                out = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
                total[token] += layer.decision.weights[token, choice].double() * out
    return total


def computed(layer: Layer, *tables: Tensor) -> Tensor:
    """By the kernels, one launch per slot table; all slots if none is given."""
    outputs = KernelOutputs(layer.hidden, layer.decision, layer.slabs)
    outputs.outputs.fill_(torch.nan)  # whatever is not written must not be read
    for slots in tables or (layer.slots,):
        outputs.compute(slots)
    assert not bool(outputs.missing().any())
    return outputs.combine()


def off_by(found: Tensor, wanted: Tensor) -> float:
    """The error, relative to the result as a whole."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@st.composite
def layers(draw: st.DrawFn, device: str) -> Layer:
    group = draw(st.sampled_from([2, 8, 32]))
    step = st.integers(1, 4).map(lambda groups: groups * group)
    experts = draw(st.integers(1, 8))
    return make_layer(
        device,
        tokens=draw(st.integers(1, 40)),
        choices=draw(st.integers(1, experts)),
        experts=experts,
        hidden=draw(step),
        width=draw(step),
        form=draw(st.sampled_from(FORMS)),
        dtype=draw(st.sampled_from(HALVES)),
        stored=draw(st.sampled_from(HALVES)),
        group=group,
        missing=draw(st.sampled_from([0.0, 0.3, 1.0])),
        seed=draw(st.integers(0, 10**6)),
    )
