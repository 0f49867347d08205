"""What may be changed of an engine between two answers: how large its expert cache is, and how it routes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from offload_engine.config import EngineConfig
from offload_engine.engine import assembly
from offload_engine.engine.assembly import Parts, choose_policy
from offload_engine.engine.planning import plan_for
from offload_engine.errors import UsageError
from offload_engine.metrics import EngineStats, reset_peak
from offload_engine.routing import RoutingPolicy, SituatedCoreset


def changed(config: EngineConfig, **options: Any) -> EngineConfig:
    """`config` with these options, None meaning that one stays as it is. Raises `ConfigError`."""
    given = {name: value for name, value in options.items() if value is not None}
    return EngineConfig(**config.model_dump(exclude_unset=True) | given)


def resize(config: EngineConfig, parts: Parts, stats: EngineStats) -> Parts:
    """Give the expert cache of `parts` the slots that the budgets of `config` come to, and tell `stats`.

    Everything else is as it was planned. Raises `MemoryBudgetError`, with nothing changed, where a budget doesn't hold
    it or the system refuses the memory; `DeviceError` for slots on a GPU.
    """
    wanted = config.model_copy(update={"max_context": parts.plan.context})
    plan = plan_for(wanted, parts.source.config, parts.setup, parts.gpu)
    shrinks = plan.slots < parts.plan.slots
    if plan.slots != parts.plan.slots:
        parts.experts.resize(plan.slots)
        if assembly.keeps_hot_set(config):
            parts.experts.warm_up()
    stats.planned_peak_bytes, stats.limit_bytes = plan.total, plan.budget
    stats.slots, stats.slots_per_layer = plan.slots, plan.slots_per_layer
    if shrinks and parts.gpu is None:
        reset_peak()  # what it was with the larger cache is no business of the new plan
    return replace(parts, plan=plan)


def reroute(config: EngineConfig, parts: Parts) -> tuple[RoutingPolicy, list[str]]:
    """The policy that `config` asks for, and what the user should know of it.

    Raises `ConfigError`, and `UsageError` for one whose tokens go to more experts than the memory plan allows for.
    """
    model = parts.source.config
    policy, notices = choose_policy(config, model)
    planned = parts.setup.choices or model.num_experts_per_tok
    if policy.name == "top-k" and config.top_k_experts > planned:
        raise UsageError(
            f"top_k_experts is {config.top_k_experts}, but the memory plan allows for {planned} experts per token; "
            "choose fewer, or make another engine with routing top-k"
        )
    if isinstance(policy, SituatedCoreset):
        policy = replace(policy, residents=parts.experts.residents)
    return policy, notices
