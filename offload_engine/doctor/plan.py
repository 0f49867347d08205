"""The memory plan of a model against what this machine has."""

from __future__ import annotations

from offload_engine.config import format_bytes
from offload_engine.doctor.finding import Finding, Level
from offload_engine.memory import MIN_SLOTS, MemoryPlan


def check_plan(plan: MemoryPlan, reachable: int | None, available: int) -> Finding:
    """`reachable`: bytes of fast memory a run could have, None for a device that isn't here; `available`: bytes of
    RAM, for the host tier of a GPU.
    """
    slots = f"{plan.slots} of {plan.all_experts} expert slots"
    found = f"{format_bytes(plan.total)} of fast memory, {slots}"
    if reachable is not None and plan.total > reachable:
        return Finding(
            "plan",
            f"{found}; this machine has {format_bytes(reachable)} to give",
            Level.PROBLEM,
            f"free memory, or set --gpu-mem to at most {reachable} bytes",
        )
    if plan.host_total > available:
        return Finding(
            "plan",
            f"{found}, and {format_bytes(plan.host_total)} of RAM, of which {format_bytes(available)} are available",
            Level.WARNING,
            f"free memory, or set --host-mem to at most {available} bytes",
        )
    if plan.slots <= MIN_SLOTS < plan.all_experts:
        return Finding("plan", f"{found}: every expert is fetched anew", Level.WARNING, "give --gpu-mem more")
    if plan.warnings:
        return Finding("plan", f"{found}; {plan.warnings[0]}", Level.WARNING)
    return Finding("plan", found)
