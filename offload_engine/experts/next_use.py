"""Eviction that knows that the layers take turns, and who was close to being chosen."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload_engine.core import ExpertKey, ForwardInfo, Phase
from offload_engine.experts.outlook import FURTHEST, Outlook

RATE, OPENING_RATE = 0.03, 0.5
"""Weight of the newest forward in an expert's average of uses: in all, and in those that open a block."""
CHOSEN_KINDS = 4
"""Quarters of the chosen, best first."""
STEP = 3
"""Runners-up of a kind."""
UNNAMED = CHOSEN_KINDS + FURTHEST // STEP
"""The kind of an expert that nobody named."""
BINS = 8
"""Of an expert's average of uses, as a share of its layer's largest."""
CELLS = (UNNAMED + 1) * BINS
CAUTION = 2.0
"""Observations that the first guess at a cell's chance counts for."""
MEMORY = 4096.0
"""Observations of a cell after which the older half of its weight is dropped."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def opens_block(info: ForwardInfo) -> bool:
    """Whether whatever the forward denoises is at its block's first step; it may commit others along with that."""
    steps = [one.step for one in info.blocks if one.phase is Phase.DENOISE] or [info.step]
    return info.phase is Phase.DENOISE and not any(steps)


class _Calibration:
    """How often experts of a cell were used in their layer's next forward, by whether that opened a block.

    A cell is a kind (what became of the expert in the layer's last vote) and a bin of its average of uses. First
    guesses hold until something was seen: within a block the last vote counts most, where one is opened the average.
    """

    def __init__(self) -> None:
        kinds = np.array([0.8] * CHOSEN_KINDS + [0.3 * 0.7**place for place in range(FURTHEST // STEP)] + [0.0])
        averages = (np.arange(BINS) + 0.5) / BINS
        guesses = [said * kinds[:, None] + (1 - said) * averages for said in (0.6, 0.2)]
        self._all = np.full((2, CELLS), CAUTION)
        self._true: Floats = CAUTION * np.stack([guess.ravel() for guess in guesses])

    def chances(self, opening: bool) -> Floats:
        """[CELLS]"""
        chances: Floats = self._true[int(opening)] / self._all[int(opening)]
        return chances

    def learn(self, opening: bool, cells: Integers, used: Integers) -> None:
        """Experts stood in `cells` [E]; the layer then used these [n]."""
        true, all_ = self._true[int(opening)], self._all[int(opening)]
        all_ += np.bincount(cells, minlength=CELLS)
        true += np.bincount(cells[used], minlength=CELLS)
        faded = np.where(all_ >= MEMORY, 0.5, 1.0)
        all_ *= faded
        true *= faded


class _Layer:
    """What one layer used, forward by forward, and its candidates in the order of their chance."""

    def __init__(self, place: int) -> None:
        self.place = place
        """Among the layers known, in the order they run."""
        self.opening = False
        """Whether the layer's next forward opens a block, as far as is known."""
        self.candidates: dict[ExpertKey, int] = {}
        """With the number of their last event."""
        self._averages: Floats = np.zeros((2, 0))
        """[2, E]: of uses in all forwards, and in those that open a block."""
        self._cells: Integers = np.zeros((2, 0), dtype=np.int64)
        """[2, E]: where experts stand, by either average."""
        self._order: list[tuple[float, int, ExpertKey]] | None = None

    def learn(self, experts: Sequence[int], outlook: Outlook, info: ForwardInfo, calibration: _Calibration) -> None:
        """The layer routed in a forward that denoises or commits."""
        wanted, chosen, runners_up = (np.asarray(part, dtype=np.int64) for part in (experts, *outlook))
        self._reach(max(part.max(initial=-1) for part in (wanted, chosen, runners_up)))
        calibration.learn(self.opening, self._cells[int(self.opening)], wanted)
        used = np.zeros(self._averages.shape[1])
        used[wanted] = 1.0
        self._averages[0] += RATE * (used - self._averages[0])
        if opens_block(info):
            self._averages[1] += OPENING_RATE * (used - self._averages[1])
        kinds = np.full(len(used), UNNAMED)
        kinds[chosen] = np.arange(len(chosen)) * CHOSEN_KINDS // max(1, len(chosen))
        kinds[runners_up] = CHOSEN_KINDS + np.arange(len(runners_up)) // STEP
        largest = np.maximum(self._averages.max(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        bins = np.minimum(BINS - 1, (self._averages / largest * BINS).astype(np.int64))
        self._cells = kinds * BINS + bins
        self.expect(info.phase is Phase.COMMIT)

    def expect(self, opening: bool) -> None:
        """What the layer's next forward is."""
        self.opening = opening
        self._order = None

    def touch(self, key: ExpertKey, event: int) -> None:
        """A candidate, new or not, had its latest event."""
        self._reach(key.expert)
        self.candidates[key] = event
        self._order = None

    def remove(self, key: ExpertKey) -> None:
        """`key` is no candidate any more."""
        del self.candidates[key]
        if self._order is not None:
            self._order = [rank for rank in self._order if rank[2] != key]

    def order(self, calibration: _Calibration) -> list[tuple[float, int, ExpertKey]]:
        """(chance, last event, key) of the candidates, rising."""
        if self._order is None:
            cells = self._cells[int(self.opening), [key.expert for key in self.candidates]]
            chances = calibration.chances(self.opening)[cells].tolist()
            ranked = zip(chances, self.candidates.values(), self.candidates, strict=True)
            self._order = sorted(ranked)
        return self._order

    def _reach(self, expert: int) -> None:
        """Have room for `expert`, and for all below it."""
        missing = expert + 1 - self._averages.shape[1]
        if missing > 0:
            self._averages = np.pad(self._averages, ((0, 0), (0, missing)))
            self._cells = np.pad(self._cells, ((0, 0), (0, missing)), constant_values=UNNAMED * BINS)


class _Entry(NamedTuple):
    """One layer's next candidate; ordered by the first two, of which no two are the same."""

    density: float
    event: int
    key: ExpertKey
    nearness: float
    following: Iterator[tuple[float, int, ExpertKey]]


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

    A routing costs O(experts of the layer), a victim O(layers) and the sorting of layers that had an event since.
    """

    name = "next-use"

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}
        self._calibration = _Calibration()
        self._events = itertools.count(1)
        self._info = ForwardInfo(Phase.DENOISE)
        self._current: int | None = None
        """The layer that routed last."""

    def begin(self, info: ForwardInfo) -> None:
        """See `EvictionPolicy`."""
        self._info = info
        if opens_block(info):
            for layer in self._layers.values():
                layer.expect(True)

    def on_route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None:
        """See `EvictionPolicy`."""
        self._current = layer
        state = self._layer(layer)
        if self._info.phase in (Phase.DENOISE, Phase.COMMIT):
            state.learn(experts, outlook, self._info, self._calibration)

    def on_insert(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        self._layer(key.layer).touch(key, next(self._events))

    def on_use(self, key: ExpertKey, score: float) -> None:  # noqa: ARG002
        """See `EvictionPolicy`. Breaks ties; the chance is from `on_route`."""
        self._layer(key.layer).touch(key, next(self._events))

    def on_remove(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`. Its uses are remembered."""
        self._layer(key.layer).remove(key)

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """See `EvictionPolicy`."""
        lowest: list[_Entry] = []
        for layer in self._layers.values():
            self._push(lowest, 1.0 / self._distance(layer), iter(layer.order(self._calibration)))
        while lowest:
            entry = heapq.heappop(lowest)
            if evictable(entry.key):
                return entry.key
            self._push(lowest, entry.nearness, entry.following)
        return None

    @staticmethod
    def _push(entries: list[_Entry], nearness: float, ranks: Iterator[tuple[float, int, ExpertKey]]) -> None:
        """The next of a layer's `ranks`, if there is one."""
        for chance, event, key in ranks:
            heapq.heappush(entries, _Entry(chance * nearness, event, key, nearness, ranks))
            return

    def _distance(self, layer: _Layer) -> int:
        """Layers until `layer` runs again: a whole sweep for the one under way, 1 for all before the first."""
        if self._current is None:
            return 1
        here = self._layers[self._current].place
        return (layer.place - here - 1) % len(self._layers) + 1

    def _layer(self, index: int) -> _Layer:
        layer = self._layers.get(index)
        if layer is None:
            layer = self._layers[index] = _Layer(0)
            for place, known in enumerate(sorted(self._layers)):
                self._layers[known].place = place
        return layer
