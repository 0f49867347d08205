"""The ways an expert may travel on the virtual clock: from disk, or from host memory over the link, or both."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from offload_engine.core import ExpertKey
from offload_engine.experts.scheduling.cache import ExpertCache, SlotState


@dataclass(slots=True)
class Channel:
    """A link that moves one thing at a time: after `latency` seconds, which overlap the thing before, it takes it for
    `seconds`.
    """

    seconds: float
    """Of one expert."""
    latency: float = 0.0
    busy: float = 0.0
    """Seconds it was taken, what is under way included."""
    _free: float = 0.0

    def take(self, now: float) -> float:
        """Begin a transfer at `now`, in the order of calls; when it will have arrived."""
        start = max(now + self.latency, self._free)
        self._free = start + self.seconds
        self.busy += self.seconds
        return self._free


class Transfers(Protocol):
    """What carries out loads on the virtual clock."""

    def begin(self, key: ExpertKey, now: float) -> None:
        """A load of `key` is issued."""

    def next_event(self) -> float | None:
        """When something happens next; None where nothing is under way."""

    def advance(self) -> tuple[float, ExpertKey | None]:
        """Carry out the next event: its time, and the expert that arrived with it, if any did."""

    def hosted(self, keys: Iterable[ExpertKey]) -> list[bool]:
        """Which of these are in host memory, from which the CPU may compute them."""

    def computed(self, keys: Iterable[ExpertKey]) -> None:
        """The CPU has computed these from host memory."""

    @property
    def busy(self) -> float:
        """Seconds the last link before the slots was taken."""

    @property
    def seconds(self) -> float:
        """Of one expert on that link."""


@dataclass(slots=True)
class Direct:
    """One channel straight into the slots: disk on a machine without a GPU, the link where the host holds all."""

    channel: Channel
    from_host: bool = False
    """Whether it comes from host memory."""
    _flying: list[tuple[float, int, ExpertKey]] = field(default_factory=list)
    """Heap of (arrival, number, key); the number keeps what arrives together in the order of issue."""
    _issued: int = 0

    def begin(self, key: ExpertKey, now: float) -> None:
        """See `Transfers`."""
        heapq.heappush(self._flying, (self.channel.take(now), self._issued, key))
        self._issued += 1

    def next_event(self) -> float | None:
        """See `Transfers`."""
        return self._flying[0][0] if self._flying else None

    def advance(self) -> tuple[float, ExpertKey | None]:
        """See `Transfers`."""
        at, _number, key = heapq.heappop(self._flying)
        return at, key

    def hosted(self, keys: Iterable[ExpertKey]) -> list[bool]:
        """See `Transfers`."""
        return [self.from_host for _key in keys]

    def computed(self, keys: Iterable[ExpertKey]) -> None:
        """See `Transfers`: nothing is forgotten here."""

    @property
    def busy(self) -> float:
        """See `Transfers`."""
        return self.channel.busy

    @property
    def seconds(self) -> float:
        """See `Transfers`."""
        return self.channel.seconds


@dataclass(slots=True)
class Tiered:
    """Disk into the slots of a host tier, and from there over the link; the tier is an `ExpertCache` as the engine's.

    An expert whose copy to the device is under way is pinned on the host. The tier needs as many slots as
    there may be loads at once.
    """

    disk: Channel
    link: Channel
    host: ExpertCache
    disk_loads: int = 0
    _events: list[tuple[float, int, ExpertKey, bool]] = field(default_factory=list)
    """Heap of (time, number, key, whether it then is on the device rather than on the host)."""
    _number: int = 0

    def begin(self, key: ExpertKey, now: float) -> None:
        """See `Transfers`. What the host has goes over the link at once; else it is read into a slot there first."""
        if self.host.state(key) is SlotState.RESIDENT:
            self._over_the_link(key, now)
            return
        self.disk_loads += 1
        self.host.reserve(key, prefetch=False)  # not refused: others have no pin
        self._push(self.disk.take(now), key, landed=False)

    def next_event(self) -> float | None:
        """See `Transfers`."""
        return self._events[0][0] if self._events else None

    def advance(self) -> tuple[float, ExpertKey | None]:
        """See `Transfers`."""
        at, _number, key, landed = heapq.heappop(self._events)
        if landed:
            self.host.use(key, 1.0)
            self.host.unpin(key)
            return at, key
        self.host.loaded(key)
        self._over_the_link(key, at)
        return at, None

    def hosted(self, keys: Iterable[ExpertKey]) -> list[bool]:
        """See `Transfers`."""
        return [self.host.state(key) is SlotState.RESIDENT for key in keys]

    def computed(self, keys: Iterable[ExpertKey]) -> None:
        """See `Transfers`."""
        for key in keys:
            self.host.use(key, 1.0)

    @property
    def busy(self) -> float:
        """See `Transfers`."""
        return self.link.busy

    @property
    def seconds(self) -> float:
        """See `Transfers`."""
        return self.link.seconds

    def _over_the_link(self, key: ExpertKey, now: float) -> None:
        self.host.pin(key)
        self._push(self.link.take(now), key, landed=True)

    def _push(self, at: float, key: ExpertKey, *, landed: bool) -> None:
        heapq.heappush(self._events, (at, self._number, key, landed))
        self._number += 1
