"""Routing policies: which experts the tokens of a block go to. Pure functions of router logits.

To add a policy, write it in a module of its own and enter a builder for it in `POLICIES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from offload_engine.errors import ConfigError
from offload_engine.routing.base import RouterShape, RoutingPolicy
from offload_engine.routing.coreset import Coreset
from offload_engine.routing.topk import TopK

__all__ = ["POLICIES", "Coreset", "RouterShape", "RoutingOptions", "RoutingPolicy", "TopK", "make_policy"]


@dataclass(frozen=True, slots=True)
class RoutingOptions:
    """The parameters of all policies together; each policy reads its own."""

    top_p: float = 0.6
    """dMoE: share of the block's votes that the coreset passes (paper, Table 3)."""
    min_experts: int = 16
    """dMoE: smallest coreset (16 in the paper's second version, 12 in its first)."""
    top_k_experts: int = 4
    """top-k: experts per token (paper, Table 2, row Top-4)."""


def _original(shape: RouterShape, _options: RoutingOptions) -> RoutingPolicy:
    return TopK(shape, shape.top_k, name="original")


def _top_k(shape: RouterShape, options: RoutingOptions) -> RoutingPolicy:
    if not 1 <= options.top_k_experts <= shape.num_experts:
        raise ConfigError(
            f"top_k_experts is {options.top_k_experts}, but this model has {shape.num_experts} experts per layer; "
            f"choose 1 to {shape.num_experts}"
        )
    return TopK(shape, options.top_k_experts)


def _dmoe(shape: RouterShape, options: RoutingOptions) -> RoutingPolicy:
    return Coreset(shape, options.top_p, min(options.min_experts, shape.num_experts))


POLICIES: dict[str, Callable[[RouterShape, RoutingOptions], RoutingPolicy]] = {
    "original": _original,
    "top-k": _top_k,
    "dmoe": _dmoe,
}


def make_policy(name: str, shape: RouterShape, options: RoutingOptions | None = None) -> RoutingPolicy:
    """The policy called `name` for routers of this shape; raises `ConfigError` for an unknown name."""
    if name not in POLICIES:
        raise ConfigError(f"routing is {name!r}; choose one of {', '.join(POLICIES)}")
    return POLICIES[name](shape, options or RoutingOptions())
