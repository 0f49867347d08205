"""The policies *original* and *dmoe* in a form that a training step can afford.

Those of `offload_engine.routing` sort all scores stably, to break ties alike everywhere; that sort costs more than the
experts do. Here ties between scores fall as they may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.model.config import ModelConfig
from offload_engine.routing import RoutingOptions, RoutingPolicy, make_policy
from offload_engine.routing.base import EPSILON, RouterShape, top_indices
from offload_engine.routing.coreset import Coreset, top_p_coreset


def training_policy(name: str, config: ModelConfig, options: RoutingOptions) -> RoutingPolicy:
    """The policy to train under, in its fast form where it has one."""
    policy = make_policy(name, config.router, options)
    if name == "original":
        return FastTopK(config.router)
    return FastCoreset(policy) if isinstance(policy, Coreset) else policy


@dataclass(frozen=True, slots=True)
class FastTopK:
    """Equal to the policy *original* where no two scores tie; a `RoutingPolicy`. Knows no pads."""

    shape: RouterShape
    name: str = "original"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:  # noqa: ARG002
        """See `RoutingPolicy`."""
        with torch.no_grad():
            scores = logits.detach().sigmoid()
            experts = self._select(scores if bias is None else scores + bias.float())
        weights = logits.gather(1, experts).sigmoid()
        if self.shape.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
        return RoutingDecision(experts, weights * self.shape.routed_scaling_factor)

    def _select(self, selection: Tensor) -> Tensor:
        """[T, E] -> [T, k]: the best experts of the best groups."""
        groups, per_group = self.shape.n_group, self.shape.num_experts // self.shape.n_group
        if groups == 1 or self.shape.topk_group >= groups:
            return selection.topk(self.shape.top_k, dim=-1).indices
        grouped = selection.view(-1, groups, per_group)
        best = grouped.amax(dim=-1, keepdim=True)
        second = grouped.masked_fill(grouped == best, -torch.inf).amax(dim=-1)
        kept = (best.squeeze(-1) + second).topk(self.shape.topk_group, dim=-1).indices
        inside = grouped.gather(1, kept.unsqueeze(-1).expand(-1, -1, per_group)).flatten(1)
        chosen = inside.topk(self.shape.top_k, dim=-1).indices
        return kept.gather(1, chosen // per_group) * per_group + chosen % per_group


@dataclass(frozen=True, slots=True)
class FastCoreset:
    """Equal to the dMoE policy `exact` where no two scores tie; a `RoutingPolicy`. Knows no pads."""

    exact: Coreset
    name: str = "dmoe"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        """See `RoutingPolicy`."""
        shape = self.exact.shape
        with torch.no_grad():
            scores = logits.detach().sigmoid()
            selection = scores if bias is None else scores + bias.float()
            coreset = self._coreset(selection, block_ids)
            inside = selection.masked_fill(~coreset.index_select(0, block_ids), -torch.inf)
            best, experts = self._select(inside)
            absent = best == -torch.inf
        weights = logits.gather(1, experts).sigmoid().masked_fill(absent, 0.0)
        if shape.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
        return RoutingDecision(experts.masked_fill(absent, -1), weights * shape.routed_scaling_factor, coreset)

    def _coreset(self, selection: Tensor, block_ids: Tensor) -> Tensor:
        """[T, E] -> [B, E] bool."""
        top = selection.topk(self.exact.shape.top_k, dim=-1)
        blocks, (_, experts) = int(block_ids.max()) + 1, selection.shape
        places = (block_ids.unsqueeze(1) * experts + top.indices).flatten()
        votes = selection.new_zeros(blocks * experts).index_add_(0, places, top.values.flatten())
        voted = torch.zeros_like(votes, dtype=torch.bool).index_fill_(0, places, True)
        votes, voted = votes.view(blocks, experts), voted.view(blocks, experts)
        return top_p_coreset(votes, voted, self.exact.top_p, self.exact.min_experts)

    def _select(self, inside: Tensor) -> tuple[Tensor, Tensor]:
        """[T, E], -inf outside the coreset -> the k best of the best groups: their scores and experts, [T, k] each."""
        shape = self.exact.shape
        groups, per_group = shape.n_group, shape.num_experts // shape.n_group
        if groups == 1 or shape.topk_group >= groups:
            ranked = inside.topk(shape.top_k, dim=-1)
            return ranked.values, ranked.indices
        grouped = inside.view(-1, groups, per_group)
        first = grouped.amax(dim=-1, keepdim=True)
        second = grouped.masked_fill(grouped == first, -torch.inf).amax(dim=-1)
        pairs = first.squeeze(-1) + second
        kept = top_indices(pairs, shape.topk_group)  # stably: groups with fewer than two experts all stand at -inf
        within = grouped.gather(1, kept.unsqueeze(-1).expand(-1, -1, per_group)).flatten(1)
        best, chosen = within.topk(shape.top_k, dim=-1)
        experts = kept.gather(1, chosen // per_group) * per_group + chosen % per_group
        stranded = (best[:, 0] == -torch.inf).nonzero().squeeze(1)
        if stranded.numel():
            again = inside.index_select(0, stranded).topk(shape.top_k, dim=-1)
            best[stranded], experts[stranded] = again.values, again.indices
        return best, experts
