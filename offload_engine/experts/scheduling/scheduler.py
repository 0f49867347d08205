"""Decides what is loaded when, and what is computed when: events in, commands out.

A pure state machine without thread, clock or tensor, so that the engine and the simulator drive the same code. Whoever
drives it carries out the commands in their order and reports what became of them. Calls must be serialised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from offload_engine.core import ExpertKey, ForwardInfo
from offload_engine.errors import InternalError
from offload_engine.experts.scheduling.cache import ExpertCache, SlotState
from offload_engine.experts.scheduling.outlook import Outlook

LAUNCH_EXPERTS = 32
"""Experts that are computed in one launch, at most: their slots can't be given to others before all have been."""


class Load(NamedTuple):
    """Bring `key` into `slot`; report `arrived` or `failed`."""

    key: ExpertKey
    slot: int
    prefetch: bool


class Compute(NamedTuple):
    """Run `key` from `slot`; report `computed`. The slot is pinned until then."""

    key: ExpertKey
    slot: int


Command = Load | Compute


@dataclass(slots=True)
class SchedulerCounters:
    """What became of every expert asked for and every prefetch issued."""

    hits: int = 0
    """Experts that were resident when their layer's routing became known."""
    late: int = 0
    """Experts whose prefetch was still under way then: bytes issued early, but not hidden completely."""
    misses: int = 0
    """Experts whose transfer began only after their layer's routing was known, or was under way for `warm`: no
    prediction brought it forward.
    """
    prefetches: int = 0
    """Transfers begun on a prediction."""
    prefetches_used: int = 0
    """Of those, the ones a layer then asked for before they were evicted."""
    prefetches_wasted: int = 0
    """Of those, the ones that were evicted, or failed, before any layer asked for them."""
    evictions: int = 0
    elsewhere: int = 0
    """Experts that a layer asked for and had computed elsewhere, on the CPU, without a slot."""
    warmed: int = 0
    """Transfers begun to fill free slots with what was hot before (`ExpertScheduler.warm`); no prefetches."""

    @property
    def moved(self) -> int:
        """Experts asked for that were not in fast memory for longer than since the last prediction."""
        return self.misses + self.prefetches_used + self.elsewhere


class ExpertScheduler:
    """Demand before prefetch, residents before arrivals, and never more than `in_flight` transfers at a time.

    Transfers that may not start yet wait in queues of this object, so that a demand overtakes every queued prefetch.
    """

    def __init__(self, cache: ExpertCache, in_flight: int = 2) -> None:
        self.cache = cache
        self.limit = in_flight
        self.counters = SchedulerCounters()
        self._in_flight: set[ExpertKey] = set()
        self._demand: deque[ExpertKey] = deque()
        self._prefetch: deque[ExpertKey] = deque()
        self._wanted: dict[ExpertKey, float] = {}
        """What the current layer still has to compute, with its block score."""
        self._computing: set[ExpertKey] = set()
        """Pinned, because their `Compute` was issued and is not reported yet."""
        self._speculative: set[ExpertKey] = set()
        """Prefetched and not asked for yet."""
        self._warm: deque[ExpertKey] = deque()
        """To be loaded into free slots when nothing else is to be moved."""
        self._warming: ExpertKey | None = None
        """The one of these that is under way, as long as no layer asks for it."""
        self._routed: set[ExpertKey] = set()
        """Of a layer that has routed: its router's choice, but not asked for yet. Fetching these early is no guess."""

    @property
    def done(self) -> bool:
        """Everything the current layer asked for has been computed."""
        return not self._wanted

    @property
    def transfers_under_way(self) -> int:
        """Loads issued and not yet reported, and prefetches queued behind them; not those that `warm` asked for."""
        return len(self._in_flight) - (self._warming is not None) + len(self._prefetch)

    @property
    def copies_ahead(self) -> float:
        """Copies that a load issued now would wait for: those under way, the first of them half done."""
        return max(0.0, len(self._in_flight) - 0.5)

    @property
    def warming(self) -> bool:
        """Whether loads that `warm` asked for are under way or still to begin."""
        return self._warming is not None or bool(self._warm)

    def wanted(self, key: ExpertKey) -> bool:
        """Whether the current layer still has to compute `key`."""
        return key in self._wanted

    def begin(self, info: ForwardInfo) -> None:
        """Event: a forward starts."""
        self.cache.begin(info)

    def warm(self, keys: Iterable[ExpertKey]) -> list[Command]:
        """Event: these experts were hot in earlier runs, the hottest first.

        They fill free slots in the background, one at a time and only while nothing else is under way, so that a
        demand finds a transfer free (with `in_flight` of 2 or more). They are no prefetches: no probation, no waste.
        """
        self._warm = deque(keys)
        return self._start_transfers()

    def expect(self, keys: Iterable[ExpertKey]) -> None:
        """Event: the layer under way will `want` these after what it wants next; those that are here should stay."""
        self.cache.expect(keys)

    def absent(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of a layer's experts that are neither here nor on their way, in their order."""
        return [expert for expert in experts if self.cache.state(ExpertKey(layer, expert)) is SlotState.FREE]

    def lend(self, layer: int) -> None:
        """Event: work is enqueued on whatever of `layer` is resident, before it is known what of it will be wanted.
        Nothing of it is evicted until `want` says so.
        """
        self.cache.lend(layer)

    def want(
        self,
        layer: int,
        experts: Sequence[int],
        scores: Sequence[float],
        outlook: Outlook | None = None,
        elsewhere: Collection[int] = (),
    ) -> list[Command]:
        """Event: `layer` routed. `experts` are distinct and in falling order of block score, as `scores` are. `outlook`
        tells of its next forward more than that these were chosen. `elsewhere` are those, all of them `absent`, that
        are computed without a slot: for them nothing is loaded and no `Compute` comes.

        Everything resident is pinned at once, so that no load of this layer can evict what it still needs.
        """
        if self._wanted:
            raise InternalError(f"layer {layer} was routed while {len(self._wanted)} experts were still to be computed")
        self.cache.route(layer, experts, outlook or Outlook(experts))
        self._wanted = {
            ExpertKey(layer, expert): score
            for expert, score in zip(experts, scores, strict=True)
            if expert not in elsewhere
        }
        self.counters.elsewhere += len(experts) - len(self._wanted)
        computes, hits, fetched_ahead = [], 0, self._speculative or self._routed
        for key in self._wanted:
            state, slot = self.cache.claim(key)
            if state is SlotState.RESIDENT:
                computes.append(Compute(key, slot))
                self._computing.add(key)
            elif state is SlotState.FREE:
                self._demand.append(key)
            if state is SlotState.RESIDENT and not fetched_ahead:
                hits += 1
            else:
                self._count_request(key, state)
        self.counters.hits += hits
        self.cache.lend(None)  # what is wanted of it is pinned now
        if self._prefetch:
            self._prefetch = deque(key for key in self._prefetch if key.layer != layer)  # too late to be early
        return [*self._start_transfers(), *computes]

    def predict(self, keys: Iterable[ExpertKey], *, routed: bool = False) -> list[Command]:
        """Event: these experts will probably be wanted, the most probable first. Replaces older predictions of their
        layers; experts that are here or on their way are not fetched again.

        `routed`: they will be wanted for certain, for their layer has routed already and asks for a part of its experts
        at a time. What is fetched ahead then counts as the miss it is.
        """
        predicted = list(dict.fromkeys(keys))
        if routed:
            self._routed.update(key for key in predicted if self.cache.state(key) is SlotState.FREE)
        layers = {key.layer for key in predicted}
        kept = [key for key in self._prefetch if key.layer not in layers]
        fresh = [key for key in predicted if self.cache.state(key) is SlotState.FREE and key not in self._wanted]
        self._prefetch = deque(kept + fresh)
        return self._start_transfers()

    def arrived(self, key: ExpertKey) -> list[Command]:
        """Event: a load is complete."""
        self._landed(key)
        self.cache.loaded(key)
        computes = [self._compute(key)] if key in self._wanted else []
        return [*self._start_transfers(), *computes]

    def failed(self, key: ExpertKey) -> list[Command]:
        """Event: a load failed; its slot is free again. If the layer wanted it, `abandon` the layer and raise."""
        self._landed(key)
        self.cache.failed(key)
        self._count_wasted(key)
        return self._start_transfers()

    def computed(self, *keys: ExpertKey) -> list[Command]:
        """Event: the last reader of each of `keys` in this layer has finished with its slot."""
        for key in keys:
            self.cache.release(key, self._wanted.pop(key))
        self._computing.difference_update(keys)
        return self._start_transfers()

    def abandon(self) -> None:
        """Event: the current layer won't be finished; no `Compute` issued for it will be reported.

        Loads under way stay under way and are reported as usual.
        """
        for key in self._computing:
            self.cache.unpin(key)
        self.cache.expect(())
        self.cache.lend(None)
        self._computing.clear()
        self._wanted.clear()
        self._routed.clear()
        self._demand.clear()
        self._prefetch.clear()

    def reset(self, loading: Mapping[ExpertKey, int]) -> None:
        """Event: something stopped a call half way, so that no book can be trusted. Begin with an empty cache.

        `loading`: the loads that the driver will still report, with their slots.
        """
        self.counters.prefetches_wasted += len(self._speculative)
        for book in (self._computing, self._wanted, self._routed, self._demand, self._prefetch, self._speculative):
            book.clear()
        self._warm.clear()
        self._warming = None
        self._in_flight = set(loading)
        self.cache.reset(loading)

    def resize(self, slots: int) -> tuple[tuple[int, int], ...]:
        """Event: the cache is to have `slots` slots. Returns the moves of `ExpertCache.resize`.

        Raises `InternalError`, with nothing changed, while a layer is under way or anything is moved.
        """
        if self._wanted or self._in_flight:
            raise InternalError(
                f"the cache was resized with {len(self._wanted)} experts to be computed and "
                f"{len(self._in_flight)} on their way; wanted none"
            )
        resized = self.cache.resize(slots)
        for key in resized.evicted:
            self._count_eviction(key)
        return resized.moves

    def stop(self) -> None:
        """Event: no transfer may begin any more but for a demand."""
        self._prefetch.clear()
        self._warm.clear()

    def _landed(self, key: ExpertKey) -> None:
        """A load is under way no more, however it ended."""
        self._in_flight.remove(key)
        if key == self._warming:
            self._warming = None

    def _compute(self, key: ExpertKey) -> Compute:
        slot = self.cache.pin(key)
        self._computing.add(key)
        return Compute(key, slot)

    def _start_transfers(self) -> list[Command]:
        loads: list[Command] = []
        while (self._demand or self._prefetch or self._warm) and len(self._in_flight) < self.limit:
            load = self._next_load()
            if load is None:
                break
            self._in_flight.add(load.key)
            loads.append(load)
        return loads

    def _next_load(self) -> Load | None:
        if self._demand:
            reservation = self.cache.reserve(self._demand[0], prefetch=False)
            if reservation is None:
                return None  # every slot is pinned or loading: the next `computed` or `arrived` makes room
            self._count_eviction(reservation.evicted)
            return Load(self._demand.popleft(), reservation.slot, prefetch=False)
        while self._prefetch:
            key = self._prefetch.popleft()
            if self.cache.state(key) is not SlotState.FREE:
                continue
            reservation = self.cache.reserve(key, prefetch=True)
            if reservation is None:
                self._prefetch.clear()  # no room for guesses; those behind it are less probable still
                return None
            self._count_eviction(reservation.evicted)
            if key not in self._routed:
                self._speculative.add(key)
                self.counters.prefetches += 1
            return Load(key, reservation.slot, prefetch=True)
        return self._next_warm()

    def _next_warm(self) -> Load | None:
        if self._in_flight:
            return None
        while self._warm:
            if not self.cache.has_free:
                self._warm.clear()  # what moves in now is what this run wants
                return None
            key = self._warm.popleft()
            if self.cache.state(key) is SlotState.FREE:
                reservation = self.cache.reserve(key, prefetch=False)
                if reservation is not None:
                    self.counters.warmed += 1
                    self._warming = key
                    return Load(key, reservation.slot, prefetch=False)
        return None

    def _count_request(self, key: ExpertKey, state: SlotState) -> None:
        if state is SlotState.RESIDENT and key not in self._speculative and key not in self._routed:
            self.counters.hits += 1
            return
        if state is SlotState.FREE or key in self._routed or key == self._warming:
            self.counters.misses += 1
        elif state is SlotState.RESIDENT:
            self.counters.hits += 1
        else:
            self.counters.late += 1
        if key in self._speculative and state is not SlotState.FREE:
            self.counters.prefetches_used += 1
        if key == self._warming:
            self._warming = None  # the layer's from now on
        self._routed.discard(key)
        self._speculative.discard(key)

    def _count_eviction(self, evicted: ExpertKey | None) -> None:
        if evicted is not None:
            self.counters.evictions += 1
            self._count_wasted(evicted)

    def _count_wasted(self, key: ExpertKey) -> None:
        if key in self._speculative:
            self._speculative.remove(key)
            self.counters.prefetches_wasted += 1
