"""Drives cache, eviction, predictor and scheduler through a recorded trace, as the executor does, on a virtual clock.

Compute and attention are one thread of time; loads travel beside it as `channel.Transfers` say. There are no hidden
states in a trace: previews are what a `Gate` makes up, and without one a predictor that lives on them never guesses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from offload_engine.core import ExpertKey, Phase
from offload_engine.errors import InternalError
from offload_engine.experts.scheduling.predictor import ExpertPredictor, PredictionCounts
from offload_engine.experts.scheduling.prefetch import PREDICTION_SHARE, RECENT_RUNS, prefetch_order
from offload_engine.experts.scheduling.scheduler import Command, Compute, ExpertScheduler, Load, SchedulerCounters
from offload_engine.simulate.channel import Channel, Direct, Transfers
from offload_engine.simulate.forwards import ForwardRun, LayerRun
from offload_engine.simulate.gate import Gate
from offload_engine.simulate.sharing import Shared, Sharing


class CostModel(Protocol):
    """Seconds of virtual time that compute takes."""

    def begin(self, forward: ForwardRun) -> float:
        """All before the first MoE layer: embedding, dense layers."""

    def before(self, forward: ForwardRun, run: LayerRun) -> float:
        """From the time a layer may be prefetched until its routing is known: norms, attention, router, selection."""

    def preview(self, forward: ForwardRun) -> float:
        """One preview of a layer's routing."""

    def experts(self, forward: ForwardRun, run: LayerRun, count: int) -> float:
        """One launch of `count` of the layer's experts."""

    def after(self, forward: ForwardRun, run: LayerRun) -> float:
        """What a layer does once its experts are computed: shared experts, sums."""

    def end(self, forward: ForwardRun) -> float:
        """All after the last layer: norm, head, choice of tokens."""


@dataclass(frozen=True, slots=True)
class Costs:
    """The same for everything; the defaults: 6.29 MB experts at 1.6 GB/s, computed at DRAM speed (REFERENCE §6)."""

    transfer_seconds: float = 0.004
    """One expert's transfer."""
    compute_seconds: float = 0.0004
    """One expert's compute."""
    attention_seconds: float = 0.003
    """All of a layer that is not its experts."""

    def begin(self, forward: ForwardRun) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return 0.0

    def before(self, forward: ForwardRun, run: LayerRun) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return self.attention_seconds

    def preview(self, forward: ForwardRun) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return 0.0

    def experts(self, forward: ForwardRun, run: LayerRun, count: int) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return count * self.compute_seconds

    def after(self, forward: ForwardRun, run: LayerRun) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return 0.0

    def end(self, forward: ForwardRun) -> float:  # noqa: ARG002
        """See `CostModel`."""
        return 0.0

    def transfers(self) -> Transfers:
        """One channel that every load takes for `transfer_seconds`."""
        return Direct(Channel(self.transfer_seconds))


@dataclass(frozen=True, slots=True)
class Moment:
    """Everything counted so far, at the end of a forward."""

    forward: ForwardRun
    seconds: float
    stall_seconds: float
    busy_seconds: float
    """See `Transfers.busy`."""
    loads: int
    requests: int
    hits: int
    on_cpu: int = 0
    """Of the requests, those computed on the CPU."""


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
    """Compute waiting for a transfer, or for the CPU."""
    transfer_seconds: float = 0.0
    """Of the transfers that a layer asked for, whether before or after they began."""
    moments: list[Moment] = field(default_factory=list)
    """One per forward, in their order."""

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
        costs: CostModel,
        depth: int = 1,
        transfers: Transfers | None = None,
        launch: int = 1,
        gate: Gate | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """`depth`: layers to prefetch ahead, 0 for none; `transfers` None: those of `Costs`; `launch`: experts that are
        computed together, at most; `gate` None: no previews; `sharing` None: the CPU computes no expert.
        """
        if transfers is None:
            if not isinstance(costs, Costs):
                raise InternalError("a replay with a cost model of its own needs transfers of its own")
            transfers = costs.transfers()
        self.scheduler = scheduler
        self.predictor = predictor
        self.layers = list(layers)
        """The MoE layers in the order they run."""
        self.costs = costs
        self.depth = depth
        self.transfers = transfers
        self.launch = launch
        self.gate = gate
        self.sharing = sharing
        self._now = 0.0
        self._ready: deque[Compute] = deque()
        self._requests = 0
        self._number = 0
        """Of the forward under way."""
        self._moved_share = 1.0
        """As in `experts.executor`."""
        self._result = ReplayResult(scheduler.counters, predictor.counts)

    def run(self, trace: Iterable[ForwardRun]) -> ReplayResult:
        """Replay every forward; the last transfers are left under way, as a process's end would."""
        result = self._result
        for forward in trace:
            self.predictor.begin(forward.info)
            self.scheduler.begin(forward.info)
            result.steps += forward.info.phase is Phase.DENOISE
            self._pass(self.costs.begin(forward))
            for layer in forward.layers:
                self._run_layer(forward, layer)
            self._pass(self.costs.end(forward))
            result.moments.append(self._moment(forward))
            self._number += 1
        result.seconds = self._now
        result.transfer_seconds = result.needed * self.transfers.seconds
        return result

    def _moment(self, forward: ForwardRun) -> Moment:
        result = self._result
        return Moment(
            forward,
            self._now,
            result.stall_seconds,
            self.transfers.busy,
            result.loads,
            self._requests,
            self.scheduler.counters.hits,
            self.scheduler.counters.elsewhere,
        )

    def _run_layer(self, forward: ForwardRun, run: LayerRun) -> None:
        self._carry_out(self.scheduler.predict(prefetch_order(self._guesses(forward, run.layer))))
        self._pass(self.costs.before(forward, run))
        self.predictor.observe(run.layer, run.experts, run.scores, run.learned)
        self._requests += len(run.experts)
        moved = self.scheduler.counters.moved
        shared = self._shared(forward, run)
        done = self._now + shared.seconds
        self._pass(shared.own)
        self._carry_out(self.scheduler.want(run.layer, run.experts, run.scores, run.outlook, shared.experts))
        share = (self.scheduler.counters.moved - moved) / max(1, len(run.experts))
        self._moved_share += (share - self._moved_share) / RECENT_RUNS
        missing = len(run.experts) - len(shared.experts)
        while missing:
            computes = self._next_computes()
            self._pass(self.costs.experts(forward, run, len(computes)))
            for compute in computes:
                self._carry_out(self.scheduler.computed(compute.key))
            missing -= len(computes)
        self._stall(done)
        self._pass(self.costs.after(forward, run))

    def _shared(self, forward: ForwardRun, run: LayerRun) -> Shared:
        """What the CPU computes of a layer."""
        if self.sharing is None:
            return Shared()
        absent = self.scheduler.absent(run.layer, run.experts)
        hosted = self.transfers.hosted(ExpertKey(run.layer, expert) for expert in absent)
        shared = self.sharing.share(forward, run, absent, hosted, self.scheduler.copies_ahead)
        self.transfers.computed(ExpertKey(run.layer, expert) for expert in absent if expert in shared.experts)
        return shared

    def _guesses(self, forward: ForwardRun, layer: int) -> list[tuple[int, list[tuple[int, float]]]]:
        if self._moved_share < PREDICTION_SHARE and forward.info.step:
            return []
        place = self.layers.index(layer)
        ahead = self.layers[place : place + self.depth]
        self._offer(forward, ahead)
        return [(coming, self.predictor.predict(coming, distance)) for distance, coming in enumerate(ahead)]

    def _offer(self, forward: ForwardRun, layers: Sequence[int]) -> None:
        """Previews of these layers, nearest first, where the engine would ask for them."""
        if self.gate is None or not self.predictor.wants_preview or self._moved_share < PREDICTION_SHARE:
            return
        runs = {run.layer: run for run in forward.layers}
        for distance, layer in enumerate(layers[: self.gate.reach]):
            if layer in runs:
                self._pass(self.costs.preview(forward))
                self.predictor.offer(layer, *self.gate.preview(self._number, runs[layer], distance))

    def _next_computes(self) -> list[Compute]:
        while not self._ready:
            event = self.transfers.next_event()
            if event is None:
                raise InternalError("the replay waits for an expert, and no transfer is under way")
            self._stall(event)
        return [self._ready.popleft() for _ in range(min(len(self._ready), self.launch))]

    def _stall(self, until: float) -> None:
        """Wait, if that is still to come."""
        waited = max(0.0, until - self._now)
        self._result.stall_seconds += waited
        self._pass(waited)

    def _pass(self, seconds: float) -> None:
        """Let time go by; what arrives meanwhile is reported at its time, so that the channel goes on."""
        end = self._now + seconds
        while (event := self.transfers.next_event()) is not None and event <= end:
            self._now, key = self.transfers.advance()
            if key is not None:
                self._result.loads += 1
                self._carry_out(self.scheduler.arrived(key))
        self._now = end

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Load):
                self.transfers.begin(command.key, self._now)
            else:
                self._ready.append(command)
