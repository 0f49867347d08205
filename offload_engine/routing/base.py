"""What a routing policy is: a pure function of router logits.

Every tie goes to the lower index, so that CPU, CUDA and the simulator decide alike; `torch.topk` promises no order
among equals, hence the stable sorts below. A full sort of all scores would cost a small model more than its experts
do, so only rows in which something ties are sorted in full.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from offload_engine.core import ForwardInfo, Lookup, Phase, RoutingDecision
from offload_engine.kernels import cuda_selection as device
from offload_engine.kernels import selection as fused

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


Route = Callable[[Tensor, Tensor | None, Tensor], RoutingDecision]
"""What a layer calls, with the arguments of a `RoutingPolicy`: a policy, or a situated one put in its place."""


class SituatedPolicy(ABC):
    """A `RoutingPolicy` that decides by where it is asked as well. Called as a policy, it decides as if nowhere."""

    @abstractmethod
    def at(self, layer: int, info: ForwardInfo, *, preview: bool = False) -> Route:
        """How `layer` routes in the forward `info`. A `preview` leaves no trace: it may be asked for at any time."""


def by_block(info: ForwardInfo, decision: RoutingDecision) -> list[tuple[ForwardInfo, RoutingDecision]]:
    """The decision of a forward over several blocks as one decision per block, each with a `ForwardInfo` of its own.

    Whole where the forward does not say which blocks it is made of: a prefill, and one that only scores.
    """
    if len(info.blocks) < 2 or info.phase is Phase.PREFILL:
        return [(info, decision)]
    sizes = [block.tokens for block in info.blocks]
    parts = zip(info.blocks, decision.experts.split(sizes), decision.weights.split(sizes), strict=True)
    coreset, scores = decision.coreset, decision.block_scores
    return [
        (
            ForwardInfo.of([block]),
            RoutingDecision(
                experts,
                weights,
                None if coreset is None else coreset[place : place + 1],
                None if scores is None else scores[place : place + 1],
            ),
        )
        for place, (block, experts, weights) in enumerate(parts)
    ]


def decide_on_device(
    rule: device.SelectionRule, logits: Tensor, bias: Tensor | None, block_ids: Tensor
) -> RoutingDecision | None:
    """As a `RoutingPolicy` with the numbers of `rule`, by the CUDA kernel; None where that does not serve these."""
    routed = device.decide(rule, logits, bias, block_ids)
    if routed is None:
        return None
    lookup = None if routed.lookup is None else Lookup(*routed.lookup)
    return RoutingDecision(routed.experts, routed.weights, routed.coreset, routed.block_scores, lookup)


def select_scores(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sigmoid scores `s` and selection scores `r = s + bias`, both [T, E] float32 (REFERENCE §3).

    Gradients flow through `s` alone: a choice has none.
    """
    scores = logits.float().sigmoid()
    selection = scores.detach() if scores.requires_grad else scores
    return scores, selection if bias is None else selection + bias.float()


def total(values: Tensor, dim: int) -> Tensor:
    """The sum over `dim`, which is kept. Unlike torch's `sum` it adds from the first to the last, on the CPU in double,
    whatever the instruction set or what lies beside: cpu/select.c has to come to the same bits.
    """
    return values.cumsum(dim).narrow(dim, -1, 1)


def top_indices(values: Tensor, k: int) -> Tensor:
    """Indices [.., k] of the k largest of the last dimension, falling; equals by rising index."""
    if k >= values.shape[-1]:
        return values.sort(dim=-1, descending=True, stable=True).indices
    best = values.topk(k + 1, dim=-1)  # one more than asked for, to see whether it ties with the last
    indices = best.indices[..., :k]
    tied = ~(best.values[..., 1:] < best.values[..., :-1]).all(dim=-1)  # or a NaN, which counts as the largest
    if tied.any():
        indices[tied] = values[tied].sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return indices


def group_limited(selection: Tensor, shape: RouterShape) -> Tensor:
    """`selection` [T, E] with every expert outside each token's `topk_group` best groups at -inf.

    A group's score is the sum of its two best selection scores (REFERENCE §3).
    """
    if shape.n_group <= 1 or shape.topk_group >= shape.n_group:
        return selection
    tokens = selection.shape[0]
    grouped = selection.view(tokens, shape.n_group, shape.num_experts // shape.n_group)
    best = grouped.max(dim=-1, keepdim=True)
    group_scores = best.values.squeeze(-1)
    if grouped.shape[-1] > 1:
        group_scores = group_scores + grouped.scatter(-1, best.indices, -torch.inf).amax(dim=-1)
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept.scatter_(1, top_indices(group_scores, shape.topk_group), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), -torch.inf).view_as(selection)


def choose(scores: Tensor, allowed: Tensor, k: int, shape: RouterShape, pads: Tensor) -> tuple[Tensor, Tensor]:
    """The k best experts of `allowed` [T, E] (-inf: not allowed) and their weights from `scores` [T, E].

    Returns experts [T, k] int64 and weights [T, k] float32; -1 and 0 where a token has fewer than k to choose from,
    the rest normalised over what it has. `pads` [T] bool.
    """
    experts = top_indices(allowed, k)
    absent = (allowed.gather(1, experts) == -torch.inf) | pads.unsqueeze(-1)
    weights = scores.gather(1, experts).masked_fill(absent, 0.0)
    if shape.norm_topk_prob:
        weights = weights / (total(weights, -1) + EPSILON)
    return experts.masked_fill(absent, -1), weights * shape.routed_scaling_factor


def _count_blocks(block_ids: Tensor) -> int:
    return max(int(block_ids.max().item()), 0) + 1 if block_ids.numel() else 1


def tally(selection: Tensor, experts: Tensor, block_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What each block's tokens say of the `experts` [T, k] they name (-1: none); pads are left out.

    Returns the sums of their selection scores, [B, E] float32 with B at least 1, and whether any token named the
    expert, [B, E] bool.
    """
    shape = _count_blocks(block_ids), selection.shape[1]
    named = (experts >= 0) & (block_ids >= 0).unsqueeze(1)
    places = (block_ids.unsqueeze(1) * shape[1] + experts)[named]
    scores = selection.gather(1, experts.clamp(min=0))[named]
    sums = selection.new_zeros(shape[0] * shape[1]).index_add_(0, places, scores)
    anyone = torch.zeros_like(sums, dtype=torch.bool).index_fill_(0, places, True)
    return sums.view(shape), anyone.view(shape)


def block_votes(selection: Tensor, block_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `tally`, every token naming its k best experts, not group-limited."""
    if fused.serves(block_ids, k, None, selection):
        return fused.vote(selection, block_ids, k)
    return tally(selection, top_indices(selection, k), block_ids)


def max_by_block(values: Tensor, block_ids: Tensor) -> Tensor:
    """Maximum of `values` [T, E] over the tokens of each block: [B, E]; -inf for a block of nothing but pads."""
    largest = values.new_full((_count_blocks(block_ids), values.shape[1]), -torch.inf)
    voting = block_ids >= 0
    rows = block_ids[voting].unsqueeze(1).expand(-1, values.shape[1])
    return largest.scatter_reduce_(0, rows, values[voting], "amax")


def choose_inside(
    scores: Tensor,
    selection: Tensor,
    coreset: Tensor,
    block_ids: Tensor,
    shape: RouterShape,
    *,
    limit_groups: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `choose`, each token among its block's `coreset` [B, E] bool, of which groups may be cut off."""
    router = shape if limit_groups else replace(shape, n_group=1)
    if fused.serves(block_ids, shape.top_k, router, scores, selection):
        return fused.choose_inside(scores, selection, coreset, block_ids, shape.top_k, router)
    inside = selection.masked_fill(~coreset[block_ids.clamp(min=0)], -torch.inf)
    allowed = group_limited(inside, router)
    # A very small coreset may have no expert in any group kept; the token then chooses from all of the coreset.
    stranded = allowed.amax(dim=-1) == -torch.inf
    if stranded.any():
        allowed = inside.where(stranded.unsqueeze(-1), allowed)
    return choose(scores, allowed, shape.top_k, shape, block_ids < 0)
