"""What the model calls: runs experts out of a cache that is smaller than the model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice

from torch import Tensor

from offload_engine.core import ExpertKey, ForwardInfo, Phase, RoutingDecision
from offload_engine.errors import InternalError, MemoryBudgetError, OffloadError, TransferError
from offload_engine.experts.arena import Slots
from offload_engine.experts.cpu_experts import NO_ERRAND, Errand
from offload_engine.experts.hot_set import HotSet
from offload_engine.experts.lessons import Lessons
from offload_engine.experts.ranked import Standing, ranked_experts, standing
from offload_engine.experts.residency import Residency
from offload_engine.experts.resizing import REFUSALS, change_slots
from offload_engine.experts.scheduling.predictor import ExpertPredictor
from offload_engine.experts.scheduling.prefetch import HOST_PREVIEWS, PREDICTION_SHARE, RECENT_RUNS, prefetch_order
from offload_engine.experts.scheduling.scheduler import LAUNCH_EXPERTS, Command, Compute, ExpertScheduler, Load
from offload_engine.experts.storage.store import ExpertStore, named
from offload_engine.experts.transfer.base import Stream, TransferBackend, TransferTicket
from offload_engine.metrics import EngineStats
from offload_engine.model.moe import (
    Beside,
    Decide,
    ExpertOutputs,
    ExpertSum,
    ExpertWork,
    LayerOutputs,
    Preview,
    nothing,
    tokens_by_expert,
)

SWEEP_WINDOW = 16
"""Experts that a sweep waits for at a time, in their order."""
SWEEP_SHARE = 0.8
"""Share of a layer's experts that a sweep must have wanted for the next layer to be fetched as a whole."""


class OffloadedExperts(Residency):
    """An `ExpertExecutor` that brings experts into the slots of an arena as they are needed.

    Results equal `ResidentExperts` bit for bit: only *when* an expert runs depends on the cache, never what it computes
    or how its output is summed. Raises the transfer's error when an expert that is needed can't be read; the engine
    stays usable.
    """

    def __init__(
        self,
        store: ExpertStore,
        arena: Slots,
        transfers: TransferBackend,
        scheduler: ExpertScheduler,
        predictor: ExpertPredictor,
        stats: EngineStats,
        prefetch_depth: int = 1,
        hot: HotSet | None = None,
    ) -> None:
        super().__init__(store, scheduler)
        self.store = store
        self.arena = arena
        self.transfers = transfers
        self.predictor = predictor
        self.stats = stats
        self.prefetch_depth = prefetch_depth
        self.hot = HotSet() if hot is None else hot
        """What was used most, so far and in earlier runs; prefills, which use nearly everything, left out."""
        self._lessons = Lessons(predictor, self.hot, self._last_layer)
        self._arrival = threading.Condition(self._changed)
        self._ready: deque[Compute] = deque()
        self._works: dict[int, tuple[ExpertKey, ExpertWork]] = {}
        """By slot, what was last computed from it."""
        self._failure: OffloadError | None = None
        self._half_done = False
        """Whether the books are being changed for a layer; between layers, that something stopped it half way."""
        self._info = ForwardInfo(Phase.SCORE)
        self._moved_share = 1.0
        """Of the experts that layers wanted lately, those that had to be moved, early or late."""
        self._sweeping = False
        """Whether the layer before, in this forward, wanted nearly all of its experts in a sweep."""
        transfers.start(self._on_complete)

    def begin(self, info: ForwardInfo) -> None:
        """See `ExpertExecutor`."""
        if self._half_done:
            self._start_over()
        self._info = info
        self._sweeping = False
        self._lessons.begin(info)
        with self._changed:
            self.scheduler.begin(info)

    def prepare(self, layer: int, preview: Preview) -> None:
        """See `ExpertExecutor`: predict this layer, and up to `prefetch_depth - 1` after it, and start to fetch.

        Where the layer before swept through nearly all of its experts, so will this one.
        """
        sweep = self._keys_of_layer[layer] if self._sweeping and self.prefetch_depth else []
        predicted = sweep[: self.scheduler.cache.probation_limit] if sweep else self._predicted(layer, preview)
        if not predicted:
            return
        self._half_done = True
        try:
            with self._changed:
                self.scheduler.expect(sweep)  # lest its first experts push out its last ones
                self._carry_out(self.scheduler.predict(predicted))
            self._half_done = False
        except BaseException as error:
            self._abandon(error)
            raise

    def _predicted(self, layer: int, preview: Preview) -> list[ExpertKey]:
        if self._moved_share < PREDICTION_SHARE and self._info.step:
            return []
        coming = range(layer, min(layer + self.prefetch_depth, self._last_layer + 1))
        if coming and self.predictor.wants_preview and self._moved_share >= PREDICTION_SHARE:
            return self._guess(layer, coming) if self._offer(layer, coming, preview) else []
        return self._guess(layer, coming)

    def _offer(self, layer: int, coming: Sequence[int], preview: Preview) -> bool:  # noqa: ARG002
        """Show the predictor previews of the `coming` layers, the first of them `layer`. False: it will be shown them
        later, and then asked.
        """
        for ahead in coming[:HOST_PREVIEWS]:
            self.predictor.offer(ahead, *ranked_experts(preview(ahead)))
        return True

    def _guess(self, layer: int, coming: Sequence[int]) -> list[ExpertKey]:
        """What to fetch for the `coming` layers, `layer` being about to run."""
        predicted = prefetch_order((ahead, self.predictor.predict(ahead, ahead - layer)) for ahead in coming)
        if self._info.phase is Phase.PREFILL:  # in the order of a sweep, lest what comes first makes room for the rest
            predicted = sorted(predicted)[: self.scheduler.cache.probation_limit]
        return predicted

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:  # noqa: ARG002
        """See `ExpertExecutor`."""
        return decide()

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:
        """See `ExpertExecutor`."""
        ranked, _learned, outlook = self._heard(layer, decision)
        outputs = self._outputs(layer, hidden, decision)
        self._half_done = True
        try:
            with self._changed:
                counters = self.scheduler.counters
                moved = counters.moved
                errand = self._errand(layer, ranked.experts, hidden, decision)
                self._carry_out(self.scheduler.want(layer, ranked.experts, ranked.scores, outlook, errand.experts))
                self.stats.expert_requests += len(ranked.experts)
                self._note_moved(counters.moved - moved, len(ranked.experts))
            self._finish(len(ranked.experts), errand, outputs, beside)
            self._half_done = False
        except BaseException as error:
            self._abandon(error)
            raise
        self.transfers.synchronize()
        return outputs.combine()

    def _heard(self, layer: int, decision: RoutingDecision) -> Standing:
        """What a layer's decision says, which is noted."""
        heard = standing(decision, self._info)
        self._lessons.note(layer, heard)
        return heard

    def _note_moved(self, moved: int, wanted: int) -> None:
        """Of the experts `wanted` by a layer, so many were `moved`, as `SchedulerCounters` counts them."""
        self._moved_share += (moved / max(1, wanted) - self._moved_share) / RECENT_RUNS

    def _finish(self, wanted: int, errand: Errand, outputs: LayerOutputs, beside: Beside) -> None:
        """Compute the experts `wanted`, of which those of `errand` come from elsewhere, as they are there."""
        missing = wanted - len(errand.experts)
        while missing:
            if not self._ready:
                beside()
                beside = nothing
            computes = self._next_computes()
            self._launch(computes, outputs.compute)
            missing -= len(computes)
        if errand.experts:
            self._fetch_results(errand, outputs)
        with self._changed:
            self.stats.bytes_read += errand.bytes_read
            self._count()

    def _errand(self, layer: int, experts: Sequence[int], hidden: Tensor, decision: RoutingDecision) -> Errand:  # noqa: ARG002
        """What is computed elsewhere than from slots, already under way."""
        return NO_ERRAND

    def _fetch_results(self, errand: Errand, outputs: LayerOutputs) -> None:
        with self.transfers.waiting():
            errand.wait()
        self.transfers.launch(Stream.COMPUTE, lambda: None, reads=())  # which ends the stall
        errand.deliver(outputs)

    def warm_up(self) -> None:
        """Begin to fill free slots with what was hot in earlier runs. Returns at once; demands go first."""
        with self._changed:
            hottest = self.hot.hottest(self.scheduler.cache.slots)
            self._carry_out(self.scheduler.warm(key for key, _uses in hottest))

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        """See `ExpertExecutor`. Experts are asked for in windows that the slots can hold, so that the one whose turn it
        is always finds a slot; those of later windows are fetched ahead.
        """
        groups = tokens_by_expert(decision.experts)
        ranked = ranked_experts(decision)
        self.predictor.observe(layer, ranked.experts, ranked.scores)
        scores = dict(zip(ranked.experts, ranked.scores, strict=True))
        total = ExpertSum(hidden, decision, rows)
        ahead = self.scheduler.cache.probation_limit
        window = min(SWEEP_WINDOW, self.scheduler.cache.slots - ahead)  # more would push out what is fetched ahead
        self._half_done = True
        try:
            for start in range(0, len(groups), window):
                now, later = groups[start : start + window], groups[start + window : start + window + ahead]
                wanted = [group.expert for group in now]
                following = [ExpertKey(layer, group.expert) for group in later]
                with self._changed:
                    self.scheduler.expect(ExpertKey(layer, group.expert) for group in groups[start + window :])
                    self._carry_out(self.scheduler.want(layer, wanted, [scores[expert] for expert in wanted]))
                    self._carry_out(self.scheduler.predict(following, routed=True))
                    self.stats.expert_requests += len(wanted)
                arrived: dict[int, Compute] = {}
                for group in now:
                    while group.expert not in arrived:
                        arrived.update((compute.key.expert, compute) for compute in self._next_computes())
                    self._launch([arrived[group.expert]], partial(total.compute, group))
            self._half_done = False
        except BaseException as error:
            self._abandon(error)
            raise
        self._sweeping = len(groups) >= SWEEP_SHARE * len(self._keys_of_layer[layer])
        with self._changed:
            self._count()
        self.transfers.synchronize()
        return total.sum

    def _outputs(self, layer: int, hidden: Tensor, decision: RoutingDecision) -> LayerOutputs:  # noqa: ARG002
        """What computes the experts of one layer in one forward."""
        return ExpertOutputs(hidden, decision)

    def _launch(self, computes: Sequence[Compute], work: Callable[[Sequence[ExpertWork]], None]) -> None:
        """Have `work` done with the experts' weights, and give their slots free for what comes next."""
        todo, known = [], self._works.get
        for compute in computes:
            kept = known(compute.slot)
            todo.append(kept[1] if kept is not None and kept[0] == compute.key else self._work(compute))
        self.transfers.launch(Stream.COMPUTE, partial(work, todo), reads=[compute.slot for compute in computes])
        with self._changed:
            self._carry_out(self.scheduler.computed(*[compute.key for compute in computes]))

    def _work(self, compute: Compute) -> ExpertWork:
        """An expert that has just come to its slot."""
        key, slot = compute
        work = ExpertWork(key.expert, self.arena.expert(slot, self.store.layout(key)), slot)
        self._works[slot] = key, work
        return work

    def idle(self, timeout: float = 60.0) -> None:
        """Wait until no transfer is under way but those of `warm_up`, then check that the cache conserves its slots.

        Raises `InternalError` after `timeout` seconds.
        """
        with self._changed:
            if not self._arrival.wait_for(lambda: self.scheduler.transfers_under_way == 0, timeout):
                raise InternalError(f"{self.scheduler.transfers_under_way} transfers did not end in {timeout:.0f} s")
            self.scheduler.cache.check()
            self.stats.stall_seconds += self.transfers.stalled()

    def wait_warm(self, timeout: float = 60.0) -> None:
        """Wait until `warm_up` has filled what slots it can. Raises `InternalError` after `timeout` seconds."""
        with self._changed:
            if not self._arrival.wait_for(lambda: not self.scheduler.warming, timeout):
                raise InternalError(f"the hot experts were not all here within {timeout:.0f} s")

    def wait_for_slots(self) -> None:
        """Wait until all memory of the slots is there. Raises `MemoryBudgetError` if the system did not give it."""
        self.arena.wait_touched()

    def resize(self, slots: int, room: int | None = None) -> None:  # noqa: ARG002
        """Have so many slots, in `room` bytes, between forwards; raises as the arena's, with nothing changed. After an
        interrupt there are as many as before or so many, as `arena.slots` says, and what was in them may be gone.
        """
        self._quieten()
        self._half_done = True
        try:
            change_slots(slots, self.arena, self.scheduler, self._changed)
        except REFUSALS:
            self._half_done = False
            raise
        except BaseException:
            self._start_over()
            raise
        self._half_done = False

    def _quieten(self) -> None:
        """Have nothing under way, and hold on to no slot."""
        with self._changed:
            self.scheduler.stop()
        if self._half_done:
            self._start_over()
        self.idle()
        self.wait_warm()
        self.wait_for_slots()
        self._works.clear()

    def close(self) -> None:
        """Join the driver's threads and free the slots. Idempotent."""
        with self._changed:
            self.scheduler.stop()
        self.transfers.close()
        self._works.clear()
        self.arena.close()

    def _next_computes(self) -> list[Compute]:
        """The next experts whose weights are here, at most `LAUNCH_EXPERTS`; waits for one, which is a stall. Raises if
        one can't be had.
        """
        with self._changed:
            if not self._ready and self._failure is None:
                with self.transfers.waiting():
                    self._arrival.wait_for(lambda: bool(self._ready) or self._failure is not None)
                self.stats.stall_seconds += self.transfers.stalled()
            if self._failure is not None:
                raise self._failure
            ready, self._ready = self._ready, deque(islice(self._ready, LAUNCH_EXPERTS, None))
            return list(islice(ready, LAUNCH_EXPERTS))

    def _abandon(self, error: BaseException) -> None:
        """Leave the layer half done: the cache is consistent again, and the next forward may begin."""
        if not isinstance(error, TransferError):  # that one is a report, and the books allow for it
            self._start_over()
            return
        with self._changed:
            self.scheduler.abandon()
            self.transfers.abandon()
            self._ready.clear()
            self._failure = None
            self._half_done = False

    def _start_over(self) -> None:
        """Begin with an empty cache: an interrupt comes between any two instructions, so that no book can be trusted.

        What the driver has begun is still written to its slot and reported; everything else is forgotten.
        """
        with self._changed:
            begun = [ticket for ticket in self.transfers.withdraw() if not ticket.reported]
            self.scheduler.reset({ticket.key: ticket.slot for ticket in begun})
            self.arena.mend()
            if self.scheduler.cache.slots != self.arena.slots:
                self.scheduler.resize(self.arena.slots)
            self._ready.clear()
            self._failure = None
            self._half_done = False

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Load):
                self.transfers.copy(Stream.COPY, command.key, command.slot)
            else:
                self._ready.append(command)

    def _on_complete(self, ticket: TransferTicket) -> None:
        with self._changed:
            ticket.reported = True
            try:
                if ticket.error is None:
                    self.stats.bytes_moved += self.store.payload_bytes(ticket.key)
                    self.stats.bytes_read += ticket.bytes_read
                    self.stats.loads += 1
                    self._carry_out(self.scheduler.arrived(ticket.key))
                else:
                    if self.scheduler.wanted(ticket.key):
                        self._failure = ticket.error
                    self._carry_out(self.scheduler.failed(ticket.key))
            except OffloadError as error:
                self._failure = error
            except MemoryError:
                told = f"{named(ticket.key)}: memory ran out; free some, or ask for a smaller --gpu-mem"
                self._failure = MemoryBudgetError(told)
            except Exception as error:  # a defect must reach the compute thread, not die in a reader
                self._failure = InternalError(f"{ticket.key} arrived, and then: {type(error).__name__}: {error}")
            finally:
                self._count()
                self._arrival.notify_all()

    def _count(self) -> None:
        """Copy the scheduler's counters. Prefetches also start, and end, when no layer runs."""
        counters, stats = self.scheduler.counters, self.stats
        stats.hits, stats.misses, stats.late = counters.hits, counters.misses, counters.late
        stats.prefetches_issued, stats.prefetches_used = counters.prefetches, counters.prefetches_used
        stats.prefetches_wasted, stats.evictions = counters.prefetches_wasted, counters.evictions
        stats.warmed, stats.computed_on_cpu = counters.warmed, counters.elsewhere
