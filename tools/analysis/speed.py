"""End-to-end latency of routings, taken turn by turn on the same prompts (paper §5.2, Fig. 5b).

In each round every routing answers all prompts once, and is compared with the original one of its own round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from tools.analysis import seam
from tools.analysis.components import timed_components
from tools.analysis.runs import Run, baselines, dmoe
from tools.analysis.study import Role, Study
from tools.analysis.turns import take_turns


def compared(study: Study) -> list[Run]:
    """The routings whose speed is compared."""
    return [*baselines(study.effort), dmoe(0.6), dmoe(0.5)]


def compare_speed(study: Study, cache: str, options: dict[Role, dict[str, Any]]) -> dict[str, Any]:
    """Per routing and round, what answering all prompts once took; `options` are each model's own engine options, and
    `cache` is what they are called on stderr.
    """
    runs = {run.name: run for run in compared(study)}
    prompts, params = study.prompts(study.effort.prompts), study.sampling()
    taken = take_turns(
        study,
        f"speed, {cache} cache",
        options,
        list(runs),
        lambda name: runs[name].role,
        lambda engine, name: _round(engine, runs[name], prompts, params),
    )
    return {"prompts": len(prompts), "slots": taken.slots, "rounds": taken.rounds}


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
