"""MoE latency as the number of distinct experts grows and the arithmetic stays the same (paper §3, Fig. 2c).

The same hidden states of one real denoising forward go through one MoE block under routings made up for the purpose:
every token has its k experts, all together use exactly U of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offload_engine.core import ForwardInfo, Phase, RoutingDecision, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.model.llada2 import Forward
from offload_engine.model.moe import MoEBlock
from tools.analysis import seam
from tools.analysis.components import Clock


class Point(NamedTuple):
    """One timed pass through a MoE block."""

    unique: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Fixed:
    """A `RoutingPolicy` that always decides the same."""

    decision: RoutingDecision
    name: str = "fixed"

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:  # noqa: ARG002
        return self.decision


def spread(tokens: int, top_k: int, pool: Sequence[int]) -> RoutingDecision:
    """Every one of `tokens` goes to `top_k` distinct experts of `pool`, equally weighted, and every expert of `pool` is
    used: `len(pool)` must be between `top_k` and `tokens * top_k`.
    """
    if not top_k <= len(pool) <= tokens * top_k:
        raise ValueError(f"{len(pool)} experts can't serve {tokens} tokens of {top_k} choices each, all of them used")
    choices = torch.arange(tokens * top_k) % len(pool)
    experts = torch.tensor(pool)[choices].view(tokens, top_k)
    return RoutingDecision(experts, torch.full(experts.shape, 1 / top_k))


def hidden_states(engine: Engine, layer: int, prompt: str | list[int], params: SamplingParams) -> Tensor:
    """What `layer`'s MoE block gets in the last denoising forward of an answer: [block, H]."""
    model = seam.network(engine)
    found: list[Tensor] = []
    denoising = False

    def enter_model(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        nonlocal denoising
        forward = arguments[1]
        assert isinstance(forward, Forward)
        denoising = forward.info.phase is Phase.DENOISE

    def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if denoising:
            found[:] = [arguments[0].clone()]

    hooks = [model.register_forward_pre_hook(enter_model), model.layers[layer].mlp.register_forward_pre_hook(keep)]
    try:
        with seam.one_block_per_forward(engine):
            engine.generate(prompt, params)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0]


def unique_counts(experts: int, top_k: int, tokens: int, steps: int) -> list[int]:
    """About `steps` numbers of distinct experts, evenly from the fewest possible to the most."""
    most = min(experts, tokens * top_k)
    return sorted({round(top_k + (most - top_k) * i / (steps - 1)) for i in range(steps)})


def sweep(
    engine: Engine,
    layer: int,
    hidden: Tensor,
    counts: Sequence[int],
    *,
    repeats: int,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> list[Point]:
    """Time `layer`'s MoE block `repeats` times for every number of distinct experts in `counts`.

    Which experts they are is drawn afresh each time, and the counts come in shuffled order, so that neither a warm
    cache nor a busy moment falls on one count alone.
    """
    block, experts = seam.network(engine).layers[layer].mlp, seam.executor(engine)
    assert isinstance(block, MoEBlock)
    config, tokens = engine.model_config, hidden.shape[0]
    rng, ids = random.Random(seed), torch.zeros(tokens, dtype=torch.int64)
    order = [count for count in counts for _ in range(repeats)]
    rng.shuffle(order)
    points = []
    with torch.inference_mode(), seam.threads_of(engine):
        for turn, count in enumerate([max(counts)] * 2 + order):  # the first two warm up
            pool = rng.sample(range(config.num_experts), count)
            policy = _Fixed(spread(tokens, config.num_experts_per_tok, pool))
            experts.begin(ForwardInfo(Phase.SCORE))
            began = clock()
            block(hidden, ids, policy, experts)
            seconds = clock() - began
            if turn >= 2:
                points.append(Point(count, seconds))
    return points
