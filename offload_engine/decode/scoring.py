"""One forward over a whole sequence, without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.config import format_bytes
from offload_engine.core import ForwardInfo, Phase
from offload_engine.errors import MemoryBudgetError, PromptError, UsageError
from offload_engine.memory import MemoryPlan
from offload_engine.model.attention import MaskedSequence, block_causal_mask
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertExecutor
from offload_engine.routing.base import RoutingPolicy


class LayerRouting(NamedTuple):
    """Where one MoE layer sent each of T tokens."""

    experts: Tensor
    """[T, k] int64; -1 where a token used fewer than k."""
    weights: Tensor
    """[T, k] float32."""


def check_room(plan: MemoryPlan, needed: int, tokens: int, block_length: int) -> None:
    """Raises unless `plan` leaves the `needed` bytes for a forward over this many tokens in blocks of this length."""
    if block_length < 1:
        raise UsageError(f"block_length is {block_length}; wanted at least 1")
    if not tokens:
        raise PromptError("there are no token ids to run a forward over; pass at least one")
    room = plan.workspace + plan.spare
    if needed > room:
        raise MemoryBudgetError(
            f"one forward over {tokens} tokens takes up to {format_bytes(needed)}, but the plan leaves "
            f"{format_bytes(room)}; pass fewer tokens or raise gpu_mem"
        )


def score(
    model: LLaDA2Model, token_ids: Sequence[int], block_length: int, policy: RoutingPolicy, experts: ExpertExecutor
) -> Tensor:
    """Hidden states [T, H] of one block-causal forward over `token_ids`."""
    positions = torch.arange(len(token_ids), device=model.lm_head.weight.device)
    forward = Forward(
        info=ForwardInfo(Phase.SCORE),
        positions=positions,
        block_ids=positions // block_length,
        key_values=MaskedSequence(block_causal_mask(positions, block_length)),
        policy=policy,
        experts=experts,
    )
    return model(torch.tensor(token_ids), forward)  # type: ignore[no-any-return]
