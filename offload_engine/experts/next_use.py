"""Eviction that knows that the layers take turns."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from offload_engine.core import ExpertKey, ForwardInfo, Phase
from offload_engine.experts.ranking import Ranking

FAST, SLOW, FIRST = 0.7, 0.03, 0.5
"""Weight of the newest forward in the three averages of a `_Record`; chosen on traces (docs/LOG.md)."""
WITHIN_BLOCK = (0.6, 0.4, 0.0)
OPENING = (0.1, 0.3, 0.6)
FUSED = (0.6, 0.4, 0.6)
"""How much fast, slow and first count in the chance of a use: in a forward on a block that is under way, in one that
opens a block, and in one that opens a block and commits another, which wants what both want.
"""
UNKNOWN = 0.5
"""Averages of an expert that came into the cache before its layer ever routed."""


def opens_block(info: ForwardInfo) -> bool:
    """Whether whatever the forward denoises is at its block's first step; it may commit others along with that."""
    steps = [one.step for one in info.blocks if one.phase is Phase.DENOISE] or [info.step]
    return info.phase is Phase.DENOISE and not any(steps)


class _Record:
    """Exponential averages of one expert's uses; each is brought up to date when it is looked at."""

    __slots__ = ("fast", "first", "first_steps", "forwards", "slow")

    def __init__(self, forwards: int, first_steps: int, average: float = 0.0) -> None:
        self.fast = self.slow = self.first = average
        self.forwards = forwards
        """Forwards of the layer that `fast` and `slow` know of."""
        self.first_steps = first_steps
        """First steps of a block that `first` knows of."""


class _Layer:
    """What one layer used, forward by forward, and its candidates in the order of their chance."""

    def __init__(self, place: int, ranking: Ranking) -> None:
        self.place = place
        """Among the layers known, in the order they run."""
        self.ranking = ranking
        self.stale = False
        """Chances changed since `ranking` was put in order."""
        self._records: dict[ExpertKey, _Record] = {}
        self._forwards = 0
        self._first_steps = 0
        self._weights = WITHIN_BLOCK

    def learn(self, layer: int, experts: Sequence[int], info: ForwardInfo) -> None:
        """The layer routed in a forward on one block."""
        first = opens_block(info)
        self._forwards += 1
        self._first_steps += first
        self._weights = OPENING if info.phase is Phase.COMMIT else WITHIN_BLOCK
        for expert in experts:
            record = self._record(ExpertKey(layer, expert))
            record.fast += FAST
            record.slow += SLOW
            record.first += FIRST if first else 0.0
        self.stale = True

    def expect(self, weights: tuple[float, float, float]) -> None:
        """What the layer's next forward is."""
        self.stale |= self._weights != weights
        self._weights = weights

    def meet(self, key: ExpertKey) -> None:
        """`key` became a candidate; nothing may be known of it."""
        if key not in self._records:
            self._records[key] = _Record(self._forwards, self._first_steps, UNKNOWN)

    def chance(self, key: ExpertKey) -> float:
        """That the layer's next forward uses `key`, from 0 to 1."""
        record = self._record(key)
        fast, slow, first = self._weights
        return min(1.0, fast * record.fast + slow * record.slow + first * record.first)

    def _record(self, key: ExpertKey) -> _Record:
        """The record of `key` as of the layer's last forward."""
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(self._forwards, self._first_steps)
        passed = self._forwards - record.forwards
        if passed:
            record.fast *= (1 - FAST) ** passed
            record.slow *= (1 - SLOW) ** passed
            record.forwards = self._forwards
        if record.first_steps != self._first_steps:
            record.first *= (1 - FIRST) ** (self._first_steps - record.first_steps)
            record.first_steps = self._first_steps
        return record


class _Entry(NamedTuple):
    """One layer's next candidate; ordered by the first two, of which no two are the same."""

    density: float
    event: int
    key: ExpertKey
    place: int
    nearness: float
    layer: _Layer


class NextUse:
    """Evicts the lowest chance of a hit per time in the cache; ties to the least recent.

    With the layers in a cycle an expert can be used again only when its layer comes: `d` layers from now, a whole
    sweep for the layer under way. Its worth is p / d, p the chance that the layer's next forward uses it (hit density:
    Beckmann et al., LHD, NSDI 2018). So what has just been used goes before what comes next, and a working set larger
    than the cache keeps as many of its experts as there are slots, where recency keeps none.

    p is a weighted sum of moving averages of the expert's uses: a fast one (the current block's coreset), a slow one
    and, where the layer's next forward opens a block, one over such forwards alone, whose mask tokens want much the
    same in each. After a commit that runs by itself the next forward does; one that is fused with it says so itself.
    Uses are remembered of experts outside the cache too. A prefill wants nearly all experts and is not learnt from.

    An event is O(log n); a victim costs O(layers), and once per layer and forward the sorting of one layer's
    candidates.
    """

    name = "next-use"

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}
        self._events = itertools.count(1)
        self._info = ForwardInfo(Phase.DENOISE)
        self._current: int | None = None
        """The layer that routed last."""

    def begin(self, info: ForwardInfo) -> None:
        """See `EvictionPolicy`."""
        self._info = info
        if opens_block(info):
            fused = any(one.phase is Phase.COMMIT for one in info.blocks)
            for layer in self._layers.values():
                layer.expect(FUSED if fused else OPENING)

    def on_route(self, layer: int, experts: Sequence[int]) -> None:
        """See `EvictionPolicy`."""
        self._current = layer
        state = self._layer(layer)
        if self._info.phase in (Phase.DENOISE, Phase.COMMIT):
            state.learn(layer, experts, self._info)

    def on_insert(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        layer = self._layer(key.layer)
        layer.meet(key)
        layer.ranking.place(key, layer.chance(key))

    def on_use(self, key: ExpertKey, score: float) -> None:  # noqa: ARG002
        """See `EvictionPolicy`. Breaks ties; the chance is from `on_route`."""
        layer = self._layer(key.layer)
        layer.ranking.place(key, layer.chance(key))

    def on_remove(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`. Its uses are remembered."""
        self._layer(key.layer).ranking.remove(key)

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """See `EvictionPolicy`."""
        entries = (self._entry(layer, 0, 1.0 / self._distance(layer)) for layer in self._layers.values())
        lowest = [entry for entry in entries if entry is not None]
        heapq.heapify(lowest)
        while lowest:
            entry = heapq.heappop(lowest)
            if evictable(entry.key):
                return entry.key
            following = self._entry(entry.layer, entry.place + 1, entry.nearness)
            if following is not None:
                heapq.heappush(lowest, following)
        return None

    def _entry(self, layer: _Layer, place: int, nearness: float) -> _Entry | None:
        """The candidate of `layer` at `place` from its lowest, if there is one."""
        if layer.stale:
            layer.ranking.revalue(layer.chance)
            layer.stale = False
        rank = layer.ranking.at(place)
        return None if rank is None else _Entry(rank[0] * nearness, rank[1], rank[2], place, nearness, layer)

    def _distance(self, layer: _Layer) -> int:
        """Layers until `layer` runs again: a whole sweep for the one under way, 1 for all before the first."""
        if self._current is None:
            return 1
        here = self._layers[self._current].place
        return (layer.place - here - 1) % len(self._layers) + 1

    def _layer(self, index: int) -> _Layer:
        layer = self._layers.get(index)
        if layer is None:
            layer = self._layers[index] = _Layer(0, Ranking(self._events))
            for place, known in enumerate(sorted(self._layers)):
                self._layers[known].place = place
        return layer
