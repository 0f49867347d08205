"""Block capacity: LLaDA2.2's native routing, which lets a block use a fixed number of experts (REFERENCE §2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.routing.base import RouterShape, choose_inside, max_by_block, select_scores, top_indices


@dataclass(frozen=True, slots=True)
class BlockCapacity:
    """The coreset is the `capacity` experts with the largest g_j, the best selection score any of the block's tokens
    gives expert j; each token takes its top-k inside, with no limit on groups.
    """

    shape: RouterShape
    capacity: int
    name: str = "block-capacity"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """See `RoutingPolicy`. Block scores are g, at least 0."""
        scores, selection = select_scores(logits, bias)
        best = max_by_block(selection, block_ids)
        coreset = torch.zeros_like(best, dtype=torch.bool).scatter_(1, top_indices(best, self.capacity), True)
        experts, weights = choose_inside(scores, selection, coreset, block_ids, self.shape, limit_groups=False)
        return RoutingDecision(experts, weights, coreset, best.clamp(min=0.0))
