"""How many sequences should share a forward: as many as the expert cache serves. No torch, no clock."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from operator import or_
from typing import Literal

WINDOW = 32
"""Forwards of a lane that are remembered: two to four blocks of its answers."""
KNOWN = 8
"""Forwards after which a lane counts as known: about a block."""
REVIEW = 16
"""Forwards of each known lane, on average, after which a decision is taken again."""
LAYERS = 5
"""Layers that are looked at, at most."""
KINDS = 8
"""Kinds of lanes that are remembered; the one that was told of longest ago is forgotten first."""
ERROR = 0.05
"""By how much loads may be underestimated beside those of one lane alone, against replays: a group has to be so much
better than that, for a batch is not to load more than its lanes one by one.
"""
LEEWAY = 0.1
"""By how much the loads of a larger group may exceed the fewest: each expert loaded does more work in it, and the
weights of attention and head are read once for all.
"""
STAY = 0.1
"""By how much more the loads of the size decided last may exceed all that: every change costs loads."""
FREE_SHARE = 0.01
"""Loads that cost nothing worth naming, as a share of the experts that one lane wants in a forward."""

Uses = dict[int, int]
"""What one forward used for one lane: by layer, bit e set for expert e."""


class _Kind:
    """What is remembered of the lanes of one kind."""

    def __init__(self) -> None:
        self.histories: dict[int, deque[Uses]] = {}
        """By lane: its latest forwards, the newest last."""
        self.told = 0
        """Forwards of single lanes so far."""
        self.asked: tuple[int, float, int] | None = None
        """What the last decision was for: how many lanes, how many slots, how many lanes known."""
        self.decided = 1
        """What it was."""
        self.decided_at = 0
        """`told` at that time."""

    @property
    def known(self) -> list[deque[Uses]]:
        """Histories that are long enough to judge by."""
        return [history for history in self.histories.values() if len(history) >= KNOWN]


class Grouping:
    """Watches what lanes use and says how many should go together.

    Lanes of another kind (routing policy, block length) use other experts; each kind is judged by itself. What is
    decided depends on nothing but the calls made, in their order.
    """

    def __init__(
        self, slots_per_layer: Callable[[], float], size: int | Literal["auto"] = "auto", experts: float = math.inf
    ) -> None:
        """A number for `size`: so many lanes go together, whatever they use. `experts` per layer: as many slots hold
        what any number of lanes wants.
        """
        self._slots_per_layer = slots_per_layer
        self._size = size
        self._experts = experts
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._current = _Kind()

    def begin(self, kind: Hashable) -> None:
        """A denoising forward of lanes of this kind begins."""
        self._current = self._kinds.setdefault(kind, _Kind())
        self._kinds.move_to_end(kind)
        if len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)

    def saw(self, lane: int, layer: int, experts: Iterable[int]) -> None:
        """The forward used these distinct `experts` of `layer` for the block that `lane` denoises; layers in order."""
        history = self._current.histories.setdefault(lane, deque(maxlen=WINDOW))
        if not history or layer in history[-1]:
            history.append({})
            self._current.told += 1
        history[-1][layer] = reduce(or_, (1 << expert for expert in experts), 0)

    def together(self, kind: Hashable, most: int) -> int:
        """How many lanes of this kind, 1 to `most`, should share forwards.

        The largest group that loads no more per lane than one alone and hardly more than the best. If that is one of
        all lanes known, half as many more, so that they become known: what lanes want that nobody has seen yet is not
        guessed, and few of them at a time do little harm.
        """
        if self._size != "auto":
            return min(most, self._size)
        slots = self._slots_per_layer()
        if slots >= self._experts:
            return most
        one = self._kinds.get(kind)
        known = [] if one is None else one.known
        if one is None or not known or most == 1:
            return 1
        asked = most, slots, len(known)
        if asked != one.asked or one.told - one.decided_at >= REVIEW * len(known):
            one.decided = _decide(known, most, int(slots), one.decided)
            one.asked, one.decided_at = asked, one.told
        return one.decided


def _decide(known: Sequence[Sequence[Uses]], most: int, slots: int, before: int) -> int:
    """The size, 1 to `most`, of groups of lanes with such histories; `before` is what was decided last."""
    loads = loads_by_size(known, {*sizes(min(most, len(known))), min(before, most, len(known))}, slots)
    free = FREE_SHARE * _wanted(known)
    limit = min(loads[1] * (1 - ERROR), min(loads.values()) * (1 + LEEWAY)) + free
    fit = (size for size in loads if loads[size] <= limit * (1 + STAY * (size == before)))
    best = max(fit, default=1)
    return min(most, best + (best + 1) // 2) if best == len(known) else best


def loads_by_size(histories: Sequence[Sequence[Uses]], compared: Iterable[int], slots: int) -> dict[int, float]:
    """Loads per layer, lane and forward if lanes with such histories went in groups of each size `compared`.

    The histories, side by side from their newest forwards backwards, are run through `slots` per layer, group after
    group and all twice, of which the second counts. The slots hold the experts used last: against the production cache
    on recorded traces that is off by less than 10 % in most cases (docs/LOG.md).
    """
    length = min(map(len, histories))
    recent = [list(history)[-length:] for history in histories]
    layers = list(recent[0][0])
    layers = layers[:: -(-len(layers) // LAYERS)]
    return {
        size: sum(_loads(_unions(recent, size, layer), slots) for layer in layers)
        / (len(layers) * length * size * -(-len(recent) // size))
        for size in compared
    }


def _unions(histories: Sequence[Sequence[Uses]], size: int, layer: int) -> list[int]:
    """What each forward wants of `layer` as lanes go in groups of `size`, one group after the other; the first lanes
    fill up the last one.
    """
    around = [*histories, *histories]
    groups = (around[start : start + size] for start in range(0, len(histories), size))
    return [
        reduce(or_, (uses.get(layer, 0) for uses in forward))
        for group in groups
        for forward in zip(*group, strict=True)
    ]


def _loads(forwards: Sequence[int], slots: int) -> int:
    """Experts that the forwards load when they are gone through again, in a cache of those used last."""
    held: list[int] = []
    """Distinct experts by how long ago they were used, those of the last forward first."""
    loads = 0
    for again in (False, True):
        for forward in forwards:
            if again:
                loads += (forward & ~reduce(or_, held, 0)).bit_count()
            held = _latest([forward, *(mask & ~forward for mask in held)], slots)
    return loads


def _latest(masks: Iterable[int], slots: int) -> list[int]:
    """As many bits of these disjoint `masks` as there are slots, the first masks first."""
    kept = []
    for mask in masks:
        if mask.bit_count() > slots:
            mask = _some(mask, slots)
        slots -= mask.bit_count()
        if mask:
            kept.append(mask)
        if slots <= 0:
            break
    return kept


def _some(mask: int, count: int) -> int:
    """`count` of the bits of `mask`, which has more."""
    while mask.bit_count() > count:
        mask &= mask - 1
    return mask


def _wanted(histories: Sequence[Sequence[Uses]]) -> float:
    """Experts of a layer that one lane wants in a forward, on average."""
    counts = [mask.bit_count() for history in histories for uses in history for mask in uses.values()]
    return sum(counts) / len(counts)


def sizes(most: int) -> list[int]:
    """Sizes of groups worth comparing, rising: 1 to 8, then in steps of about a quarter, and `most` itself."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, found[-1] // 4)))
    return found
