"""What is analysed, with how much effort, and where it is kept."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import find_source
from offload_engine.engine.engine import Engine
from offload_engine.errors import UsageError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.evaluate.tasks import ARITHMETIC, Task, make_task
from offload_engine.model.config import ModelConfig

Role = Literal["base", "distilled"]

BLOCK = 32
"""LLaDA2's block length, in tokens."""
TIGHT_SHARE = 0.1
"""Share of all experts that the small expert cache of the measurements holds."""
SHORT_ANSWER = 256
"""Longest answer to a generated problem, in tokens; a right one has at most about 100."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How thoroughly the measurements measure, and which settings the evaluations visit."""

    prompts: int = 16
    """Prompts per timed round."""
    rounds: int = 7
    """Timed rounds; medians are taken over them."""
    sweep_counts: int = 16
    """Numbers of distinct experts tried."""
    sweep_repeats: int = 40
    mask_problems: int = 108
    """As many as in the paper's Fig. 3a."""
    mask_cases: int = 12
    """Experts left out per problem, for one token and for a whole block each."""
    top_ps: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8)
    floors: tuple[int, ...] = (8, 12, 16)
    """Smallest coresets to try beside the checkpoint's own."""
    block_lengths: tuple[int, ...] = (8, 16, 24, 32)
    betas: tuple[float, ...] = (0.05, 0.07, 0.10, 0.15, 0.20, 0.30)
    """DES-Vote's settings."""
    des_ks: tuple[int, ...] = (1, 2, 3)
    bonuses: tuple[float, ...] = (0.5, 2.0)
    holds: tuple[int, ...] = (2, 4)


QUICK = Effort(
    prompts=2,
    rounds=2,
    sweep_counts=5,
    sweep_repeats=3,
    mask_problems=6,
    mask_cases=6,
    top_ps=(0.5, 0.6, 0.8),
    floors=(8,),
    block_lengths=(16, 32),
    betas=(0.10, 0.15),
    bonuses=(2.0,),
    holds=(2,),
)
QUICK_SAMPLES = 12


@dataclass(frozen=True)
class Study:
    """One analysis: a distilled checkpoint, the base it came from, and the tasks they are compared on."""

    model: str | None
    """The distilled checkpoint; None: the built-in one."""
    base: str | None
    """What it was distilled from; None: there is none to be had, and `model` stands in for it."""
    out: Path
    tasks: tuple[str, ...] = (ARITHMETIC,)
    n: int | None = None
    """Samples per task; None: all of them."""
    data: dict[str, Path] = field(default_factory=dict)
    """Task -> file of its samples, where they don't come from the hub."""
    config_file: Path | None = None
    """TOML preset of the engine."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Fields of `EngineConfig` that hold for every run."""
    max_new_tokens: int | None = None
    tight_share: float = TIGHT_SHARE
    quick: bool = False

    @property
    def effort(self) -> Effort:
        """How thoroughly to measure."""
        return QUICK if self.quick else Effort()

    @property
    def has_base(self) -> bool:
        """Whether there is a base model apart from the distilled one."""
        return self.base is not None

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles whose models differ: one where no base model was given."""
        return ("base", "distilled") if self.has_base else ("distilled",)

    def played_by(self, role: Role) -> Role:
        """The one of `roles` whose model plays `role`."""
        return role if self.has_base else "distilled"

    def checkpoint(self, role: Role) -> str | None:
        """The checkpoint that plays `role`; None is the built-in one."""
        return self.base if role == "base" and self.base is not None else self.model

    def config(self, role: Role, **options: Any) -> EngineConfig:
        """The engine's options for the model that plays `role`."""
        return EngineConfig.build(self.config_file, **{"model": self.checkpoint(role), **self.engine, **options})

    def open(self, role: Role, **options: Any) -> Engine:
        """An engine with the model that plays `role`; close it."""
        return Engine.from_pretrained(config=self.config(role, **options))

    def sampling(self, block_length: int = BLOCK) -> SamplingParams:
        """The official decoding settings (REFERENCE §2), with another block length for Table 4."""
        return SamplingParams(max_new_tokens=self.longest, block_length=block_length)

    @property
    def longest(self) -> int:
        """Longest answer, in tokens."""
        short = all(task == ARITHMETIC for task in self.tasks)
        return self.max_new_tokens or (SHORT_ANSWER if short else SamplingParams().max_new_tokens)

    @cached_property
    def fingerprints(self) -> dict[Role, str]:
        """Role -> digest of its checkpoint."""
        return {role: fingerprint(find_source(self.config(role)).directory) for role in ("base", "distilled")}

    @cached_property
    def model_configs(self) -> dict[Role, ModelConfig]:
        """Role -> its checkpoint's config.json."""
        return {role: find_source(self.config(role)).config for role in ("base", "distilled")}

    def task(self, name: str) -> Task:
        """The task called `name`, with this study's number of samples. Raises `UsageError`."""
        if name not in self._tasks:
            self._tasks[name] = make_task(name, n=self.n, data=self.data.get(name))
        return self._tasks[name]

    @cached_property
    def _tasks(self) -> dict[str, Task]:
        return {}

    def prompts(self, count: int) -> list[str]:
        """The first `count` prompts of the first task, or all if it has fewer."""
        if self.tasks[0] == ARITHMETIC:
            return [sample.prompt for sample in make_task(ARITHMETIC, n=count).samples]
        return [sample.prompt for sample in self.task(self.tasks[0]).samples[:count]]

    def command(self, only: str | None = None) -> str:
        """The command line that carries out this study, or one section of it."""
        words = ["python", "-m", "tools.analyse"]
        for option, value in (("--model", self.model), ("--base", self.base), ("--config", self.config_file)):
            words += [option, str(value)] if value is not None else []
        for task in self.tasks:
            words += ["--task", task]
        for task, path in self.data.items():
            words += ["--data", f"{task}={path}"]
        for name, value in (("--n", self.n), ("--max-new-tokens", self.max_new_tokens), *self._engine_words()):
            words += [name, str(value)] if value is not None else []
        if self.tight_share != TIGHT_SHARE:
            words += ["--expert-share", str(self.tight_share)]
        words += ["--out", str(self.out)] + (["--quick"] if self.quick else []) + (["--only", only] if only else [])
        return shlex.join(words)

    def _engine_words(self) -> list[tuple[str, Any]]:
        return [(f"--{name.replace('_', '-')}", value) for name, value in self.engine.items()]


def check(study: Study) -> None:
    """Raises `UsageError` for tasks that don't exist, and for data of tasks that aren't asked for."""
    for task in study.data:
        if task not in study.tasks:
            raise UsageError(f"data is given for task {task!r}, which isn't among {', '.join(study.tasks)}")
    if not 0 < study.tight_share <= 1:
        raise UsageError(f"expert-share is {study.tight_share:g}; wanted a share of the experts above 0, up to 1")
    for task in study.tasks:
        study.task(task)
