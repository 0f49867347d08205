"""A short run of the engine that records how a model routes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import choose_policy, find_source
from offload_engine.engine.engine import Engine
from offload_engine.evaluate.tasks import ARITHMETIC, make_task

PROMPTS = 32
STEPS = 96
"""After these no further prompt is answered."""
NEW_TOKENS = 128
"""Of each answer, at most."""
PROMPT_TOKENS = 64
"""Of a model without a tokenizer, whose prompts are random ids."""
ORIGINAL = "original"


def record(
    config: EngineConfig, directory: Path, told: Callable[[int, int], None] = lambda _done, _total: None
) -> list[Path]:
    """Traces of a few answers under original routing and, if it is another, under the routing of `config`.

    `told` hears after each step how many are recorded, and how many it will be about in all. Raises what loading and
    running a model raises.
    """
    own = choose_policy(config, find_source(config).config)[0].name
    routings = list(dict.fromkeys((ORIGINAL, own)))
    paths, before = [], 0
    for left, routing in zip(reversed(range(len(routings))), routings, strict=True):
        path, steps = directory / f"{routing}.jsonl", 0
        for steps in _record(config, routing, path):
            told(before + steps, before + max(steps, STEPS) + left * STEPS)
        before += steps
        paths.append(path)
    return paths


def _record(config: EngineConfig, routing: str, path: Path) -> Iterator[int]:
    """The steps recorded so far, as they are taken."""
    values = config.model_dump(exclude_unset=True) | {"routing": routing, "hot_set": "off", "tuned": "off"}
    with Engine.from_pretrained(config=EngineConfig(**values)) as engine:
        engine.record_trace(path)
        for prompt in _prompts(engine):
            for _event in engine.stream(prompt, SamplingParams(max_new_tokens=NEW_TOKENS)):
                yield engine.stats.denoise_steps
            if engine.stats.denoise_steps >= STEPS:
                return


def _prompts(engine: Engine) -> Iterator[str | list[int]]:
    if engine.tokenizer is not None:
        yield from (sample.question for sample in make_task(ARITHMETIC, n=PROMPTS).samples)
        return
    chance = random.Random(0)
    for _ in range(PROMPTS):
        yield [chance.randrange(engine.model_config.vocab_size) for _ in range(PROMPT_TOKENS)]
