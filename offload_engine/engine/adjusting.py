"""What may be changed of an engine between two answers: how large its expert cache is, and how it routes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from offload_engine.config import EngineConfig
from offload_engine.engine import assembly
from offload_engine.engine.assembly import Parts, choose_policy
from offload_engine.engine.planning import plan_for
from offload_engine.errors import UsageError
from offload_engine.memory import MemoryPlan
from offload_engine.metrics import EngineStats, reset_peak
from offload_engine.routing import RoutingPolicy, SituatedCoreset


def changed(config: EngineConfig, **options: Any) -> EngineConfig:
    """`config` with these options, None meaning that one stays as it is. Raises `ConfigError`."""
    given = {name: value for name, value in options.items() if value is not None}
    return EngineConfig(**config.model_dump(exclude_unset=True) | given)


def resize(
    wanted: EngineConfig,
    config: EngineConfig,
    parts: Parts,
    stats: EngineStats,
    adopt: Callable[[EngineConfig, Parts], None],
) -> None:
    """Give the expert cache of `parts` the slots that the budgets of `wanted` come to, where it had those of `config`.

    `adopt` is told what is in force: `wanted` and parts with the new plan, or once more what there was, where the cache
    still has its slots; `stats` are told as well, whatever is raised. Everything else is as it was planned. While the
    slots on a GPU are replaced, they take no more than the larger of both budgets leaves them. Raises
    `MemoryBudgetError`, with nothing changed, where a budget doesn't hold the plan or the system refuses the memory;
    `UsageError` while somebody holds on to some of it.
    """
    before = parts.plan
    settings = wanted.model_copy(update={"max_context": before.context})
    plan = plan_for(settings, parts.source.config, parts.setup, parts.gpu, held=before)
    changed_parts = replace(parts, plan=plan)
    try:
        adopt(wanted, changed_parts)  # ahead: between the change and this, an interrupt might come
        if plan.slots != before.slots:
            parts.experts.resize(plan.slots, max(plan.budget, before.budget) - plan.fixed)
            if assembly.keeps_hot_set(wanted) and not parts.experts.scheduler.warming:
                parts.experts.warm_up()
            _reset_peak(parts, shrinks=plan.slots < before.slots)
        tell_plan(stats, plan)
    except BaseException:
        done = parts.experts.arena.slots == plan.slots
        adopt(wanted if done else config, changed_parts if done else parts)
        tell_plan(stats, plan if done else before)
        raise


def tell_plan(stats: EngineStats, plan: MemoryPlan) -> None:
    """Have `stats` say what is planned."""
    stats.planned_peak_bytes, stats.limit_bytes = plan.total, plan.budget
    stats.slots, stats.slots_per_layer = plan.slots, plan.slots_per_layer


def _reset_peak(parts: Parts, *, shrinks: bool) -> None:
    """What the peak was with a larger cache, or with two of them, is no business of the new plan."""
    if parts.gpu is not None:
        parts.gpu.reset_peak()
    elif shrinks:
        reset_peak()


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
