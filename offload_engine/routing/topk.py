"""Token-level routing: the checkpoint's own group-limited top-k, and the same with another k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.routing.base import RouterShape, choose, group_limited, select_scores, sum_by_block


@dataclass(frozen=True, slots=True)
class TopK:
    """Group-limited top-k per token (REFERENCE §3, rows *original* and *top-k*)."""

    shape: RouterShape
    k: int
    name: str = "top-k"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """See `RoutingPolicy`. Block scores are the summed selection scores of the experts chosen."""
        scores, selection = select_scores(logits, bias)
        pads = block_ids < 0
        experts, weights = choose(scores, group_limited(selection, self.shape), self.k, self.shape, pads)
        return RoutingDecision(experts, weights, None, chosen_scores(selection, experts, block_ids))


def chosen_scores(selection: Tensor, experts: Tensor, block_ids: Tensor) -> Tensor:
    """Per block, the sum of the selection scores of the experts its tokens chose: [B, E], not negative."""
    chosen = torch.zeros(selection.shape[0], selection.shape[1] + 1, dtype=torch.bool, device=selection.device)
    chosen.scatter_(1, experts.where(experts >= 0, selection.shape[1]), True)  # the extra column takes the -1s
    return sum_by_block(selection.where(chosen[:, :-1], 0.0), block_ids).clamp_(min=0.0)
