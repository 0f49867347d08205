"""The checkpoint's own group-limited top-k, in a form that a training step can afford.

`offload_engine.routing.TopK` sorts all scores stably, to break ties alike everywhere; that sort costs more than the
experts do. Here ties fall as they may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.routing.base import EPSILON, RouterShape


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
