"""How many sequences should share a forward: as many as the expert cache serves. No torch, no clock."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Literal, NamedTuple

WINDOW = 32
"""Forwards of a lane that are remembered: two to four blocks of its answers."""
SAMPLES = 4
"""Groups of a size that are looked at, at most."""
REVIEW = 32
"""Forwards of single lanes after which a decision is taken again."""
KINDS = 8
"""Kinds of lanes that are remembered; the one that was told of longest ago is forgotten first."""
LEEWAY = 0.3
"""By how much the loads of a larger group may exceed the fewest: with more lanes in a forward each expert that was
loaded does more work, and the weights of attention and head are read once for all. Original routing on llada2-mini's
shape, 44 slots per layer: 8 lanes together moved 4 % more bytes per token than one alone, in 31 % less time.
"""
FREE_SHARE = 0.02
"""Loads that cost nothing worth naming, as a share of the experts that one lane wants in a forward."""

Uses = dict[int, int]
"""What one forward used for one lane: by layer, bit e set for expert e."""


class Demand(NamedTuple):
    """What a group of lanes wants of a layer, in a mean over layers."""

    wanted: float
    """Distinct experts of a forward."""
    fresh: float
    """Of these, the ones that the forward before did not want."""
    pool: float
    """Distinct experts of all forwards remembered."""
    first: float
    """Of these, per forward: so many are wanted for the first time."""

    def loads(self, slots: float, universe: float) -> float:
        """Loads per forward with so many `slots` per layer and an eviction that foresees well; all lanes known want
        `universe` distinct experts of a layer.

        What a forward wants beyond the slots is loaded in every one, and then what is fresh too. Slots that it leaves
        over hold their share of the rest of the pool, from which comes what is fresh. What is wanted for the first time
        is here by chance. Against replays of recorded traces through the production cache: docs/LOG.md.
        """
        first = self.first * max(0.0, 1.0 - slots / universe)
        if self.wanted >= slots:
            return self.wanted - slots + self.fresh + first
        rest = self.pool - self.wanted
        return first + (self.fresh * max(0.0, 1.0 - (slots - self.wanted) / rest) if rest > 0 else 0.0)


class _Kind:
    """What is remembered of the lanes of one kind."""

    def __init__(self) -> None:
        self.histories: dict[int, deque[Uses]] = {}
        """By lane: its latest forwards, the newest last."""
        self.told = 0
        """Forwards of single lanes so far."""
        self.decided: tuple[int, float, int, int] | None = None
        """The last decision: for how many lanes, with how many slots, after how many forwards, and what it was."""


class Grouping:
    """Watches what lanes use and says how many should go together.

    Lanes of another kind (routing policy, block length) use other experts; each kind is judged by itself. What is
    decided depends on nothing but the calls made, in their order.
    """

    def __init__(self, slots_per_layer: Callable[[], float], size: int | Literal["auto"] = "auto") -> None:
        """A number for `size`: so many lanes go together, whatever they use."""
        self._slots_per_layer = slots_per_layer
        self._size = size
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
        """How many lanes of this kind, 1 to `most`, should share forwards: the largest group whose loads per lane are
        within `LEEWAY` of the fewest. While fewer than `most` lanes are known, all: so they become known.
        """
        if self._size != "auto":
            return min(most, self._size)
        known = self._kinds.get(kind)
        if known is None or len(known.histories) < most or most == 1:
            return most
        slots = self._slots_per_layer()
        if known.decided is None or known.decided[:2] != (most, slots) or known.told - known.decided[2] >= REVIEW:
            known.decided = most, slots, known.told, _best(list(known.histories.values()), most, slots)
        return known.decided[3]


def loads_by_size(histories: Sequence[Sequence[Uses]], most: int, slots: float) -> dict[int, float]:
    """Loads per layer, lane and forward, estimated for groups of each of `sizes(most)` lanes with such histories."""
    demands = {size: demand_of(histories, size) for size in sizes(most)}
    universe = max(1.0, _group_demand(histories).pool)
    return {size: demand.loads(slots, universe) / size for size, demand in demands.items()}


def _best(histories: Sequence[Sequence[Uses]], most: int, slots: float) -> int:
    """The size, 1 to `most`, of groups of lanes with such histories."""
    loads = loads_by_size(histories, most, slots)
    limit = min(loads.values()) * (1 + LEEWAY) + FREE_SHARE * demand_of(histories, 1).wanted
    return max(size for size, estimate in loads.items() if estimate <= limit)


def demand_of(histories: Sequence[Sequence[Uses]], size: int) -> Demand:
    """What `size` of the lanes with these histories want, in a mean over as many such groups as they make."""
    starts = range(0, len(histories) - size + 1, size)[:SAMPLES]
    return _mean([_group_demand(histories[start : start + size]) for start in starts])


def sizes(most: int) -> list[int]:
    """Sizes of groups worth comparing, rising: 1 to 8, then in steps of about a quarter, and `most` itself."""
    found = [1]
    while found[-1] < most:
        found.append(min(most, found[-1] + max(1, found[-1] // 4)))
    return found


def _group_demand(histories: Sequence[Sequence[Uses]]) -> Demand:
    """Of lanes with these histories, put side by side from their newest forwards backwards."""
    length = min(map(len, histories))
    recent = [list(history)[-length:] for history in histories]
    demands = []
    for layer in recent[0][0]:
        unions = [reduce(or_, (uses.get(layer, 0) for uses in forward)) for forward in zip(*recent, strict=True)]
        fresh = [(now & ~before).bit_count() for before, now in pairwise(unions)]
        demands.append(
            Demand(
                sum(union.bit_count() for union in unions) / length,
                sum(fresh) / max(1, len(fresh)),
                reduce(or_, unions).bit_count(),
                reduce(or_, unions).bit_count() / length,
            )
        )
    return _mean(demands)


def _mean(demands: Sequence[Demand]) -> Demand:
    return Demand(*(sum(parts) / len(demands) for parts in zip(*demands, strict=True)))
