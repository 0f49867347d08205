"""DES (Dynamic Expert Sharing, arXiv 2602.00879): two training-free ways for a block to share experts (REFERENCE §3).

Both take a token's local best, not group-limited, to find the block's coreset, and both then let the checkpoint's own
group-limited top-k choose inside it, as the paper's comparison must have done: an expert of the coreset is in some
token's local best, so a plain top-k inside would use every one of them, always floor(beta * E), while its DES-Vote
rows vary around a smaller number (Table 2: 36.8 to 37.0, 12.9 to 13.0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.routing.base import (
    RouterShape,
    block_votes,
    choose_inside,
    select_scores,
    top_indices,
)


@dataclass(frozen=True, slots=True)
class DesSeq:
    """The coreset is the union of the block's tokens' `k` best experts."""

    shape: RouterShape
    k: int
    name: str = "des-seq"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """See `RoutingPolicy`. Block scores are the sums of the selection scores that made the union."""
        scores, selection = select_scores(logits, bias)
        votes, coreset = block_votes(selection, block_ids, self.k)
        experts, weights = choose_inside(scores, selection, coreset, block_ids, self.shape)
        return RoutingDecision(experts, weights, coreset, votes.clamp(min=0.0))


@dataclass(frozen=True, slots=True)
class DesVote:
    """The coreset is the `keep` experts with the most votes, a token voting with the selection scores of its local
    top-k (the checkpoint's k).
    """

    shape: RouterShape
    keep: int
    name: str = "des-vote"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """See `RoutingPolicy`. Block scores are the votes."""
        scores, selection = select_scores(logits, bias)
        votes, _voted = block_votes(selection, block_ids, self.shape.top_k)
        coreset = torch.zeros_like(votes, dtype=torch.bool).scatter_(1, top_indices(votes, self.keep), True)
        experts, weights = choose_inside(scores, selection, coreset, block_ids, self.shape)
        return RoutingDecision(experts, weights, coreset, votes.clamp(min=0.0))
