"""dMoE: a block votes for a shared coreset of experts, and each of its tokens chooses inside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.kernels import selection as fused
from offload_engine.kernels.cuda_selection import SelectionRule
from offload_engine.routing.base import RouterShape, block_votes, choose_inside, decide_on_device, select_scores, total

Election = Callable[[Tensor, Tensor], Tensor]
"""Makes a coreset [B, E] bool of votes [B, E] float32 and whether there were any, [B, E] bool."""


@dataclass(frozen=True, slots=True)
class Coreset:
    """dMoE's block-level routing (paper §4.2, Algorithm 1; REFERENCE §3).

    `top_p` is the share of a block's votes the coreset must pass, `min_experts` its smallest size.
    """

    shape: RouterShape
    top_p: float
    min_experts: int
    name: str = "dmoe"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """See `RoutingPolicy`. Block scores are the votes; the coreset is [B, E] bool."""
        rule = SelectionRule(self.shape.top_k, self.shape, self.top_p, self.min_experts)
        decision = decide_on_device(rule, logits, bias, block_ids)
        if decision is not None:
            return decision
        scores, selection = select_scores(logits, bias)
        if fused.serves(block_ids, self.shape.top_k, self.shape, scores, selection):
            return RoutingDecision(
                *fused.route_by_coreset(
                    scores, selection, block_ids, self.shape.top_k, self.shape, self.top_p, self.min_experts
                )
            )
        return self.decide(logits, bias, block_ids, self.elect)

    def elect(self, votes: Tensor, voted: Tensor) -> Tensor:
        """The coreset [B, E] bool, from what `block_votes` returns."""
        return top_p_coreset(votes, voted, self.top_p, self.min_experts)

    def decide(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor, elect: Election) -> RoutingDecision:
        """As calling the policy, with the coreset that `elect` makes of the votes."""
        scores, selection = select_scores(logits, bias)
        votes, voted = block_votes(selection, block_ids, self.shape.top_k)
        coreset = elect(votes, voted)
        experts, weights = choose_inside(scores, selection, coreset, block_ids, self.shape)
        return RoutingDecision(experts, weights, coreset, votes.clamp(min=0.0))


def top_p_coreset(votes: Tensor, voted: Tensor, top_p: float, min_experts: int) -> Tensor:
    """The experts [B, E] bool that hold `top_p` of the votes [B, E], and the one that crosses it; at least
    `min_experts` of them. `top_p` 1 keeps every expert with a vote.
    """
    shares = votes / total(votes, -1).clamp(min=torch.finfo(votes.dtype).tiny)
    ranked = shares.sort(dim=-1, descending=True, stable=True)
    before = ranked.values.cumsum(dim=-1).roll(1, dims=-1)
    before[:, :1] = 0.0
    kept = voted.gather(1, ranked.indices)
    if top_p < 1.0:  # rounding may carry the running sum past 1, which must not cost a voted expert its place
        kept &= before <= top_p
    kept[:, :min_experts] = True
    return torch.zeros_like(voted).scatter_(1, ranked.indices, kept)
