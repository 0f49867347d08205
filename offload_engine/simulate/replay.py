"""Drives cache, eviction, predictor and scheduler through a recorded trace, as the executor does, on a virtual clock.

Transfers share one channel: each takes it for `transfer_seconds`, in the order in which the scheduler issued them.
Compute and attention are one thread. There are no hidden states in a trace, so previews are not offered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from offload_engine.core import ExpertKey, ForwardInfo, Phase
from offload_engine.errors import InternalError
from offload_engine.experts.outlook import Outlook
from offload_engine.experts.predictor import ExpertPredictor, PredictionCounts
from offload_engine.experts.prefetch import prefetch_order
from offload_engine.experts.scheduler import Command, Compute, ExpertScheduler, Load, SchedulerCounters
from offload_engine.trace import TraceRecord


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of virtual time; the defaults: 6.29 MB experts at 1.6 GB/s, computed at DRAM speed (REFERENCE §6)."""

    transfer_seconds: float = 0.004
    """One expert's transfer."""
    compute_seconds: float = 0.0004
    """One expert's compute."""
    attention_seconds: float = 0.003
    """All of a layer that is not its experts."""


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What one MoE layer wanted in one forward."""

    layer: int
    experts: tuple[int, ...]
    """By falling score."""
    scores: tuple[float, ...]
    runners_up: tuple[int, ...] = ()

    @property
    def keys(self) -> list[ExpertKey]:
        """The experts as keys, in their order."""
        return [ExpertKey(self.layer, expert) for expert in self.experts]


@dataclass(frozen=True, slots=True)
class ForwardRun:
    """One forward of a trace: its layers in the order they ran."""

    info: ForwardInfo
    layers: list[LayerRun] = field(default_factory=list)


def forwards(records: Iterable[TraceRecord]) -> Iterator[ForwardRun]:
    """Group a trace's records by forward: another purpose, or a layer no later than the last, begins a new one."""
    run: ForwardRun | None = None
    sequence = -1
    for record in records:
        info = ForwardInfo(record.phase, record.block, record.step)
        if run is None or info != run.info or record.sequence != sequence or record.layer <= run.layers[-1].layer:
            if run is not None:
                yield run
            run, sequence = ForwardRun(info), record.sequence
        run.layers.append(LayerRun(record.layer, record.experts, record.scores, record.runners_up))
    if run is not None:
        yield run


@dataclass(slots=True)
class ReplayResult:
    """What a replay counted, from an empty cache to the end of the trace."""

    counters: SchedulerCounters
    predictions: PredictionCounts
    loads: int = 0
    """Transfers completed, prefetches included."""
    steps: int = 0
    """Denoising forwards."""
    seconds: float = 0.0
    stall_seconds: float = 0.0
    """Compute waiting for a transfer."""
    transfer_seconds: float = 0.0
    """Of the transfers that a layer asked for, whether before or after they began."""

    @property
    def needed(self) -> int:
        """Requests that took a transfer: misses, and prefetches that a layer then asked for."""
        return self.counters.misses + self.counters.prefetches_used

    @property
    def share_early(self) -> float:
        """Of those, the share issued before their layer's routing was known; 0 where there were none."""
        return self.counters.prefetches_used / self.needed if self.needed else 0.0

    @property
    def share_hidden(self) -> float:
        """Share of their transfer time in which compute did not wait; 1 where there were none."""
        return max(0.0, 1.0 - self.stall_seconds / self.transfer_seconds) if self.transfer_seconds else 1.0


class Replay:
    """One run of a trace through fresh parts. Not to be used twice."""

    def __init__(
        self,
        scheduler: ExpertScheduler,
        predictor: ExpertPredictor,
        layers: Sequence[int],
        costs: Costs,
        depth: int = 1,
    ) -> None:
        self.scheduler = scheduler
        self.predictor = predictor
        self.layers = list(layers)
        """The MoE layers in the order they run."""
        self.costs = costs
        self.depth = depth
        self._now = 0.0
        self._channel_free = 0.0
        self._flying: deque[tuple[float, ExpertKey]] = deque()
        """(time of arrival, key) in the order of arrival, which is that of issue."""
        self._ready: deque[Compute] = deque()
        self._result = ReplayResult(scheduler.counters, predictor.counts)

    def run(self, trace: Iterable[ForwardRun]) -> ReplayResult:
        """Replay every forward; the last transfers are left under way, as a process's end would."""
        for forward in trace:
            self.predictor.begin(forward.info)
            self.scheduler.begin(forward.info)
            self._result.steps += forward.info.phase is Phase.DENOISE
            for layer in forward.layers:
                self._run_layer(layer)
        result = self._result
        result.seconds = self._now
        result.transfer_seconds = result.needed * self.costs.transfer_seconds
        return result

    def _run_layer(self, run: LayerRun) -> None:
        place = self.layers.index(run.layer)
        ahead = self.layers[place : place + self.depth]
        guesses = [(layer, self.predictor.predict(layer, distance)) for distance, layer in enumerate(ahead)]
        self._carry_out(self.scheduler.predict(prefetch_order(guesses)))
        self._pass(self.costs.attention_seconds)
        self.predictor.observe(run.layer, run.experts, run.scores)
        outlook = Outlook(run.experts, run.runners_up)
        self._carry_out(self.scheduler.want(run.layer, run.experts, run.scores, outlook))
        for _ in run.experts:
            compute = self._next_compute()
            self._pass(self.costs.compute_seconds)
            self._carry_out(self.scheduler.computed(compute.key))

    def _next_compute(self) -> Compute:
        while not self._ready:
            if not self._flying:
                raise InternalError("the replay waits for an expert, and no transfer is under way")
            arrival = max(self._now, self._flying[0][0])
            self._result.stall_seconds += arrival - self._now
            self._pass(arrival - self._now)
        return self._ready.popleft()

    def _pass(self, seconds: float) -> None:
        """Let time go by; what arrives meanwhile is reported at its time, so that the channel goes on."""
        end = self._now + seconds
        while self._flying and self._flying[0][0] <= end:
            self._now, key = self._flying.popleft()
            self._result.loads += 1
            self._carry_out(self.scheduler.arrived(key))
        self._now = end

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Load):
                self._channel_free = max(self._channel_free, self._now) + self.costs.transfer_seconds
                self._flying.append((self._channel_free, command.key))
            else:
                self._ready.append(command)
