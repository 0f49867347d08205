"""Which resident expert goes when a slot is needed.

A policy only orders: it sees events and names victims. Slots, states, pins and probation are the cache's business,
kept once for all policies. To add a policy, write a class and enter it in `EVICTION`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from offload_engine.core import ExpertKey, ForwardInfo
from offload_engine.errors import ConfigError
from offload_engine.experts.scheduling.next_use import NextUse
from offload_engine.experts.scheduling.outlook import Outlook
from offload_engine.experts.scheduling.ranking import Ranking


class EvictionPolicy(Protocol):
    """Orders the experts it was told of. The cache tells it of those that are resident and not on probation.

    Deterministic: equal histories give equal victims. Wherever a policy's own measure ties, the expert whose last event
    (`on_insert` or `on_use`) is oldest goes first; each event is later than all before it, so nothing is left to tie.
    """

    @property
    def name(self) -> str:
        """The policy's name in configs and on the command line."""

    def begin(self, info: ForwardInfo) -> None:
        """A forward starts."""

    def on_route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None:
        """`layer` routed and wants these experts, resident or not; their loads and uses follow."""

    def on_insert(self, key: ExpertKey) -> None:
        """`key`, unknown so far, is now among the candidates: it was loaded, or its probation ended."""

    def on_use(self, key: ExpertKey, score: float) -> None:
        """A candidate was used; `score` is how much the block wanted it (its block score, not negative)."""

    def on_remove(self, key: ExpertKey) -> None:
        """A candidate left the cache."""

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The candidate to evict first among those that are `evictable`; None where none is. Changes nothing."""


class _Unrouted:
    """What policies share that go by a candidate's uses alone and remember nothing of those that left."""

    def begin(self, info: ForwardInfo) -> None:
        """See `EvictionPolicy`."""

    def on_route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None:
        """See `EvictionPolicy`."""


class LRU(_Unrouted):
    """Evicts the least recently used. Every event is O(1); a victim costs one step per pinned expert passed over."""

    name = "lru"

    def __init__(self) -> None:
        # Unlike dict, whose first key lies behind all that were deleted before it, OrderedDict finds it in O(1).
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def on_insert(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        self._order[key] = None

    def on_use(self, key: ExpertKey, score: float) -> None:  # noqa: ARG002
        """See `EvictionPolicy`. The score does not matter."""
        self._order.move_to_end(key)

    def on_remove(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        del self._order[key]

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """See `EvictionPolicy`."""
        return next((key for key in self._order if evictable(key)), None)


class LFU(_Unrouted):
    """Evicts the least frequently used; ties go to the least recently used.

    Old counts fade: whenever there were `uses_per_halving` uses per candidate since the last time, every count is
    halved and rounded down (the ageing of TinyLFU, Einziger et al. 2017, whose sample is likewise a multiple of the
    cache's size). A count starts at 0 when its expert is inserted.
    """

    name = "lfu"

    def __init__(self, uses_per_halving: int = 8) -> None:
        self.uses_per_halving = uses_per_halving
        self._uses = 0
        self._ranking = Ranking()

    def on_insert(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        self._ranking.place(key, 0)

    def on_use(self, key: ExpertKey, score: float) -> None:  # noqa: ARG002
        """See `EvictionPolicy`. The score does not matter. O(log n); a halving is O(n) in O(n) uses."""
        self._ranking.place(key, self._ranking.worth(key) + 1)
        self._uses += 1
        if self._uses >= self.uses_per_halving * len(self._ranking):
            self._uses = 0
            self._ranking.rescale(lambda count: count // 2)

    def on_remove(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        self._ranking.remove(key)

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """See `EvictionPolicy`."""
        return self._ranking.lowest(evictable)


class ScoreAware(_Unrouted):
    """Evicts the lowest sum of block scores, each faded exponentially since its use; ties to the least recently used.

    An expert is worth the sum over its uses u of s(u) / prod over all later uses, of any expert, of (1 + 1 / (m n)),
    with s the block score, n the candidates at that later use and m = `memory`: a score has faded to 1/e after about
    m uses per candidate. Fading is by use because a policy has no clock. An expert starts at 0 when inserted.
    """

    name = "score-aware"

    _LARGEST_UNIT = 2.0**256

    def __init__(self, memory: float = 4.0) -> None:
        self.memory = memory
        self._unit = 1.0
        """What a score of 1 is worth now. It grows instead of all others fading, which keeps their order as it is."""
        self._ranking = Ranking()

    def on_insert(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        self._ranking.place(key, 0.0)

    def on_use(self, key: ExpertKey, score: float) -> None:
        """See `EvictionPolicy`. O(log n); the rescaling is O(n) and comes once in over 170 m n uses."""
        self._unit *= 1.0 + 1.0 / (self.memory * len(self._ranking))
        if self._unit > self._LARGEST_UNIT:
            unit, self._unit = self._unit, 1.0
            self._ranking.rescale(lambda worth: worth / unit)
        self._ranking.place(key, self._ranking.worth(key) + score * self._unit)

    def on_remove(self, key: ExpertKey) -> None:
        """See `EvictionPolicy`."""
        self._ranking.remove(key)

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """See `EvictionPolicy`."""
        return self._ranking.lowest(evictable)


EVICTION: dict[str, Callable[[], EvictionPolicy]] = {
    "lru": LRU,
    "lfu": LFU,
    "score-aware": ScoreAware,
    "next-use": NextUse,
}


def make_eviction(name: str) -> EvictionPolicy:
    """A fresh policy called `name`; raises `ConfigError` for an unknown name."""
    if name not in EVICTION:
        raise ConfigError(f"eviction is {name!r}; choose one of {', '.join(EVICTION)}")
    return EVICTION[name]()
