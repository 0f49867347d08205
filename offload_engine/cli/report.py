"""What a run says of itself: the plan in one line, the counters as a table, an answer as a JSON object."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from offload_engine.cli.terminal import note
from offload_engine.config import format_bytes

if TYPE_CHECKING:
    from offload_engine.core import Completion
    from offload_engine.engine.engine import Engine
    from offload_engine.memory import MemoryPlan
    from offload_engine.metrics import EngineStats


def plan_line(plan: MemoryPlan) -> str:
    """The plan as a user wants it who hasn't asked for more."""
    return (
        f"plan: {format_bytes(plan.total)} of {format_bytes(plan.budget)}: weights {format_bytes(plan.weights)}, "
        f"KV cache {format_bytes(plan.kv_cache)} for {plan.context} positions, "
        f"{format_bytes(plan.expert_slots)} for {plan.slots} of {plan.all_experts} experts "
        f"({plan.slots_per_layer:.1f} per layer), other {format_bytes(plan.workspace + plan.staging + plan.runtime)}"
    )


def announce(engine: Engine, *, whole_plan: bool) -> tuple[str, ...]:
    """Tell of the plan and of what the engine wants known, which is returned."""
    if whole_plan:
        note(engine.plan.table())  # which ends with the plan's warnings
    else:
        note(plan_line(engine.plan))
    notices = engine.notices
    for notice in notices:
        if not (whole_plan and notice in engine.plan.warnings):
            note(f"note: {notice}")
    return notices


def announce_later(engine: Engine, announced: Collection[str]) -> None:
    """Tell of what came up since `announced`."""
    for notice in engine.notices:
        if notice not in announced:
            note(f"note: {notice}")


def show_stats(stats: EngineStats) -> None:
    """All counters on stderr."""
    rows = _rows(stats)
    wide = max(len(name) for name, _ in rows)
    note("\n".join(f"{name:<{wide}}  {value}" for name, value in rows))


def _rows(stats: EngineStats) -> list[tuple[str, str]]:
    layers = ", ".join(
        f"{layer}: {total / count:.1f}" for layer, (total, count) in sorted(stats.unique_experts_by_layer.items())
    )
    forwards = ", ".join(f"{count} {phase}" for phase, count in stats.forwards.items())
    seconds = f"{stats.wall_seconds:.2f} s: prefill {stats.prefill_seconds:.2f}, denoise {stats.denoise_seconds:.2f}, "
    seconds += f"commit {stats.commit_seconds:.2f}; {stats.stall_seconds:.2f} of it stalled"
    return [
        ("prompts", f"{stats.prompts} ({stats.prompt_tokens} tokens)"),
        ("answers", f"{stats.new_tokens} tokens in {stats.blocks} blocks, {stats.denoise_steps} denoising steps"),
        ("forwards", forwards or "none"),
        ("time", seconds),
        (
            "expert requests",
            f"{stats.expert_requests}: {stats.hits} hits, {stats.late} late, {stats.misses} misses"
            + (f", {stats.computed_on_cpu} computed on the CPU" if stats.computed_on_cpu else ""),
        ),
        *_sharing(stats),
        (
            "prefetches",
            f"{stats.prefetches_issued}: {stats.prefetches_used} used, {stats.prefetches_wasted} wasted",
        ),
        ("transfers", f"{stats.loads} experts, {format_bytes(stats.bytes_moved)}; {stats.evictions} evictions"),
        *([("warmed", f"{stats.warmed} experts that earlier runs used most")] if stats.warmed else []),
        ("read from disk", format_bytes(stats.bytes_read)),
        ("unique experts", (layers and f"per layer, {layers}") or "none"),
    ]


def _sharing(stats: EngineStats) -> list[tuple[str, str]]:
    """By which times misses were divided between link and CPU, and how."""
    if not stats.copy_seconds or stats.cpu_share is None:
        return []
    copy, expert = 1000 * stats.copy_seconds, 1000 * stats.cpu_expert_seconds
    told = f"{stats.cpu_share:.1%} of what was missing; lately a copy took {copy:.3f} ms, an expert {expert:.3f} ms"
    return [("on the CPU", told)]


def as_json(completion: Completion, engine: Engine, source: str) -> dict[str, Any]:
    """One answer and what it took, ready for `json.dumps`."""
    return {
        "source": source,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "model": engine.config.model or "built-in",
        "routing": engine.routing_name,
        "stats": completion.stats.as_dict(),
        "plan": engine.plan.as_dict(),
    }
