"""What the weights of a checkpoint make of routing, found by running the engine on it."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean, pstdev

import torch

from offload_engine.core import Phase, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.trace import TraceRecord, read_trace

BLOCK, STEPS = 32, 8
PROMPT = 128
"""Tokens of a prompt: further than layer 0 looks back from the answer."""
PROMPTS = 2

Steps = list[set[int]]
"""What a layer chose in each step of a block."""
Blocks = dict[tuple[int, int], Steps]
"""What a layer chose, by sequence and block, in order."""


@dataclass(frozen=True, slots=True)
class Measured:
    """Routing over the denoising steps of some answers; means over layers, steps, blocks and answers."""

    routing: str
    unique_experts: float
    """Distinct experts of a block in a layer (REFERENCE §3)."""
    similarity: float
    """Jaccard index of what a layer chose in a step and in the next one of the same block."""
    variation: float
    """Coefficient of variation of a layer's distinct experts over steps and blocks."""
    adjacent_blocks: float | None
    """Jaccard index of what a layer chose in the first steps of a block and of the next; None of single blocks."""
    prompts: float | None
    """Jaccard index of what a layer chose in the first steps of the first blocks of two answers; None of one answer."""
    union: float
    """Distinct experts of a layer in all steps of an answer."""
    distinct_tokens: int
    tokens: int

    def __str__(self) -> str:
        found = [
            f"{self.unique_experts:.1f} unique experts per layer (CV {self.variation:.1%})",
            f"{self.union:.1f} in an answer",
            f"adjacent-step similarity {self.similarity:.3f}",
        ]
        for what, similarity in (("adjacent blocks", self.adjacent_blocks), ("different prompts", self.prompts)):
            if similarity is not None:
                found.append(f"of {what}' first steps {similarity:.3f}")
        found.append(f"{self.distinct_tokens} different tokens of {self.tokens}")
        return f"{self.routing}: {', '.join(found)}"


def measure(directory: Path, blocks: int, gpu_mem: str, seed: int = 0) -> Iterator[Measured]:
    """Answer prompts of random tokens with `blocks` blocks of 8 steps, greedily, by original and by dMoE routing.

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
            prompts = torch.randint(engine.model_config.vocab_size, (PROMPTS, PROMPT), generator=drawn).tolist()
            answers = [token for prompt in prompts for token in engine.generate(prompt, params).token_ids]
            engine.close_trace()
            _header, records = read_trace(trace)
            yield summarise(routing, records, answers)


def summarise(routing: str, records: Iterable[TraceRecord], answers: list[int]) -> Measured:
    """The statistics of denoising records, and of all tokens of their answers."""
    chosen: dict[int, Blocks] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.phase is Phase.DENOISE:
            chosen[record.layer][record.sequence, record.block].append(set(record.experts))
    layers = list(chosen.values())
    counts = [[len(step) for steps in blocks.values() for step in steps] for blocks in layers]
    pairs = [pair for blocks in layers for steps in blocks.values() for pair in pairwise(steps)]
    return Measured(
        routing,
        unique_experts=fmean(fmean(layer) for layer in counts),
        similarity=fmean(map(_jaccard, pairs)),
        variation=fmean(pstdev(layer) / fmean(layer) for layer in counts),
        adjacent_blocks=_mean([pair for blocks in layers for pair in _successions(blocks)]),
        prompts=_mean([pair for blocks in layers for pair in combinations(_openings(blocks), 2)]),
        union=fmean(len(experts) for blocks in layers for experts in _unions(blocks)),
        distinct_tokens=len(set(answers)),
        tokens=len(answers),
    )


Pair = tuple[set[int], set[int]]


def _jaccard(pair: Pair) -> float:
    one, other = pair
    return len(one & other) / len(one | other)


def _mean(pairs: list[Pair]) -> float | None:
    return fmean(map(_jaccard, pairs)) if pairs else None


def _successions(blocks: Blocks) -> list[Pair]:
    """First steps of each block and of the next one of its sequence."""
    return [(blocks[one][0], blocks[other][0]) for one, other in pairwise(blocks) if other == (one[0], one[1] + 1)]


def _openings(blocks: Blocks) -> list[set[int]]:
    """The first step of each sequence."""
    first = {sequence: steps[0] for (sequence, _block), steps in reversed(blocks.items())}
    return list(first.values())


def _unions(blocks: Blocks) -> list[set[int]]:
    """What each sequence chose in all."""
    sequences: dict[int, set[int]] = defaultdict(set)
    for (sequence, _block), steps in blocks.items():
        sequences[sequence].update(*steps)
    return list(sequences.values())
