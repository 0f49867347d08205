"""What a routing policy is: a pure function of router logits.

Every tie goes to the lower index, so that CPU, CUDA and the simulator decide alike; `torch.topk` promises no order
among equals, hence the stable sorts below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from offload_engine.core import RoutingDecision

EPSILON = 1e-20
"""Added to the sum that weights are divided by, as the reference does."""


@dataclass(frozen=True, slots=True)
class RouterShape:
    """The numbers a checkpoint's config gives its routers (REFERENCE §1)."""

    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


class RoutingPolicy(Protocol):
    """Decides which experts each token of a forward goes to."""

    @property
    def name(self) -> str:
        """The policy's name in configs and on the command line."""

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """Route `T` tokens.

        `logits` [T, E] float32, before the sigmoid; `bias` [E] float32 or None, added for selection only; `block_ids`
        [T] int64, the index from 0 of the block each token belongs to, -1 for a pad: a pad neither votes nor is routed.
        """


def select_scores(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sigmoid scores `s` and selection scores `r = s + bias`, both [T, E] float32 (REFERENCE §3)."""
    scores = logits.float().sigmoid()
    return scores, scores if bias is None else scores + bias.float()


def top_indices(values: Tensor, k: int) -> Tensor:
    """Indices [.., k] of the k largest of the last dimension, falling; equals by rising index."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def group_limited(selection: Tensor, shape: RouterShape) -> Tensor:
    """`selection` [T, E] with every expert outside each token's `topk_group` best groups at -inf.

    A group's score is the sum of its two best selection scores (REFERENCE §3).
    """
    if shape.n_group <= 1 or shape.topk_group >= shape.n_group:
        return selection
    tokens = selection.shape[0]
    grouped = selection.view(tokens, shape.n_group, shape.num_experts // shape.n_group)
    group_scores = grouped.sort(dim=-1, descending=True).values[..., :2].sum(dim=-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, top_indices(group_scores, shape.topk_group), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).view_as(selection)


def choose(scores: Tensor, allowed: Tensor, k: int, shape: RouterShape, pads: Tensor) -> tuple[Tensor, Tensor]:
    """The k best experts of `allowed` [T, E] (-inf: not allowed) and their weights from `scores` [T, E].

    Returns experts [T, k] int64 and weights [T, k] float32; -1 and 0 where a token has fewer than k to choose from,
    the rest normalised over what it has. `pads` [T] bool.
    """
    k = min(k, shape.num_experts)
    ranked = allowed.sort(dim=-1, descending=True, stable=True)
    experts = ranked.indices[:, :k]
    absent = (ranked.values[:, :k] == -torch.inf) | pads.unsqueeze(-1)
    weights = scores.gather(1, experts).masked_fill(absent, 0.0)
    if shape.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    return experts.masked_fill(absent, -1), weights * shape.routed_scaling_factor


def sum_by_block(values: Tensor, block_ids: Tensor) -> Tensor:
    """Sum of `values` [T, E] over the tokens of each block: [B, E] with B at least 1, pads (-1) left out."""
    last = int(block_ids.max().item()) if block_ids.numel() else 0
    totals = values.new_zeros(max(last, 0) + 1, values.shape[1])
    voting = block_ids >= 0
    return totals.index_add_(0, block_ids[voting], values[voting])
