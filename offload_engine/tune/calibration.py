"""A short run of the engine that records how a model routes."""

from __future__ import annotations

import random
from collections.abc import Iterator
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


def record(config: EngineConfig, directory: Path) -> list[Path]:
    """Traces of a few answers under original routing and, if it is another, under the routing of `config`.

    Raises what loading and running a model raises.
    """
    own = choose_policy(config, find_source(config).config)[0].name
    return [_record(config, routing, directory) for routing in dict.fromkeys((ORIGINAL, own))]


def _record(config: EngineConfig, routing: str, directory: Path) -> Path:
    path = directory / f"{routing}.jsonl"
    values = config.model_dump(exclude_unset=True) | {"routing": routing, "hot_set": "off", "tuned": "off"}
    with Engine.from_pretrained(config=EngineConfig(**values)) as engine:
        engine.record_trace(path)
        steps = 0
        for prompt in _prompts(engine):
            steps += engine.generate(prompt, SamplingParams(max_new_tokens=NEW_TOKENS)).stats.denoise_steps
            if steps >= STEPS:
                break
    return path


def _prompts(engine: Engine) -> Iterator[str | list[int]]:
    if engine.tokenizer is not None:
        yield from (sample.question for sample in make_task(ARITHMETIC, n=PROMPTS).samples)
        return
    chance = random.Random(0)
    for _ in range(PROMPTS):
        yield [chance.randrange(engine.model_config.vocab_size) for _ in range(PROMPT_TOKENS)]
