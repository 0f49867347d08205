"""Experts run from their slots, all that are there in one go: by the grouped kernels, or by torch without them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.layout import MatrixPlace, SlabLayout
from offload_engine.kernels import grouped
from offload_engine.model.moe import ExpertOutputs, ExpertWork


@dataclass(frozen=True, slots=True)
class LayerSlabs:
    """The slots of one buffer, and how the experts of one layer lie in one."""

    layouts: tuple[SlabLayout, ...]
    """By expert. All in one format and of one shape."""
    slabs: grouped.Slabs

    @staticmethod
    def of(layouts: Sequence[SlabLayout], memory: Tensor, slab_bytes: int) -> LayerSlabs:
        """`memory`: uint8 [slots * slab_bytes]. Made once per layer: the table goes to `memory`'s device."""
        first = layouts[0]
        rows = [[where for place in (one.gate, one.up, one.down) for where in _starts(place)] for one in layouts]
        aligned = math.gcd(grouped.ALIGNMENT, *(where for row in rows for where in row))
        places = torch.tensor(rows, dtype=torch.int64).to(memory.device)
        slabs = grouped.Slabs(memory, slab_bytes, places, first.gate.rows, first.dtype, _group(first.gate), aligned)
        return LayerSlabs(tuple(layouts), slabs)

    def work(self, expert: int, slot: int) -> ExpertWork:
        """The expert in `slot`, as views of it."""
        size = self.slabs.slab_bytes
        slab = self.slabs.memory[slot * size : (slot + 1) * size]
        return ExpertWork(expert, self.layouts[expert].weights(slab))


def _starts(place: MatrixPlace) -> tuple[int, int]:
    return place.offset, place.scales or 0


def _group(place: MatrixPlace) -> int:
    """As in `grouped.Slabs`."""
    return 0 if place.scales is None else place.group or 1


class GroupedOutputs(Protocol):
    """Outputs of the experts of one layer, computed in as many launches as it takes until all have had a slot."""

    def compute(self, slots: Tensor) -> None:
        """Run the experts wanted that have a slot and have not been run yet. `slots` int32 [E]: below 0 for none."""

    def missing(self) -> Tensor:
        """Which experts are wanted and have not been run: bool [E], on the device; looking at it waits for it."""

    def combine(self) -> Tensor:
        """The weighted sum [T, H], accumulated in float32 over k in the decision's order; once none is missing."""


def grouped_outputs(hidden: Tensor, decision: RoutingDecision, layer: LayerSlabs) -> GroupedOutputs:
    """By the kernels where they run (`grouped.why_not`), else by torch; within rounding the same."""
    served = hidden.dtype in grouped.DTYPES and grouped.why_not(hidden.device) is None
    return (KernelOutputs if served else TorchOutputs)(hidden, decision, layer)


class KernelOutputs:
    """`GroupedOutputs` by the kernels; the device is never waited for."""

    def __init__(self, hidden: Tensor, decision: RoutingDecision, layer: LayerSlabs) -> None:
        self.hidden = hidden.contiguous()
        self.chosen = decision.experts.contiguous()
        self.weights = decision.weights.contiguous()
        self.layer = layer
        self.tiles = grouped.tiles_by_expert(self.chosen, len(layer.layouts))
        self.outputs = hidden.new_empty(self.chosen.numel(), hidden.shape[1])
        self.left = self.tiles.starts.diff() > 0

    def compute(self, slots: Tensor) -> None:
        """See `GroupedOutputs`."""
        now = slots.masked_fill(~self.left, -1)
        grouped.experts_ffn(self.hidden, self.tiles, now, self.layer.slabs, self.outputs)
        self.left = self.left & (now < 0)

    def missing(self) -> Tensor:
        """See `GroupedOutputs`."""
        return self.left

    def combine(self) -> Tensor:
        """See `GroupedOutputs`."""
        return grouped.weighted_sum(self.outputs, self.chosen, self.weights)


class TorchOutputs:
    """`GroupedOutputs` by torch, expert by expert; waits for the device to learn which."""

    def __init__(self, hidden: Tensor, decision: RoutingDecision, layer: LayerSlabs) -> None:
        self.outputs = ExpertOutputs(hidden, decision)
        self.layer = layer
        self.left = set(self.outputs.places)

    def compute(self, slots: Tensor) -> None:
        """See `GroupedOutputs`."""
        slot_of = slots.tolist()
        now = sorted(expert for expert in self.left if slot_of[expert] >= 0)
        self.outputs.compute([self.layer.work(expert, slot_of[expert]) for expert in now])
        self.left.difference_update(now)

    def missing(self) -> Tensor:
        """See `GroupedOutputs`."""
        missing = torch.zeros(len(self.layer.layouts), dtype=torch.bool)
        missing[torch.tensor(sorted(self.left), dtype=torch.int64)] = True
        return missing.to(self.outputs.hidden.device)

    def combine(self) -> Tensor:
        """See `GroupedOutputs`."""
        return self.outputs.combine()
