"""Which slot each expert of a layer is in: on the device, where launched work can look it up, and as the host knows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.experts.transfer.driver import StreamDriver

ABSENT, UNUSED = -1, -2
"""In place of a slot: the expert is in none, or no token wants it."""

Row = npt.NDArray[np.int32]


class SlotTable:
    """A row [E] int32 per layer: each expert's slot, or `ABSENT`.

    An expert stands in its row from when the copy into its slot is known to have landed, so that whoever looks it up
    waits for no copy, until the slot is given to another expert. The host's rows are always up to date. The device's
    are what the host's were when last sent, on the compute stream: work launched later finds what stood there at its
    launch, provided that a stale row is sent before it. Calls must be serialised.
    """

    def __init__(self, driver: StreamDriver, experts: Mapping[int, int], slots: int) -> None:
        """`experts`: by layer, how many it has. Raises `MemoryBudgetError`."""
        self._slots = slots
        starts = np.cumsum([0, *experts.values()]).tolist()
        memory = driver.allocate(starts[-1] * np.dtype(np.int32).itemsize)
        places = dict(zip(experts, itertools.pairwise(starts), strict=True))
        self._device = {layer: memory[4 * start : 4 * end] for layer, (start, end) in places.items()}
        self._experts = dict(experts)
        self.reset()

    def reset(self) -> None:
        """Forget every expert, as after an interrupt."""
        self._rows = {layer: np.full(count, ABSENT, np.int32) for layer, count in self._experts.items()}
        self._copied: dict[int, dict[int, int]] = {layer: {} for layer in self._experts}
        """By layer, experts and their slots, copies into which were not known to have landed when last asked about."""
        self._holders: list[ExpertKey | None] = [None] * self._slots
        self._stale = set(self._experts)

    def rename(self, slots: int, moves: Mapping[int, int]) -> None:
        """There are `slots` slots now, and what was in a slot is in the one that `moves` names for it, if anywhere.
        Every copy has landed.
        """
        held = {target: key for slot, target in moves.items() if (key := self._holders[slot]) is not None}
        self._slots = slots
        self.reset()
        for slot, key in held.items():
            self._holders[slot] = key
            self._rows[key.layer][key.expert] = slot

    def fill(self, key: ExpertKey, slot: int) -> None:
        """The copy of `key` into `slot` is enqueued."""
        self._holders[slot] = key
        self._copied[key.layer][key.expert] = slot

    def clear(self, slot: int) -> None:
        """`slot` is given to another expert. To be called before that one's copy is asked for."""
        key, self._holders[slot] = self._holders[slot], None
        if key is None:
            return
        if self._copied[key.layer].pop(key.expert, None) is None:
            self._rows[key.layer][key.expert] = ABSENT
            self._stale.add(key.layer)

    def settle(self, layer: int, landed: Callable[[int], bool]) -> Row:
        """Enter the experts of `layer` whose copies have `landed` into their slots; its row."""
        copied, row = self._copied[layer], self._rows[layer]
        for expert, slot in list(copied.items()):
            if landed(slot):
                del copied[expert]
                row[expert] = slot
                self._stale.add(layer)
        return row

    def on_device(self, layer: int) -> Tensor:
        """The device's row, as bytes."""
        return self._device[layer]

    def is_stale(self, layer: int) -> bool:
        """Whether the device's row is not the host's."""
        return layer in self._stale

    def sent(self, layer: int) -> None:
        """The host's row is on its way, ahead of whatever is launched from now on."""
        self._stale.discard(layer)
