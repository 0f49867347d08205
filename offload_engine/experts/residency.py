"""What may be asked, at any time, of the cache that experts are run out of."""

from __future__ import annotations

import threading

from offload_engine.core import ExpertKey
from offload_engine.experts.scheduling.cache import Occupancy, SlotState
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.experts.storage.store import ExpertStore


class Residency:
    """The part of an executor that tells which experts have slots. Its methods may be called from any thread."""

    def __init__(self, store: ExpertStore, scheduler: ExpertScheduler) -> None:
        self.scheduler = scheduler
        self._keys_of_layer: dict[int, list[ExpertKey]] = {}
        for key in store.keys():  # noqa: SIM118 (a store is no mapping)
            self._keys_of_layer.setdefault(key.layer, []).append(key)
        self.layers = sorted(self._keys_of_layer)
        self._last_layer = self.layers[-1] if self.layers else -1
        self._changed = threading.RLock()
        """Guards the scheduler: its events come from the compute thread and from the driver's threads. Not a condition,
        which an interrupt can leave locked."""

    def occupancy(self) -> Occupancy:
        """The cache's slots by state."""
        with self._changed:
            return self.scheduler.cache.occupancy()

    def states(self) -> dict[ExpertKey, SlotState]:
        """Every expert that has a slot just now, and whether it is there already."""
        with self._changed:
            return self.scheduler.cache.states()

    def residents(self, layer: int) -> list[int]:
        """The experts of `layer` that have a slot just now: here already, or on their way."""
        keys = self._keys_of_layer[layer]
        with self._changed:
            return [key.expert for key in self.scheduler.cache.held(keys)]
