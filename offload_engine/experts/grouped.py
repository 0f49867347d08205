"""Experts run from their slots, all that are there in one go, where the grouped kernels run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import ExpertKey, RoutingDecision
from offload_engine.experts.arena import Slots
from offload_engine.experts.device.table import ABSENT, UNUSED
from offload_engine.experts.storage.layout import MatrixPlace, SlabLayout
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.kernels import grouped
from offload_engine.model.moe import ExpertWork


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


def _starts(place: MatrixPlace) -> tuple[int, int]:
    return place.offset, place.scales or 0


def _group(place: MatrixPlace) -> int:
    """As in `grouped.Slabs`."""
    return 0 if place.scales is None else place.group or 1


class KernelOutputs:
    """Outputs of the experts of one layer, computed in as many launches as it takes until all have had a slot.

    The device is never waited for.
    """

    def __init__(self, hidden: Tensor, decision: RoutingDecision, layer: LayerSlabs) -> None:
        self.hidden = hidden.contiguous()
        self.chosen = decision.experts.contiguous()
        self.weights = decision.weights.contiguous()
        self.layer = layer
        self.tiles = grouped.tiles_by_expert(self.chosen, len(layer.layouts))
        self.outputs = hidden.new_empty(self.chosen.numel(), hidden.shape[1])
        self._left: Tensor | None = None

    def compute(self, slots: Tensor) -> None:
        """Run the experts wanted that have a slot and have not been run yet. `slots` int32 [E]: below 0 for none."""
        left = self.missing()
        now = slots.masked_fill(~left, -1)
        self.launch(now)
        self._left = left & (now < 0)

    def launch(self, slots: Tensor) -> None:
        """Run the experts that have a slot, whether that has been done or not; `missing` is not told."""
        grouped.experts_ffn(self.hidden, self.tiles, slots, self.layer.slabs, self.outputs)

    def missing(self) -> Tensor:
        """Which experts are wanted and `compute` has not run: bool [E], on the device; looking at it waits for it."""
        if self._left is None:
            self._left = self.tiles.starts.diff() > 0
        return self._left

    def combine(self) -> Tensor:
        """The weighted sum [T, H], accumulated in float32 over k in the decision's order; once none is missing."""
        return grouped.weighted_sum(self.outputs, self.chosen, self.weights)


class SlotOutputs:
    """`LayerOutputs` by the kernels; first of what is found in a slot table, without the host knowing what that is."""

    def __init__(self, hidden: Tensor, decision: RoutingDecision, layer: LayerSlabs) -> None:
        self._outputs = KernelOutputs(hidden, decision, layer)
        self._experts = len(layer.layouts)
        self._found: Tensor | None = None

    def look_up(self, row: Tensor) -> Tensor:
        """Where the experts wanted are, by a row [E] of the slot table, and `UNUSED` for the others: int32 [E]."""
        self._found = row.masked_fill(~self._outputs.missing(), UNUSED)
        return self._found

    def show(self, slots: Tensor) -> None:
        """As `look_up`, which was done elsewhere and came to `slots`."""
        self._found = slots

    def compute_found(self) -> None:
        """Run those that were found."""
        if self._found is not None:
            self._outputs.launch(self._found)

    def compute(self, work: Sequence[ExpertWork]) -> None:
        """See `LayerOutputs`. All have slots."""
        slots = torch.full((self._experts,), ABSENT, dtype=torch.int32)
        slots[[one.expert for one in work]] = torch.tensor([one.slot for one in work], dtype=torch.int32)
        self._outputs.launch(slots.to(self._outputs.hidden.device, non_blocking=True))

    def put(self, places: Tensor, rows: Tensor) -> None:
        """See `LayerOutputs`."""
        self._outputs.outputs.index_copy_(0, places, rows)

    def combine(self) -> Tensor:
        """See `LayerOutputs`."""
        return self._outputs.combine()


class SlotExperts:
    """Runs the experts of any layer out of the slots of one arena, where the kernels run."""

    def __init__(self, store: ExpertStore, arena: Slots) -> None:
        self._store = store
        self._arena = arena
        self._layers: dict[int, LayerSlabs] = {}
        self.counts = dict(sorted(Counter(key.layer for key in store.keys()).items()))  # noqa: SIM118 (no mapping)
        """By layer, how many experts it has: 0 to that."""

    def serves(self, hidden: Tensor) -> bool:
        """Whether the kernels compute on `hidden`."""
        return grouped.serves(hidden)

    def outputs(self, layer: int, hidden: Tensor, decision: RoutingDecision) -> SlotOutputs | None:
        """Of one layer in one forward; None where the kernels don't serve `hidden`."""
        return SlotOutputs(hidden, decision, self._slabs(layer)) if self.serves(hidden) else None

    def close(self) -> None:
        """Let go of the arena's memory. Idempotent."""
        self._layers.clear()

    def _slabs(self, layer: int) -> LayerSlabs:
        if layer not in self._layers:
            layouts = [self._store.layout(ExpertKey(layer, expert)) for expert in range(self.counts[layer])]
            self._layers[layer] = LayerSlabs.of(layouts, self._arena.whole(), self._arena.slab_bytes)
        return self._layers[layer]
