"""Routed experts that can be trained: merged weights, and a path for many tiny experts that autograd goes through.

A forward gives every expert between a few and a few hundred rows. One product per expert spends its time on calls,
and one batched product over all experts drowns in the padding of the busiest, so experts are sorted by load and cut
into a few buckets, each one batched product padded to its own largest load (rounded, so that oneDNN meets the same
shapes again). Rows that pad carry weight 0, which keeps them out of every sum and gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_engine.core import ForwardInfo, RoutingDecision
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import Beside, Decide, ExpertWeights, Preview, nothing

BUCKETS = (8, 8, 16, 32, 64, 64, 64)
"""Experts per batched product, busiest first; the last size repeats. More buckets mean less padding and more calls."""
ROUND_ROWS = 32
"""Bucket heights are multiples of this, and from 256 rows on of a quarter of the power of two below."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Experts of similar load: `experts` of them from `first` (in order of load), `height` rows each from `start`."""

    first: int
    experts: int
    start: int
    height: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a routing decision lie in the padded buffer, `S` slots."""

    by_load: Tensor
    """[U] int64: the experts in use, by falling load."""
    buckets: list[Bucket]
    slots: Tensor
    """[T, k] int64: the slot of each choice; S for a choice that is none (-1)."""
    tokens: Tensor
    """[S] int64: the token each slot reads; 0 for padding."""
    size: int
    """S."""
    loads: Tensor
    """[E] int64: tokens per expert."""


def bucket_height(rows: int) -> int:
    """The rows a bucket is padded to: few different sizes, because oneDNN prepares anew for each."""
    step = max(ROUND_ROWS, 1 << max(0, rows.bit_length() - 3))
    return -(-rows // step) * step


def make_layout(experts: Tensor, num_experts: int) -> Layout:
    """Lay out the choices `experts` [T, k] (-1: none)."""
    choices, device = experts.shape[1], experts.device
    flat = experts.flatten()
    flat = flat.where(flat >= 0, num_experts)
    order = flat.to(torch.int32).argsort(stable=True)
    loads = torch.bincount(flat, minlength=num_experts + 1)
    starts = loads.cumsum(0) - loads
    loads = loads[:num_experts]
    ranked = loads.sort(descending=True, stable=True)
    used = int((ranked.values > 0).sum())
    heights, buckets = ranked.values[:used].tolist(), []
    base = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    size = 0
    first = 0
    while first < used:
        count = min(BUCKETS[min(len(buckets), len(BUCKETS) - 1)], used - first)
        height = bucket_height(heights[first])
        buckets.append(Bucket(first, count, size, height))
        base[ranked.indices[first : first + count]] = size + torch.arange(count, device=device) * height
        size += count * height
        first += count
    base[num_experts] = size
    in_order = flat[order]
    places = torch.arange(flat.numel(), device=device) - starts[in_order]
    places = base[in_order] + places.masked_fill_(in_order == num_experts, 0)
    slots = torch.empty_like(flat).scatter_(0, order, places)
    tokens = torch.zeros(size + 1, dtype=torch.int64, device=device)
    tokens.scatter_(0, places, order.div(choices, rounding_mode="floor"))
    return Layout(ranked.indices[:used], buckets, slots.view_as(experts), tokens[:size], size, loads)


def _products(layout: Layout, rows: Tensor, matrices: Tensor, out: Tensor) -> Tensor:
    """`out` [S, N]: each slot's row of `rows` [S, M] times its expert's matrix, `matrices` [U, M, N]."""
    for b in layout.buckets:
        span = slice(b.start, b.start + b.experts * b.height)
        torch.bmm(
            rows[span].view(b.experts, b.height, -1),
            matrices[b.first : b.first + b.experts],
            out=out[span].view(b.experts, b.height, -1),
        )
    return out


def _outer_products(layout: Layout, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """`out` [U, M, N]: per expert, left^T right over its slots, `left` [S, M], `right` [S, N]."""
    for b in layout.buckets:
        span = slice(b.start, b.start + b.experts * b.height)
        torch.bmm(
            left[span].view(b.experts, b.height, -1).transpose(1, 2),
            right[span].view(b.experts, b.height, -1),
            out=out[b.first : b.first + b.experts],
        )
    return out


def _bag(slots: Tensor, rows: Tensor) -> Tensor:
    """Sum over k of `rows` [S + 1, H] at `slots` [T, k]: accumulated in float32."""
    if rows.dtype == torch.float64:
        return rows[slots].sum(dim=1)
    return F.embedding_bag(slots, rows, mode="sum")


def _in_use(stack: Tensor, layout: Layout, dtype: torch.dtype) -> Tensor:
    """[U, ..]: of all experts' matrices [E, ..] those in use, in the order of the buckets."""
    return stack.index_select(0, layout.by_load).to(dtype)


def _of_all(grads: Tensor, layout: Layout, stack: Tensor) -> Tensor:
    """The gradient of `stack` [E, ..] from that of the experts in use [U, ..]."""
    return torch.zeros_like(stack).index_copy_(0, layout.by_load, grads.to(stack.dtype))


class _RunExperts(torch.autograd.Function):
    """The weighted sum of each token's experts in the dtype of `hidden`; `gate_up` [E, 2I, H] is gate over up, `down`
    [E, H, I].

    Of the experts it keeps for its backward the parameters themselves, not those in use: over all layers these copies
    would be most of a model, where FSDP2 frees the parameters between a layer's forward and its backward.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, layout: Layout) -> Tensor:
        width = down.shape[2]
        rows = hidden.index_select(0, layout.tokens)
        slot_weights = hidden.new_zeros(layout.size + 1)
        slot_weights[layout.slots.flatten()] = weights.flatten().to(hidden.dtype)
        slot_weights = slot_weights[:-1].unsqueeze(1)
        stored = gate_up, down
        gate_up, down = (_in_use(stack, layout, hidden.dtype) for stack in stored)
        gate = _products(layout, rows, gate_up[:, :width].transpose(1, 2), hidden.new_empty(layout.size, width))
        up = _products(layout, rows, gate_up[:, width:].transpose(1, 2), hidden.new_empty(layout.size, width))
        active = F.silu(gate) * up
        outputs = hidden.new_empty(layout.size + 1, hidden.shape[1])
        outputs[-1] = 0
        _products(layout, active * slot_weights, down.transpose(1, 2), outputs[:-1])
        ctx.save_for_backward(rows, slot_weights, gate, up, active, *stored)
        ctx.layout = layout
        return _bag(layout.slots, outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        rows, slot_weights, gate, up, active, *stored = ctx.saved_tensors
        gate_up, down = (_in_use(stack, layout, rows.dtype) for stack in stored)
        d_out = grads[0].contiguous().index_select(0, layout.tokens)
        d_down = _outer_products(layout, d_out, active * slot_weights, torch.empty_like(down))
        d_weighted = _products(layout, d_out, down, torch.empty_like(active))
        d_weights = d_out.new_zeros(layout.size + 1, dtype=torch.promote_types(d_out.dtype, torch.float32))
        d_weights[:-1] = (d_weighted * active).sum(dim=1)
        d_active = d_weighted * slot_weights
        d_gate = torch.ops.aten.silu_backward(d_active * up, gate)
        d_up = d_active * F.silu(gate)
        d_both = torch.cat((d_gate, d_up), dim=1)
        d_gate_up = _outer_products(layout, d_both, rows, torch.empty_like(gate_up))
        d_rows = d_out.new_empty(layout.size + 1, rows.shape[1])
        d_rows[-1] = 0
        _products(layout, d_both, gate_up, d_rows[:-1])
        return (
            _bag(layout.slots, d_rows),
            d_weights[layout.slots],
            *(_of_all(d, layout, stack) for d, stack in zip((d_gate_up, d_down), stored, strict=True)),
            None,
        )


class LayerExperts(nn.Module):
    """The routed experts of one layer. Its forward computes, so that whoever shards modules can gather it just then."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        count, width, hidden = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.count = count
        self.gate_up = nn.Parameter(torch.empty(count, 2 * width, hidden))
        """[E, 2I, H]: gate over up."""
        self.down = nn.Parameter(torch.empty(count, hidden, width))
        """[E, H, I]"""
        self.last_experts: Tensor | None = None
        """[T, k] of the last forward."""
        self.loads: Tensor | None = None
        """[E]: how many tokens the last forward sent to each expert."""

    def forward(self, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[T, H] -> [T, H]: the sum of the experts [T, k] by their weights [T, k].

        Under autocast in its dtype, as a linear layer would.
        """
        layout = make_layout(experts, self.count)
        self.last_experts, self.loads = experts, layout.loads
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        out: Tensor = _RunExperts.apply(hidden.to(dtype), weights, self.gate_up, self.down, layout)
        return out


class TrainableExperts(nn.Module):
    """All routed experts of a model as parameters; an `ExpertExecutor`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.width = config.moe_intermediate_size
        self.layers = nn.ModuleDict({str(layer): LayerExperts(config) for layer in config.moe_layers})

    @property
    def gate_up(self) -> dict[str, nn.Parameter]:
        """[E, 2I, H] by layer."""
        return {layer: experts.gate_up for layer, experts in self.layers.items()}

    @property
    def down(self) -> dict[str, nn.Parameter]:
        """[E, H, I] by layer."""
        return {layer: experts.down for layer, experts in self.layers.items()}

    @property
    def loads(self) -> dict[int, Tensor]:
        """[E] by layer: how many tokens the last forward sent to each expert."""
        return {int(layer): experts.loads for layer, experts in self.layers.items() if experts.loads is not None}

    @property
    def last_experts(self) -> dict[int, Tensor]:
        """[T, k] by layer: where the last forward went."""
        return {int(key): layer.last_experts for key, layer in self.layers.items() if layer.last_experts is not None}

    def weights(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's matrices, as `ResidentExperts` and the export want them."""
        both = self.layers[str(layer)].gate_up[expert]
        return ExpertWeights(both[: self.width], both[self.width :], self.layers[str(layer)].down[expert])

    def begin(self, info: ForwardInfo) -> None:
        """Nothing to do."""

    def prepare(self, layer: int, preview: Preview) -> None:
        """Nothing to do: everything is here."""

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:  # noqa: ARG002
        """See `ExpertExecutor`."""
        return decide()

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:  # noqa: ARG002
        """See `ExpertExecutor`."""
        out: Tensor = self.layers[str(layer)](hidden, decision.experts, decision.weights)
        return out

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:  # noqa: ARG002
        """See `ExpertExecutor`."""
        return self.run(layer, hidden, decision).float()
