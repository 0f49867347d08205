"""Eviction that knows that the layers take turns, and who was close to being chosen."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from offload_engine.core import ExpertKey, ForwardInfo, Phase
from offload_engine.experts.scheduling.outlook import FURTHEST, Outlook

RATE, OPENING_RATE = 0.03, 0.5
"""Weight of the newest forward in an expert's average of uses: in all, and in those that open a block."""
CHOSEN_KINDS = 4
"""Quarters of the chosen, best first."""
STEP = 3
"""Runners-up of a kind."""
UNNAMED = CHOSEN_KINDS + FURTHEST // STEP
"""The kind of an expert that nobody named."""
AT_ONCE, CANDIDATES = 4, 64
"""Victims found together, at most one for so many candidates: on recorded traces it costs at most .4 % more loads."""
BINS = 8
"""Of an expert's average of uses, as a share of its layer's largest."""
CELLS = (UNNAMED + 1) * BINS
TINY = float(np.finfo(np.float64).tiny)
CAUTION = 2.0
"""Observations that the first guess at a cell's chance counts for."""
SAMPLED = 3
"""Every how many forwards of a layer its cells are observed: chances change slowly, a forward brings many of them."""
MEMORY = 4096.0
"""Observations of a cell after which the older half of its weight is dropped."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def opens_block(info: ForwardInfo) -> bool:
    """Whether whatever the forward denoises is at its block's first step; it may commit others along with that."""
    steps = [one.step for one in info.blocks if one.phase is Phase.DENOISE] or [info.step]
    return info.phase is Phase.DENOISE and not any(steps)


@cache
def _chosen_cells(count: int) -> Integers:
    """First cells [count] of the kinds of so many chosen, best first."""
    return np.arange(count) * CHOSEN_KINDS // max(1, count) * BINS


@cache
def _runner_up_cells(count: int) -> Integers:
    """First cells [count] of the kinds of so many runners-up, best first."""
    return (CHOSEN_KINDS + np.arange(count) // STEP) * BINS


class _Calibration:
    """How often experts of a cell were used in their layer's next forward, by whether that opened a block.

    A cell is a kind (what became of the expert in the layer's last vote) and a bin of its average of uses. First
    guesses hold until something was seen: within a block the last vote counts most, where one is opened the average.
    """

    def __init__(self) -> None:
        kinds = np.array([0.8] * CHOSEN_KINDS + [0.3 * 0.7**place for place in range(FURTHEST // STEP)] + [0.0])
        averages = (np.arange(BINS) + 0.5) / BINS
        guesses = [said * kinds[:, None] + (1 - said) * averages for said in (0.6, 0.2)]
        self._all: list[Floats] = [np.full(CELLS, CAUTION), np.full(CELLS, CAUTION)]
        self._true: list[Floats] = [CAUTION * guess.ravel() for guess in guesses]
        self._chances: list[list[float] | None] = [None, None]
        self._seen = [math.ceil(CAUTION)] * 2
        """What no cell's observations are more than."""

    def chances(self, opening: bool) -> list[float]:
        """By cell."""
        chances = self._chances[opening]
        if chances is None:
            chances = self._chances[opening] = (self._true[opening] / self._all[opening]).tolist()
        return chances

    def learn(self, opening: bool, cells: Integers, used: Integers) -> None:
        """Experts stood in `cells` [E]; the layer then used these [n]."""
        true, all_ = self._true[opening], self._all[opening]
        all_ += np.bincount(cells, minlength=CELLS)
        true += np.bincount(cells[used], minlength=CELLS)
        self._seen[opening] += len(cells)
        if self._seen[opening] >= MEMORY:  # no cell can have got there before
            if all_.max() >= MEMORY:
                faded = np.where(all_ >= MEMORY, 0.5, 1.0)
                all_ *= faded
                true *= faded
            self._seen[opening] = int(all_.max())
        self._chances[opening] = None


class _Layer:
    """What one layer used, forward by forward, and its candidates in the order of their chance."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.place = 0
        """Among the layers known, in the order they run."""
        self._opening = False
        """Whether the layer's next forward opens a block, as far as is known."""
        self._experts = 0
        """Those below this have been heard of."""
        self.candidates: dict[int, int] = {}
        """Experts, with the number of their last event."""
        self._averages: list[Floats] = [np.zeros(0), np.zeros(0)]
        """[E] each: of uses in all forwards, and in those that open a block."""
        self._kinds: Integers = np.zeros(0, dtype=np.int64)
        """[E]: the first cell of each expert's kind."""
        self._cells: Integers | None = None
        """[E]: where experts stand; None until asked for, as all that follows from what was learnt."""
        self._order: list[tuple[float, int, int]] | None = None

    def learn(self, experts: Sequence[int], outlook: Outlook, opened: bool, calibration: _Calibration | None) -> None:
        """The layer routed in a forward that denoises or commits, and may have `opened` a block. `calibration`, if
        given, learns from it too.
        """
        self._reach(max(max(named, default=-1) for named in (experts, *outlook)))
        wanted, chosen, runners_up = (np.array(named, dtype=np.int64) for named in (experts, *outlook))
        if calibration is not None:
            calibration.learn(self._opening, self._standing(), wanted)
        self._average(self._averages[0], wanted, RATE)
        if opened:
            self._average(self._averages[1], wanted, OPENING_RATE)
        self._kinds.fill(UNNAMED * BINS)
        self._kinds[chosen] = _chosen_cells(len(chosen))
        self._kinds[runners_up] = _runner_up_cells(len(runners_up))

    def knows(self, expert: int) -> bool:
        """Whether `expert` has been heard of."""
        return expert < self._experts

    def expect(self, opening: bool) -> None:
        """What the layer's next forward is."""
        self._opening = opening
        self._cells = self._order = None

    def touch(self, expert: int, event: int) -> None:
        """A candidate, new or not, had its latest event."""
        if expert >= self._experts:
            self._reach(expert)
        self.candidates[expert] = event
        self._order = None

    def remove(self, expert: int) -> None:
        """`expert` is no candidate any more."""
        del self.candidates[expert]
        if self._order is not None:
            self._order = [rank for rank in self._order if rank[2] != expert]

    def order(self, calibration: _Calibration) -> list[tuple[float, int, int]]:
        """(chance, last event, expert) of the candidates, rising."""
        if self._order is None:
            cells, chances = self._standing().tolist(), calibration.chances(self._opening)
            ranks = [(chances[cells[expert]], event, expert) for expert, event in self.candidates.items()]
            self._order = sorted(ranks)
        return self._order

    def _standing(self) -> Integers:
        """[E]: the cell of each expert, by the average that counts in the layer's next forward."""
        if self._cells is None:
            averages = self._averages[self._opening]
            largest = max(averages.max(initial=0.0), TINY)
            bins = (averages / (largest / BINS)).astype(np.int64)
            self._cells = self._kinds + np.minimum(bins, BINS - 1, out=bins)
        return self._cells

    @staticmethod
    def _average(averages: Floats, used: Integers, rate: float) -> None:
        averages *= 1.0 - rate
        averages[used] += rate

    def _reach(self, expert: int) -> None:
        """Have room for `expert`, and for all below it."""
        missing = expert + 1 - self._experts
        if missing > 0:
            self._experts += missing
            self._averages = [np.pad(averages, (0, missing)) for averages in self._averages]
            self._kinds = np.pad(self._kinds, (0, missing), constant_values=UNNAMED * BINS)
            self._cells = None


class NextUse:
    """Evicts the lowest chance of a hit per time in the cache; ties to the least recent.

    With the layers in a cycle an expert can be used again only when its layer comes: `d` layers from now, a whole
    sweep for the layer under way. Its worth is p / d, p the chance that the layer's next forward uses it (hit density:
    Beckmann et al., LHD, NSDI 2018). So what has just been used goes before what comes next, and a working set larger
    than the cache keeps as many of its experts as there are slots, where recency keeps none.

    p is how often experts in the same situation were used in the layer's next forward: those that stood as high in its
    last vote, chosen or not (most experts that are new in a forward were runners-up before), and were used as often of
    late; where a block is opened, whose mask tokens want much the same in each, as often in such forwards alone. After
    a commit that runs by itself the next forward opens one; one that is fused with it says so itself. Uses are
    remembered of experts outside the cache too. A prefill wants nearly all experts and is not learnt from.

    A routing costs O(experts of the layer), some time before the next victim; a victim O(layers) and the sorting of
    layers that had an event since. So in a large cache a few victims are found together; who has an event before its
    turn is none any more, but who became a better one meanwhile waits for the next search.
    """

    name = "next-use"

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}
        self._calibration = _Calibration()
        self._events = itertools.count(1)
        self._forwards = 0
        self._next: list[tuple[_Layer, int, int]] = []
        """Who goes next: layer, expert, and its last event."""
        self._current: _Layer | None = None
        """That routed last."""
        self._routings: list[tuple[_Layer, Sequence[int], Outlook]] = []
        """Of this forward, not learnt from yet. One after the other they cost a fraction of what each by itself costs,
        whose weights have just run through the processor's caches.
        """
        self.begin(ForwardInfo(Phase.DENOISE))

    def begin(self, info: ForwardInfo) -> None:
        """See `EvictionPolicy`."""
        self._learn()
        self._forwards += 1
        self._phase, self._opens = info.phase, opens_block(info)
        if self._opens:
            for layer in self._layers.values():
                layer.expect(True)

    def on_route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None:
        """See `EvictionPolicy`."""
        self._current = self._layer(layer)
        if self._phase in (Phase.DENOISE, Phase.COMMIT):
            self._routings.append((self._current, experts, outlook))

    def on_insert(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        layer = self._layer(key.layer)
        if not layer.knows(key.expert):
            self._learn()
        layer.touch(key.expert, next(self._events))

    def on_use(self, key: ExpertKey, score: float) -> None:  # noqa: ARG002
        """See `EvictionPolicy`. Breaks ties; the chance is from `on_route`."""
        layer = self._layers.get(key.layer) or self._layer(key.layer)
        layer.touch(key.expert, next(self._events))

    def on_remove(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`. Its uses are remembered."""
        self._layer(key.layer).remove(key.expert)

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """See `EvictionPolicy`."""
        return self._first(evictable) or self._look_ahead(evictable)

    def _first(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """Of `_next`, which forgets those that had an event since."""
        self._next = [rank for rank in self._next if rank[0].candidates.get(rank[1]) == rank[2]]
        keys = (ExpertKey(layer.index, expert) for layer, expert, _event in self._next)
        return next(filter(evictable, keys), None)

    def _look_ahead(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The first victim; found with it, those that would go before it if they might, and in a large cache some that
        go after it.
        """
        self._learn()
        self._next = []
        # `d` of the class's docstring: a whole sweep for the layer under way, 1 for all before the first
        heads = []
        """(density, event, place in the layer's order, nearness, layer): no two events are the same."""
        calibration, count = self._calibration, len(self._layers)
        at_once = min(AT_ONCE, 1 + sum(len(layer.candidates) for layer in self._layers.values()) // CANDIDATES)
        found: list[ExpertKey] = []
        after = 0 if self._current is None else self._current.place + 1
        for layer in self._layers.values():
            if order := layer.order(calibration):
                chance, event, _expert = order[0]
                nearness = 1.0 if self._current is None else 1.0 / ((layer.place - after) % count + 1)
                heads.append((chance * nearness, event, 0, nearness, layer))
        heapq.heapify(heads)
        while heads and len(found) < at_once:
            _density, event, place, nearness, layer = heads[0]
            order = layer.order(calibration)
            key = ExpertKey(layer.index, order[place][2])
            self._next.append((layer, key.expert, event))
            if evictable(key):
                found.append(key)
            if place + 1 == len(order):
                heapq.heappop(heads)
            else:
                chance, event, _expert = order[place + 1]
                heapq.heapreplace(heads, (chance * nearness, event, place + 1, nearness, layer))
        if at_once == 1:
            self._next = []  # the next one may be another by then
        return found[0] if found else None

    def _learn(self) -> None:
        for layer, experts, outlook in self._routings:
            sampled = (self._forwards + layer.place) % SAMPLED == 0
            layer.learn(experts, outlook, self._opens, self._calibration if sampled else None)
            layer.expect(self._phase is Phase.COMMIT)
        self._routings.clear()

    def _layer(self, index: int) -> _Layer:
        layer = self._layers.get(index)
        if layer is None:
            layer = self._layers[index] = _Layer(index)
            for place, known in enumerate(sorted(self._layers)):
                self._layers[known].place = place
        return layer
