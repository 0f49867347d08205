"""Timings of two models, turn by turn: in every round each model is opened alone, warmed up and measured.

Two engines at once would each have to do with half the memory. Timings drift with whatever else the machine does, so
models and settings come in an order shuffled anew in every round, and are compared within a round.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from offload_engine.cli.progress import RUNS, Progress
from offload_engine.cli.terminal import note
from offload_engine.engine.engine import Engine
from offload_engine.errors import OffloadError
from tools.analysis.study import Role, Study

Setting = TypeVar("Setting", bound=Hashable)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Turns(Generic[Setting, Result]):
    """What was measured."""

    slots: int
    """Experts that the cache held, the same number for every model."""
    rounds: dict[Setting, list[Result]]


def take_turns(
    study: Study,
    what: str,
    cache: dict[Role, dict[str, Any]],
    settings: Sequence[Setting],
    role_of: Callable[[Setting], Role],
    measure: Callable[[Engine, Setting], Result],
) -> Turns[Setting, Result]:
    """Measure every setting once in each of the study's rounds, on its own model; `cache` holds each model's engine
    options, `what` names it all on stderr. Raises `OffloadError` where memory has become too scarce for equal caches.
    """
    slots, cache = _equal_caches(study, cache)
    rng, rounds = random.Random(0), study.effort.rounds
    found: dict[Setting, list[Result]] = {setting: [] for setting in settings}
    with Progress(f"  {what}", rounds * len(settings), RUNS, still=True) as progress:
        for number in range(1, rounds + 1):
            for role in rng.sample(study.roles, len(study.roles)):
                mine = [setting for setting in settings if study.played_by(role_of(setting)) == role]
                with study.open(role, routing="original", **cache[role]) as engine:
                    _require(engine, slots)
                    for prompt in study.prompts(study.effort.prompts):  # warms up caches, allocator and clock rate
                        engine.generate(prompt, study.sampling())
                    for setting in rng.sample(mine, len(mine)):
                        found[setting].append(measure(engine, setting))
                        progress.show(progress.done + 1, f"round {number} of {rounds}")
    note(progress.line())
    return Turns(slots, found)


def _equal_caches(study: Study, cache: dict[Role, dict[str, Any]]) -> tuple[int, dict[Role, dict[str, Any]]]:
    """As many slots as every model can have, and the engine options that give them."""
    plans = {}
    for role in study.roles:
        with study.open(role, routing="original", **cache[role]) as engine:
            plans[role] = engine.plan
    slots = min(plan.slots for plan in plans.values())
    scarce = any(plan.slots < plan.all_experts and "expert_mem" not in cache[role] for role, plan in plans.items())
    if scarce and study.config("base").gpu_mem == "auto":
        slots = max(1, slots * 9 // 10)  # free memory comes and goes, and every round must find enough
    return slots, {role: {**cache[role], "expert_mem": slots * plan.slab_bytes} for role, plan in plans.items()}


def _require(engine: Engine, slots: int) -> None:
    if engine.plan.slots != slots:
        raise OffloadError(
            f"{engine.config.model or 'built-in'}: its expert cache holds {engine.plan.slots} experts, but {slots} at "
            "the start of the measurement; memory has become scarce: run the same command again, or say --gpu-mem"
        )
