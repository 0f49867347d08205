"""Token-level routing: the checkpoint's own group-limited top-k, and the same with another k."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.kernels import selection as fused
from offload_engine.kernels.cuda_selection import SelectionRule
from offload_engine.routing.base import RouterShape, choose, decide_on_device, group_limited, select_scores, tally


@dataclass(frozen=True, slots=True)
class TopK:
    """Group-limited top-k per token (REFERENCE §3, rows *original* and *top-k*)."""

    shape: RouterShape
    k: int
    name: str = "top-k"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """See `RoutingPolicy`. Block scores are the summed selection scores of the experts chosen."""
        decision = decide_on_device(SelectionRule(self.k, self.shape), logits, bias, block_ids)
        if decision is not None:
            return decision
        scores, selection = select_scores(logits, bias)
        if fused.serves(block_ids, self.k, self.shape, scores, selection):
            experts, weights, wanted = fused.route(scores, selection, block_ids, self.k, self.shape)
            return RoutingDecision(experts, weights, None, wanted)
        pads = block_ids < 0
        experts, weights = choose(scores, group_limited(selection, self.shape), self.k, self.shape, pads)
        wanted, _anyone = tally(selection, experts, block_ids)
        return RoutingDecision(experts, weights, None, wanted.clamp(min=0.0))
