"""One simulated run of a trace: what a machine would do with it, and what no scheme could beat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from offload_engine.core import ExpertKey, Phase
from offload_engine.errors import UsageError
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import LRU, make_eviction
from offload_engine.experts.scheduling.predictor import ExpertPredictor, Oracle, make_predictor
from offload_engine.experts.scheduling.prefetch import HOST_PREVIEWS
from offload_engine.experts.scheduling.scheduler import LAUNCH_EXPERTS, ExpertScheduler
from offload_engine.experts.scheduling.sharing import ShareMode
from offload_engine.simulate.belady import belady_misses
from offload_engine.simulate.channel import Channel, Direct, Tiered, Transfers
from offload_engine.simulate.forwards import ForwardRun
from offload_engine.simulate.gate import ACCURACY, Gate
from offload_engine.simulate.profile import Figure
from offload_engine.simulate.replay import Moment, Replay
from offload_engine.simulate.sharing import Sharing
from offload_engine.simulate.synchronous import on_demand
from offload_engine.simulate.timing import Timing

PERFECT_DEPTHS = (1, 2, 4, 8)
"""Layers that perfect prediction looks ahead; the best of them counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How an engine is set up."""

    slots: int
    host_slots: int | None = None
    """Of the host tier; None: the host holds every expert. Without a link it doesn't count."""
    eviction: str = "next-use"
    predictor: str = "combined"
    depth: int = 2
    in_flight: int = 2
    pinned: bool = True
    gate_accuracy: float | None = ACCURACY
    """See `Gate`; None: no previews."""
    cpu_experts: ShareMode = "off"
    """As of `EngineConfig`; of no effect without a GPU."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a simulated run did after its warm-up. Nothing here was measured."""

    steps: int
    """Denoising forwards."""
    step: float
    """Mean seconds per denoising step, commits of their own included."""
    step_median: float
    """Median seconds of a denoising forward."""
    tokens_per_second: float
    """Tokens of the blocks denoised, every one taken for a whole block of the answer."""
    hit_rate: float
    """Share of the experts wanted that were in fast memory when their layer had routed."""
    stall: float
    """Share of the time in which compute waited for a transfer."""
    link_busy: float
    """Share of the time in which the link into the slots was taken: PCIe, or the disk of a machine without a GPU."""
    loads: float
    """Transfers completed per step."""
    on_cpu: float = 0.0
    """Experts computed on the CPU per step."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds per step to compare with; none of these can be built but the last."""

    perfect: float
    """Every prediction right, in the same slots, with the same scheduler."""
    infinite: float
    """Every expert is in fast memory."""
    belady: float
    """The longer of compute and Belady's misses over the link, as if they overlapped entirely. Misses of the warm-up
    are left out: over a whole run nothing is faster, over a part of one hardly anything.
    """
    belady_loads: float
    """Those misses per step."""
    on_demand: float
    """LRU, nothing predicted, each missing expert copied from pageable memory while everything waits."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """A trace on a machine."""

    trace: Sequence[ForwardRun]
    """`sized`."""
    layers: Sequence[int]
    """The MoE layers."""
    timing: Timing
    block_length: int
    warm_up: int = 1
    """Blocks that don't count."""

    def figures(self, setting: Setting) -> Figures:
        """The production cache, eviction, predictor and scheduler in this setting."""
        return self.window(self._replay(setting, make_predictor(setting.predictor), self._transfers(setting)))

    def bounds(self, setting: Setting) -> Bounds:
        """What surrounds `figures` of the same slots; eviction and predictor of `setting` don't matter to all."""
        recorded = [
            {run.layer: list(zip(run.experts, run.scores, strict=True)) for run in one.layers} for one in self.trace
        ]
        perfect = min(
            self.window(self._replay(setting, Oracle(recorded), self._transfers(setting), depth)).step
            for depth in PERFECT_DEPTHS
        )
        free = self.compute_seconds() / self._steps()
        misses = belady_misses([run.keys for one in self.trace for run in one.layers], setting.slots)
        first = sum(len(one.layers) for one in self.trace[: self.first_counted])
        loads = sum(misses[first:]) / self._steps()
        return Bounds(
            perfect=perfect,
            infinite=free,
            belady=max(free, loads * self._transfer_seconds(setting.pinned)),
            belady_loads=loads,
            on_demand=self.window(self._on_demand(setting)).step,
        )

    def compute_seconds(self) -> float:
        """What the forwards after the warm-up take when nothing has to be moved."""
        costs, total = self.timing, 0.0
        for forward in self._counted():
            total += costs.begin(forward) + costs.end(forward)
            for run in forward.layers:
                launches = [
                    min(LAUNCH_EXPERTS, len(run.experts) - done) for done in range(0, len(run.experts), LAUNCH_EXPERTS)
                ]
                total += sum(costs.experts(forward, run, count) for count in launches)
                total += costs.before(forward, run) + costs.after(forward, run)
        return total

    @property
    def first_counted(self) -> int:
        """Number of the first forward after the warm-up. Raises `UsageError` where the trace has too few blocks."""
        seen: set[tuple[int, int]] = set()
        for number, forward in enumerate(self.trace):
            seen |= {(one.sequence, one.block) for one in forward.passes if one.phase is Phase.DENOISE}
            if len(seen) > self.warm_up:
                return number
        raise UsageError(
            f"the trace has {len(seen)} blocks, of which {self.warm_up} are to warm up; "
            "record a longer one, or set --warm-up to less"
        )

    def window(self, moments: Sequence[Moment]) -> Figures:
        """What the forwards after the warm-up came to."""
        first = self.first_counted
        began, ended = moments[first - 1] if first else None, moments[-1]
        steps = self._steps()
        starts = [one.seconds for one in moments[:-1]]
        lasted = [one.seconds - before for one, before in zip(moments, [0.0, *starts], strict=True)]
        denoised = [
            seconds
            for one, seconds in zip(moments[first:], lasted[first:], strict=True)
            if one.forward.info.phase is Phase.DENOISE
        ]
        seconds = ended.seconds - (began.seconds if began else 0.0)
        requests = ended.requests - (began.requests if began else 0)
        return Figures(
            steps=steps,
            step=seconds / steps,
            step_median=statistics.median(denoised),
            tokens_per_second=self._tokens() / seconds if seconds else 0.0,
            hit_rate=(ended.hits - (began.hits if began else 0)) / requests if requests else 1.0,
            stall=_share(ended.stall_seconds - (began.stall_seconds if began else 0.0), seconds),
            link_busy=_share(ended.busy_seconds - (began.busy_seconds if began else 0.0), seconds),
            loads=(ended.loads - (began.loads if began else 0)) / steps,
            on_cpu=(ended.on_cpu - (began.on_cpu if began else 0)) / steps,
        )

    def _counted(self) -> Sequence[ForwardRun]:
        return self.trace[self.first_counted :]

    def _steps(self) -> int:
        return sum(one.info.phase is Phase.DENOISE for one in self._counted())

    def _tokens(self) -> int:
        blocks = {
            (one.sequence, one.block)
            for forward in self._counted()
            for one in forward.passes
            if one.phase is Phase.DENOISE
        }
        return len(blocks) * self.block_length

    def _replay(
        self, setting: Setting, predictor: ExpertPredictor, transfers: Transfers, depth: int | None = None
    ) -> list[Moment]:
        cache = ExpertCache(setting.slots, make_eviction(setting.eviction))
        gate = None
        if setting.gate_accuracy is not None:
            reach = HOST_PREVIEWS if self.timing.profile.device == "cpu" else None
            gate = Gate(self.timing.shape.num_experts, setting.gate_accuracy, reach)
        replay = Replay(
            ExpertScheduler(cache, setting.in_flight),
            predictor,
            self.layers,
            self.timing,
            setting.depth if depth is None else depth,
            transfers,
            LAUNCH_EXPERTS,
            gate,
            self._sharing(setting),
        )
        return replay.run(self.trace).moments

    def _on_demand(self, setting: Setting) -> list[Moment]:
        cache = ExpertCache(setting.slots, LRU())
        host = self._host_cache(setting)
        reads = self.timing.disk_seconds() + self.timing.profile.disk_latency.value
        if self.timing.profile.device == "cpu":
            return on_demand(self.trace, cache, self.timing, reads)
        copies = self.timing.link_seconds(pinned=False) + _value(self.timing.profile.link_latency)
        return on_demand(self.trace, cache, self.timing, copies, host, reads)

    def _transfers(self, setting: Setting) -> Transfers:
        disk = Channel(self.timing.disk_seconds(), self.timing.profile.disk_latency.value)
        if self.timing.profile.device == "cpu":
            return Direct(disk)
        link = Channel(self.timing.link_seconds(pinned=setting.pinned), _value(self.timing.profile.link_latency))
        host = self._host_cache(setting)
        return Direct(link, from_host=True) if host is None else Tiered(disk, link, host)

    def _sharing(self, setting: Setting) -> Sharing | None:
        if setting.cpu_experts == "off" or not self.timing.profile.shares:
            return None
        return Sharing(setting.cpu_experts, self.timing.shape.top_k, partial(self.timing.rates, pinned=setting.pinned))

    def _host_cache(self, setting: Setting) -> ExpertCache | None:
        """The host tier, filled before the run with as many experts of each layer as it holds; None: it holds all."""
        everything = len(self.layers) * self.timing.shape.num_experts
        if setting.host_slots is None or setting.host_slots >= everything:
            return None
        host = ExpertCache(setting.host_slots, LRU())
        keys = (ExpertKey(layer, expert) for expert in range(self.timing.shape.num_experts) for layer in self.layers)
        for key in islice(keys, setting.host_slots):
            host.reserve(key, prefetch=False)
            host.loaded(key)
        return host

    def _transfer_seconds(self, pinned: bool) -> float:
        cpu = self.timing.profile.device == "cpu"
        return self.timing.disk_seconds() if cpu else self.timing.link_seconds(pinned=pinned)


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _value(figure: Figure | None) -> float:
    return 0.0 if figure is None else figure.value
