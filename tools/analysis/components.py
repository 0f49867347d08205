"""Where the time of a denoising step goes: MoE, attention, everything else (paper §3, Fig. 2a and b)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from offload_engine.core import ForwardInfo, Phase, RoutingDecision, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.model.moe import Beside, Decide, ExpertExecutor, MoEBlock, Preview, nothing
from tools.analysis import seam

Clock = Callable[[], float]


class MoECall(NamedTuple):
    """One MoE layer of one denoising forward."""

    layer: int
    unique: int
    """Distinct experts its tokens chose."""
    seconds: float
    """Router and experts, waiting for transfers included."""


@dataclass(slots=True)
class Breakdown:
    """Seconds of denoising forwards."""

    forwards: int = 0
    moe: float = 0.0
    """Routers, experts, shared experts, transfers waited for, and the choice of what to prefetch."""
    attention: float = 0.0
    """Attention with its projections, norms of queries and keys, rotary embedding and KV cache."""
    total: float = 0.0
    """As the engine counts it: embedding, layers, head and the choice of tokens."""
    calls: list[MoECall] = field(default_factory=list)

    @property
    def other(self) -> float:
        """What is neither: embedding, norms, dense layers, head, sampling."""
        return self.total - self.moe - self.attention


class _TimedExperts:
    """An `ExpertExecutor` that times the prefetch decisions of another, and counts distinct experts."""

    def __init__(self, experts: ExpertExecutor, probe: _Probe) -> None:
        self.experts, self.probe = experts, probe

    def begin(self, info: ForwardInfo) -> None:
        self.probe.active = info.phase is Phase.DENOISE
        self.probe.breakdown.forwards += self.probe.active
        self.experts.begin(info)

    def prepare(self, layer: int, preview: Preview) -> None:
        began = self.probe.clock()
        self.experts.prepare(layer, preview)
        if self.probe.active:
            self.probe.breakdown.moe += self.probe.clock() - began

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:
        return self.experts.route(layer, hidden, decide)

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:  # noqa: ARG002
        out = self.experts.run(layer, hidden, decision)  # what is beside them is no time of theirs
        self.probe.routed = decision
        return out

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        return self.experts.sweep(layer, hidden, decision, rows)


@dataclass(slots=True)
class _Probe:
    """What the hooks of one measurement share."""

    clock: Clock
    breakdown: Breakdown = field(default_factory=Breakdown)
    active: bool = False
    """Whether the forward under way is a denoising one."""
    began: float = 0.0
    routed: RoutingDecision | None = None

    def enter(self, _module: nn.Module, _arguments: tuple[Any, ...]) -> None:
        self.began = self.clock()

    def leave_attention(self, _module: nn.Module, _arguments: tuple[Any, ...], _out: Tensor) -> None:
        if self.active:
            self.breakdown.attention += self.clock() - self.began

    def leave_moe(self, module: nn.Module, _arguments: tuple[Any, ...], _out: Tensor) -> None:
        if not self.active:
            return
        seconds = self.clock() - self.began
        assert isinstance(module, MoEBlock)
        assert self.routed is not None
        distinct = self.routed.experts.unique()
        self.breakdown.moe += seconds
        self.breakdown.calls.append(MoECall(module.layer, int((distinct >= 0).sum()), seconds))


@contextmanager
def timed_components(engine: Engine, clock: Clock = time.perf_counter) -> Iterator[Breakdown]:
    """Split the denoising forwards of the answers generated in the body; complete once the body has ended."""
    probe, model = _Probe(clock), seam.network(engine)
    hooks = []
    for layer in model.layers:
        hooks.append(layer.attention.register_forward_pre_hook(probe.enter))
        hooks.append(layer.attention.register_forward_hook(probe.leave_attention))
        if isinstance(layer.mlp, MoEBlock):
            hooks.append(layer.mlp.register_forward_pre_hook(probe.enter))
            hooks.append(layer.mlp.register_forward_hook(probe.leave_moe))
    before = engine.stats.denoise_seconds
    try:
        timed = seam.running_experts_by(engine, lambda experts: _TimedExperts(experts, probe))
        with timed, seam.one_block_per_forward(engine):
            yield probe.breakdown
    finally:
        for hook in hooks:
            hook.remove()
        probe.breakdown.total = engine.stats.denoise_seconds - before


def answer_all(engine: Engine, prompts: Sequence[str], params: SamplingParams) -> Breakdown:
    """Answer `prompts` one after the other, timed."""
    with timed_components(engine) as breakdown:
        for prompt in prompts:
            engine.generate(prompt, params)
    return breakdown
