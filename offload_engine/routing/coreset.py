"""dMoE: a block votes for a shared coreset of experts, and each of its tokens chooses inside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.routing.base import (
    RouterShape,
    choose,
    group_limited,
    select_scores,
    sum_by_block,
    top_indices,
)


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
        scores, selection = select_scores(logits, bias)
        votes, voted = block_votes(selection, block_ids, self.shape.top_k)
        coreset = top_p_coreset(votes, voted, self.top_p, self.min_experts)
        pads = block_ids < 0
        inside = selection.masked_fill(~coreset[block_ids.clamp(min=0)], -torch.inf)
        allowed = group_limited(inside, self.shape)
        # A very small coreset may have no expert in any group kept; the token then chooses from all of the coreset.
        stranded = (allowed == -torch.inf).all(dim=-1, keepdim=True)
        experts, weights = choose(scores, inside.where(stranded, allowed), self.shape.top_k, self.shape, pads)
        return RoutingDecision(experts, weights, coreset, votes.clamp(min=0.0))


def block_votes(selection: Tensor, block_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sum over each block of its tokens' k best selection scores, not group-limited.

    Returns votes [B, E] float32 and whether any token voted for the expert, [B, E] bool.
    """
    local = torch.zeros_like(selection, dtype=torch.bool)
    local.scatter_(1, top_indices(selection, k), True)
    votes = sum_by_block(selection.where(local, 0.0), block_ids)
    return votes, sum_by_block(local.float(), block_ids) > 0


def top_p_coreset(votes: Tensor, voted: Tensor, top_p: float, min_experts: int) -> Tensor:
    """The experts [B, E] bool that hold `top_p` of the votes [B, E], and the one that crosses it; at least
    `min_experts` of them. `top_p` 1 keeps every expert with a vote.
    """
    shares = votes / votes.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(votes.dtype).tiny)
    ranked = shares.sort(dim=-1, descending=True, stable=True)
    before = ranked.values.cumsum(dim=-1).roll(1, dims=-1)
    before[:, :1] = 0.0
    kept = voted.gather(1, ranked.indices)
    if top_p < 1.0:  # rounding may carry the running sum past 1, which must not cost a voted expert its place
        kept &= before <= top_p
    kept[:, :min_experts] = True
    return torch.zeros_like(voted).scatter_(1, ranked.indices, kept)
