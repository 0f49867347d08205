"""Routing policies: which experts the tokens of a block go to. Pure functions of router logits, but for
`SituatedCoreset`.

To add a policy, write it in a module of its own and enter a builder for it in `POLICIES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from offload_engine.errors import ConfigError
from offload_engine.routing.base import RouterShape, RoutingPolicy, SituatedPolicy
from offload_engine.routing.capacity import BlockCapacity
from offload_engine.routing.coreset import Coreset
from offload_engine.routing.des import DesSeq, DesVote
from offload_engine.routing.situated import SituatedCoreset
from offload_engine.routing.topk import TopK

__all__ = [
    "POLICIES",
    "BlockCapacity",
    "Coreset",
    "DesSeq",
    "DesVote",
    "RouterShape",
    "RoutingOptions",
    "RoutingPolicy",
    "SituatedCoreset",
    "SituatedPolicy",
    "TopK",
    "described",
    "make_policy",
]


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """The parameters of all policies together; each policy reads its own."""

    top_p: float = 0.6
    """dMoE: share of the block's votes that the coreset passes (paper, Table 3)."""
    min_experts: int = 16
    """dMoE: smallest coreset (16 in the paper's second version, 12 in its first)."""
    top_k_experts: int = 4
    """top-k: experts per token (paper, Table 2, row Top-4)."""
    des_k: int = 2
    """DES-Seq: experts each token brings into the block's coreset."""
    des_beta: float = 0.15
    """DES-Vote: share of a layer's experts that the coreset keeps, rounded down to whole experts."""
    expert_capacity: int = 48
    """Block capacity: experts of a block's coreset (48 in LLaDA2.2)."""
    residency_bonus: float = 0.0
    """dMoE: how much more the votes of resident experts count when a coreset is chosen; 0.5 is half as much again."""
    hold_steps: int = 1
    """dMoE: denoising steps of a block that one coreset serves."""


def _original(shape: RouterShape, _options: RoutingOptions) -> RoutingPolicy:
    return TopK(shape, shape.top_k, name="original")


def _top_k(shape: RouterShape, options: RoutingOptions) -> RoutingPolicy:
    _check_count("top_k_experts", options.top_k_experts, shape)
    return TopK(shape, options.top_k_experts)


def _dmoe(shape: RouterShape, options: RoutingOptions) -> RoutingPolicy:
    hold, bonus = options.hold_steps, options.residency_bonus
    if hold < 1:
        raise ConfigError(f"hold_steps is {hold}, wanted at least 1, which chooses a coreset in every step")
    if not 0 <= bonus < math.inf:
        raise ConfigError(f"residency_bonus is {bonus:g}, wanted a number from 0, which favours no expert")
    least = min(options.min_experts, shape.num_experts)
    if hold == 1 and bonus == 0:
        return Coreset(shape, options.top_p, least)
    return SituatedCoreset(shape, options.top_p, least, hold_steps=hold, residency_bonus=bonus)


def _des_seq(shape: RouterShape, options: RoutingOptions) -> RoutingPolicy:
    _check_count("des_k", options.des_k, shape)
    return DesSeq(shape, options.des_k)


def _des_vote(shape: RouterShape, options: RoutingOptions) -> RoutingPolicy:
    keep = math.floor(options.des_beta * shape.num_experts + 1e-9)  # 0.29 * 100 is meant to be 29
    if not 1 <= keep <= shape.num_experts:
        raise ConfigError(
            f"des_beta is {options.des_beta:g}, which keeps {keep} of this model's {shape.num_experts} experts per "
            f"layer; choose {1 / shape.num_experts:.2g} to 1"
        )
    return DesVote(shape, keep)


def _block_capacity(shape: RouterShape, options: RoutingOptions) -> RoutingPolicy:
    if options.expert_capacity < 1:
        raise ConfigError(f"expert_capacity is {options.expert_capacity}, wanted at least 1 expert per block")
    return BlockCapacity(shape, min(options.expert_capacity, shape.num_experts))


def _check_count(option: str, count: int, shape: RouterShape) -> None:
    if not 1 <= count <= shape.num_experts:
        raise ConfigError(
            f"{option} is {count}, but this model has {shape.num_experts} experts per layer; "
            f"choose 1 to {shape.num_experts}"
        )


POLICIES: dict[str, Callable[[RouterShape, RoutingOptions], RoutingPolicy]] = {
    "original": _original,
    "top-k": _top_k,
    "dmoe": _dmoe,
    "des-seq": _des_seq,
    "des-vote": _des_vote,
    "block-capacity": _block_capacity,
}


def make_policy(name: str, shape: RouterShape, options: RoutingOptions | None = None) -> RoutingPolicy:
    """The policy called `name` for routers of this shape; raises `ConfigError` for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"routing is {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](shape, options or RoutingOptions())


def described(policy: RoutingPolicy) -> dict[str, Any]:
    """The policy's name and the numbers it was made with, for a record of what was run; the router's shape is the
    model's.
    """
    names: list[str] = [one.name for one in fields(policy)] if is_dataclass(policy) else []
    values = {name: getattr(policy, name) for name in names}
    return {"name": policy.name} | {name: value for name, value in values.items() if isinstance(value, int | float)}
