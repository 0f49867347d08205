"""Where every byte of a budget goes, decided before anything is loaded."""

from offload_engine.memory.footprint import DeviceKind, estimated_slab_bytes
from offload_engine.memory.machine import auto_budget, available_memory
from offload_engine.memory.plan import MemoryPlan, Setup
from offload_engine.memory.planner import MIN_SLOTS, plan_memory, score_bytes, smallest_budget

__all__ = [
    "MIN_SLOTS",
    "DeviceKind",
    "MemoryPlan",
    "Setup",
    "auto_budget",
    "available_memory",
    "estimated_slab_bytes",
    "plan_memory",
    "score_bytes",
    "smallest_budget",
]
