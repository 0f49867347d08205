"""From a config to a memory plan: the budget asked for, or what the machine has and `dmoe tune` found worth taking."""

from __future__ import annotations

from dataclasses import replace

import psutil

from offload_engine.config import EngineConfig
from offload_engine.engine.placement import Gpu
from offload_engine.errors import MemoryBudgetError
from offload_engine.memory import MemoryPlan, Setup, auto_budget, available_memory, plan_memory
from offload_engine.model.config import ModelConfig

RUNTIME_STEP = 8 * 2**20
"""What the process takes is rounded up to this: no two runs measure the same."""


def plan_for(
    config: EngineConfig,
    model: ModelConfig,
    setup: Setup,
    gpu: Gpu | None = None,
    enough: int | None = None,
    held: MemoryPlan | None = None,
) -> MemoryPlan:
    """Divide the budget, or what the machine has; `enough` are slots beyond which auto takes none. `held`: the plan of
    an engine that is there already; what it has on the host beside a GPU stays. Raises `MemoryBudgetError`.
    """
    reachable = gpu.reachable() if gpu is not None else psutil.Process().memory_info().rss + available_memory()
    budget = auto_budget(reachable, setup.device) if config.gpu_mem == "auto" else config.gpu_mem
    host_mem = None if gpu is None else host_budget(config) if held is None else held.host_budget

    def plan(setup: Setup, budget: int = budget, context: int | None = config.max_context) -> MemoryPlan:
        return plan_memory(
            model,
            setup,
            budget,
            max_context=context,
            expert_mem=config.expert_mem,
            host_mem=host_mem,
            machine_limit=reachable,
        )

    def plan_with_enough(setup: Setup) -> MemoryPlan:
        whole = plan(setup)
        if config.gpu_mem != "auto" or enough is None or whole.slots <= enough:
            return whole
        return plan(setup, whole.fixed + enough * whole.slab_bytes, whole.context)

    if gpu is not None:
        return _held_by_host(plan_with_enough(setup)) if held is None else plan_with_enough(setup)
    try:
        return plan_with_enough(setup)
    except MemoryBudgetError as error:
        refusal = error
    # The next process may measure itself larger: nearly 60 MB where the libraries were not in the page cache when this
    # one touched them. The budget that the refusal names must do for it too, and be the only one that it names.
    plan(replace(setup, runtime_bytes=(setup.runtime_bytes or 0) + 8 * RUNTIME_STEP))
    raise refusal


def host_budget(config: EngineConfig) -> int | None:
    """Bytes of the host tier; None: there is none."""
    return auto_budget(available_memory(), "host") if config.host_mem == "auto" else config.host_mem


def _held_by_host(plan: MemoryPlan) -> MemoryPlan:
    """`plan`, if this machine has the RAM that it takes: pages of it can't be swapped. Raises `MemoryBudgetError`."""
    left = available_memory()
    if plan.host_total > left:
        raise MemoryBudgetError(
            f"host tier, its buffers and embedding table take {plan.host_total} bytes, but this machine has only "
            f"{left} to give; set host_mem to at most that, or to none to read experts from disk\n\n{plan.table()}"
        )
    return plan
