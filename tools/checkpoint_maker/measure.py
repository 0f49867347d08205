"""What the weights of a checkpoint make of routing, found by running the engine on it."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import torch

from offload_engine.core import Phase, SamplingParams
from offload_engine.engine import Engine
from offload_engine.trace import TraceRecord, read_trace

BLOCK, STEPS = 32, 8
PROMPT = 128
"""Tokens of the prompt: as far as layer 0 looks back from the answer."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Routing over the denoising steps of one answer; means over layers, steps and blocks."""

    routing: str
    unique_experts: float
    """Distinct experts of a block in a layer (REFERENCE §3)."""
    similarity: float
    """Jaccard index of what a layer chose in a step and in the next one of the same block."""
    variation: float
    """Coefficient of variation of a layer's distinct experts over steps and blocks."""
    distinct_tokens: int
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.routing}: {self.unique_experts:.1f} unique experts per layer (CV {self.variation:.1%}), "
            f"adjacent-step similarity {self.similarity:.3f}, {self.distinct_tokens} different tokens of {self.tokens}"
        )


def measure(directory: Path, blocks: int, gpu_mem: str, seed: int = 0) -> Iterator[Measured]:
    """Answer a prompt of random tokens with `blocks` blocks of 8 steps, greedily, by original and by dMoE routing.

    `directory` holds a checkpoint with MoE layers. Raises the engine's errors, `MemoryBudgetError` among them.
    """
    params = SamplingParams(max_new_tokens=blocks * BLOCK, block_length=BLOCK, steps=STEPS, threshold=1.0)
    for routing in ("original", "dmoe"):
        with (
            tempfile.TemporaryDirectory() as folder,
            Engine.from_pretrained(
                directory, gpu_mem=gpu_mem, routing=routing, max_context=PROMPT + blocks * BLOCK, hot_set="off"
            ) as engine,
        ):
            trace = Path(folder) / "trace.jsonl"
            engine.record_trace(trace, BLOCK)
            drawn = torch.Generator().manual_seed(seed)
            prompt = torch.randint(engine.model_config.vocab_size, (PROMPT,), generator=drawn).tolist()
            answer = engine.generate(prompt, params).token_ids
            engine.close_trace()
            _header, records = read_trace(trace)
            yield summarise(routing, records, answer)


def summarise(routing: str, records: Iterable[TraceRecord], answer: list[int]) -> Measured:
    """The statistics of an answer's denoising records."""
    chosen: dict[int, dict[int, list[set[int]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.phase is Phase.DENOISE:
            chosen[record.layer][record.block].append(set(record.experts))
    counts = [[len(step) for steps in blocks.values() for step in steps] for blocks in chosen.values()]
    overlaps = [
        len(before & after) / len(before | after)
        for blocks in chosen.values()
        for steps in blocks.values()
        for before, after in pairwise(steps)
    ]
    return Measured(
        routing,
        unique_experts=fmean(fmean(layer) for layer in counts),
        similarity=fmean(overlaps),
        variation=fmean(pstdev(layer) / fmean(layer) for layer in counts),
        distinct_tokens=len(set(answer)),
        tokens=len(answer),
    )
