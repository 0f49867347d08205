"""End-to-end latency of routings, taken turn by turn in one run on the same prompts (paper §5.2, Fig. 5b).

Timings drift with whatever else the machine does, so each round lets every routing answer all prompts once, in an order
shuffled anew, and a routing is compared with the original one of its own round.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from offload_engine.core import SamplingParams
from offload_engine.engine import Engine
from tools.analysis import seam
from tools.analysis.components import timed_components
from tools.analysis.runs import Run, baselines, dmoe
from tools.analysis.study import Role, Study


def compared(study: Study) -> list[Run]:
    """The routings whose speed is compared."""
    return [*baselines(study.effort), dmoe(0.6), dmoe(0.5)]


def compare_speed(study: Study, options: dict[Role, dict[str, Any]]) -> dict[str, Any]:
    """Per routing and round, what answering all prompts once took; `options` are each model's own engine options."""
    runs, effort = compared(study), study.effort
    prompts, params = study.prompts(effort.prompts), study.sampling()
    rounds: dict[str, list[dict[str, float]]] = {run.name: [] for run in runs}
    rng = random.Random(0)
    with ExitStack() as stack:
        engines = {role: stack.enter_context(study.open(role, **options[role])) for role in options}
        slots = {role: engine.plan.slots for role, engine in engines.items()}
        for number in range(effort.rounds + 1):
            for run in rng.sample(runs, len(runs)):
                spent = _round(engines[run.role], run, prompts, params)
                if number:  # the first round warms up
                    rounds[run.name].append(spent)
    return {"prompts": len(prompts), "slots": slots, "rounds": rounds}


def _round(engine: Engine, run: Run, prompts: Sequence[str], params: SamplingParams) -> dict[str, float]:
    with seam.routed(engine, **run.routing):
        engine.generate(prompts[0], params)  # the expert cache still holds what the routing before wanted
        before, began = engine.stats.snapshot(), time.perf_counter()
        with timed_components(engine) as parts:
            for prompt in prompts:
                engine.generate(prompt, params)
        seconds, stats = time.perf_counter() - began, engine.stats.since(before)
    return {
        "seconds": seconds,
        "tokens": stats.new_tokens,
        "steps": stats.denoise_steps,
        "denoise_seconds": parts.total,
        "moe_seconds": parts.moe,
        "attention_seconds": parts.attention,
        "bytes_moved": stats.bytes_moved,
        "stall_seconds": stats.stall_seconds,
    }
