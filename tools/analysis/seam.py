"""The one place where the analysis reaches into an engine: its network, its routing, its executor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from offload_engine.decode.threads import compute_threads
from offload_engine.engine.assembly import choose_policy
from offload_engine.engine.engine import Engine
from offload_engine.experts.observe import Watcher
from offload_engine.memory import score_bytes
from offload_engine.model.llada2 import LLaDA2Model
from offload_engine.model.moe import ExpertExecutor
from offload_engine.routing import RoutingPolicy

MOST_TOKENS = 4096
"""More at once is no faster."""


def network(engine: Engine) -> LLaDA2Model:
    """The model without its routed experts."""
    return engine._parts.model


def executor(engine: Engine) -> ExpertExecutor:
    """Runs the engine's routed experts, unobserved."""
    return engine._parts.experts


def routing_policy(engine: Engine) -> RoutingPolicy:
    """How the engine's answers are routed just now."""
    return engine._decoder.policy


def expert_bytes(engine: Engine) -> int:
    """Bytes of one expert as the checkpoint stores it."""
    store = engine._parts.store
    return store.payload_bytes(next(iter(store.keys())))


def threads(engine: Engine) -> int:
    """Threads that the engine computes with."""
    return engine._parts.threads or torch.get_num_threads()


def most_tokens(engine: Engine) -> int:
    """Tokens that one forward without a cache may have within the engine's memory plan; at least 1."""
    room = engine.plan.workspace + engine.plan.spare
    fits = (tokens for tokens in (MOST_TOKENS >> halving for halving in range(12)) if _score(engine, tokens) <= room)
    return next(fits, 1)


def _score(engine: Engine, tokens: int) -> int:
    return score_bytes(engine.model_config, engine._parts.setup, tokens)


def parameters(engine: Engine) -> int:
    """Weights of the whole model, routed experts included."""
    config, resident = engine.model_config, sum(weight.numel() for weight in network(engine).parameters())
    one = 3 * config.hidden_size * config.moe_intermediate_size
    return resident + one * config.num_experts * len(config.moe_layers)


@contextmanager
def threads_of(engine: Engine) -> Iterator[None]:
    """Compute with the threads that the engine's own forwards use."""
    with compute_threads(engine._parts.threads):
        yield


@contextmanager
def watching(engine: Engine, watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of every routing decision of the answers generated in the body."""
    watchers = engine._observed.watchers
    watchers.append(watcher)
    try:
        yield
    finally:
        watchers.remove(watcher)


@contextmanager
def running_experts_by(engine: Engine, wrap: Callable[[ExpertExecutor], ExpertExecutor]) -> Iterator[None]:
    """Let `wrap(executor)` run the experts of the answers generated in the body."""
    before = engine._decoder.experts
    engine._decoder.experts = wrap(before)
    try:
        yield
    finally:
        engine._decoder.experts = before


@contextmanager
def one_block_per_forward(engine: Engine) -> Iterator[None]:
    """Commit blocks in forwards of their own, so that a denoising forward is about one block alone."""
    before = engine._decoder.fused_commit
    engine._decoder.fused_commit = False
    try:
        yield
    finally:
        engine._decoder.fused_commit = before


@contextmanager
def routed(engine: Engine, **options: object) -> Iterator[None]:
    """Route the answers generated in the body by these fields of `EngineConfig` instead of the engine's own."""
    before = engine._decoder.policy
    config = engine.config.model_copy(update=options)
    engine._decoder.policy = choose_policy(config, engine.model_config)[0]
    try:
        yield
    finally:
        engine._decoder.policy = before
