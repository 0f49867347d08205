"""The one place where the benchmark reaches into an engine: it times the parts and notes what they are asked."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from offload_engine.bench.overlap import Interval, LayerRun, Transfer
from offload_engine.config import EngineConfig
from offload_engine.core import ExpertKey, ForwardInfo, RoutingDecision
from offload_engine.decode.block_diffusion import BlockDiffusionDecoder
from offload_engine.engine.assembly import assemble
from offload_engine.engine.engine import Engine
from offload_engine.experts.transfer.base import Stream, TransferTicket
from offload_engine.metrics import EngineStats
from offload_engine.model import llada2
from offload_engine.model.llada2 import DecoderLayer, LLaDA2Model
from offload_engine.model.moe import Beside, Decide, ExpertExecutor, ExpertOutputs, MoEBlock, Preview, nothing

Callback = Callable[..., Any]


class StallStats(EngineStats):
    """`EngineStats` that keeps the time of every stall it is told of, beside their sum."""

    stalls: list[Interval]
    _stalled = 0.0

    def __init__(self, **counters: Any) -> None:
        self.stalls = []
        super().__init__(**counters)

    @property
    def stall_seconds(self) -> float:
        """See `EngineStats`. Whoever adds to it does so when the stall has just ended."""
        return self._stalled

    @stall_seconds.setter
    def stall_seconds(self, value: float) -> None:
        grown, self._stalled = value - self._stalled, value
        if grown > 0:
            now = time.perf_counter()
            self.stalls.append(Interval(now - grown, now))


def open_engine(config: EngineConfig) -> Engine:
    """As `Engine.from_pretrained`, with `StallStats`."""
    stats = StallStats()
    return Engine(config, assemble(config, stats), stats)


def network(engine: Engine) -> LLaDA2Model:
    """The model without its routed experts."""
    return engine._parts.model


def expert_bytes(engine: Engine) -> int:
    """Bytes of one expert as the engine's store has it."""
    store = engine._parts.store
    return store.payload_bytes(next(iter(store.keys())))


def settle(engine: Engine) -> None:
    """Wait for transfers under way."""
    engine._parts.experts.idle()


def replace_experts(engine: Engine, experts: ExpertExecutor) -> None:
    """Let `experts` run the routed experts from now on; the engine's own slots and threads are given back."""
    engine._parts.experts.close()
    engine._observed.experts = experts


@dataclass(slots=True)
class Probe:
    """What an engine does, as it goes; times in seconds of `time.perf_counter`."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By component."""
    runs: list[tuple[LayerRun, Tensor]] = field(default_factory=list)
    """Every MoE layer that ran, its experts still missing, and where its tokens went [T, k]."""
    transfers: list[Transfer] = field(default_factory=list)
    first_forward: float | None = None
    """When the first forward began."""
    total: float = 0.0
    """Of all components."""
    quiet: bool = False
    """While the next layers are predicted, modules run on behalf of the scheduler, and don't count."""

    def add(self, component: str, seconds: float) -> None:
        """Count time of a component."""
        if not self.quiet:
            self.seconds[component] += seconds
            self.total += seconds

    def layer_runs(self) -> list[LayerRun]:
        """The layers that ran, with their experts."""
        return [run._replace(experts=chosen(experts)) for run, experts in self.runs]


def chosen(experts: Tensor) -> list[int]:
    """The distinct experts of a decision [T, k]."""
    return [expert for expert in experts.unique().tolist() if expert >= 0]


class _TimedExperts:
    """An `ExpertExecutor` that notes when another runs, and for what."""

    def __init__(self, experts: ExpertExecutor, probe: Probe, whole: bool) -> None:
        """`whole`: all of `run` is compute; else only what goes through the driver and the weighted sum."""
        self.experts, self.probe, self.whole = experts, probe, whole

    def begin(self, info: ForwardInfo) -> None:
        if self.probe.first_forward is None:
            self.probe.first_forward = time.perf_counter()
        self.experts.begin(info)

    def prepare(self, layer: int, preview: Preview) -> None:
        self.probe.quiet = True
        try:
            self.experts.prepare(layer, preview)
        finally:
            self.probe.quiet = False

    def __getattr__(self, name: str) -> Any:
        """Whatever else an executor offers."""
        return getattr(self.experts, name)

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:
        return self.experts.route(layer, hidden, decide)

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:
        return self._watched(self.experts.run, layer, hidden, decision, beside)

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        return self._watched(self.experts.sweep, layer, hidden, decision, rows)

    def _watched(
        self, run: Callable[..., Tensor], layer: int, hidden: Tensor, decision: RoutingDecision, last: int | Beside
    ) -> Tensor:
        began, counted = time.perf_counter(), self.probe.total
        out = run(layer, hidden, decision, last)
        ended = time.perf_counter()
        self.probe.runs.append((LayerRun(layer, began, ended, ()), decision.experts))
        if self.whole:
            self.probe.add("experts", ended - began - (self.probe.total - counted))
        return out


@contextmanager
def probing(engine: Engine, *, offloaded: bool) -> Iterator[Probe]:
    """Watch `engine` in the body. `offloaded`: its own executor runs the experts, not one of `replace_experts`."""
    probe = Probe()
    with ExitStack() as stack:
        for module, component in _modules(network(engine)):
            stack.enter_context(_patched(module, "forward", _timed(component, probe)))  # a hook takes longer
        stack.enter_context(_patched(BlockDiffusionDecoder, "_propose", _timed("head", probe)))
        stack.enter_context(_patched(MoEBlock, "decide", _timed("routing", probe)))
        stack.enter_context(_patched(MoEBlock, "shared", _timed("dense", probe)))
        stack.enter_context(_patched(MoEBlock, "with_shared", _timed("dense", probe)))
        stack.enter_context(_patched(DecoderLayer, "at_once", _timed("attention", probe)))
        stack.enter_context(_patched(llada2, "residual_sum", _timed("dense", probe)))
        stack.enter_context(_patched(llada2, "rotary_angles", _timed("attention", probe)))
        timed = _TimedExperts(engine._decoder.experts, probe, whole=not offloaded)
        stack.enter_context(_patched(engine._decoder, "experts", lambda _: timed))
        if offloaded:
            transfers = engine._parts.experts.transfers
            stack.enter_context(_patched(ExpertOutputs, "combine", _timed("experts", probe)))
            stack.enter_context(_patched(transfers, "launch", _timed_launch(probe)))
            begun: dict[ExpertKey, float] = {}
            stack.enter_context(_patched(transfers, "copy", _noting_start(begun)))
            size = engine._parts.store.payload_bytes
            stack.enter_context(_patched(transfers, "_on_complete", _noting_end(begun, probe, size)))
        yield probe


def _modules(model: LLaDA2Model) -> Iterator[tuple[nn.Module, str]]:
    """Every module whose time counts, none inside another."""
    yield model.model.word_embeddings, "dense"
    yield model.model.norm, "dense"
    for layer in model.layers:
        yield layer.attention, "attention"
        yield layer.input_layernorm, "dense"
        yield layer.post_attention_layernorm, "dense"
        if not isinstance(layer.mlp, MoEBlock):
            yield layer.mlp, "dense"
            continue
        yield layer.mlp.gate, "dense"


@contextmanager
def _patched(owner: Any, name: str, wrap: Callable[[Any], Any]) -> Iterator[None]:
    """`owner.name` is `wrap` of itself in the body; a method of an object goes back to its class's afterwards."""
    own = name in getattr(owner, "__dict__", {}) or not hasattr(owner, "__dict__")
    before = getattr(owner, name)
    setattr(owner, name, wrap(before))
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _timed(component: str, probe: Probe) -> Callable[[Callback], Callback]:
    """Of a function: its time, less what modules within it count as theirs."""

    def wrap(function: Callback) -> Callback:
        def timed(*arguments: Any) -> Any:  # what it takes itself counts as the engine's overhead: little, then
            began, counted = clock(), probe.total
            try:
                return function(*arguments)
            finally:
                spent = clock() - began - (probe.total - counted)
                if not probe.quiet:
                    seconds[component] += spent
                    probe.total += spent

        clock, seconds = time.perf_counter, probe.seconds
        return timed

    return wrap


def _timed_launch(probe: Probe) -> Callable[[Callback], Callback]:
    """Of `TransferBackend.launch`: what it runs is the experts' time, what it does besides is not."""

    def wrap(launch: Callback) -> Callback:
        def timed(stream: Stream, fn: Callback, *arguments: Any, **keywords: Any) -> None:
            launch(stream, _timed("experts", probe)(fn), *arguments, **keywords)

        return timed

    return wrap


def _noting_start(begun: dict[ExpertKey, float]) -> Callable[[Callback], Callback]:
    """Of `TransferBackend.copy`."""

    def wrap(copy: Callback) -> Callback:
        def noted(stream: Stream, source: ExpertKey, slot: int) -> Any:
            begun[source] = time.perf_counter()
            return copy(stream, source, slot)

        return noted

    return wrap


def _noting_end(
    begun: dict[ExpertKey, float], probe: Probe, size: Callable[[ExpertKey], int]
) -> Callable[[Callback], Callback]:
    """Of what the driver calls when a copy is complete, from any of its threads."""

    def wrap(on_complete: Callback) -> Callback:
        def noted(ticket: TransferTicket) -> None:
            ended, began = time.perf_counter(), begun.pop(ticket.key, None)  # None: begun before the watch
            if ticket.error is None and began is not None:
                probe.transfers.append(Transfer(ticket.key, began, ended, size(ticket.key)))
            on_complete(ticket)

        return noted

    return wrap
