"""Layers that were enqueued and whose routing the books have not been told of: what came of them is read when it is
here, so that the host need not wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.errors import InternalError
from offload_engine.experts.device.exchange import Exchange
from offload_engine.experts.device.record import Found, Missing, Record
from offload_engine.experts.device.table import ABSENT, UNUSED, Row

Told = Callable[[RoutingDecision], None]
"""Hears of a decision, its experts and scores on the host."""

NOTHING: Row = np.empty(0, np.int32)
"""Where nothing is looked up."""


class Account:
    """One layer of one forward. Used by the thread that runs the engine."""

    def __init__(self, layer: int, exchange: Exchange, row: Row) -> None:
        self.layer = layer
        self.exchange = exchange
        self.row = row
        """int32 [E]: by expert, the slot that it was in for the work enqueued, or `ABSENT`."""
        self._record: Record | None = None
        self.told: Told | None = None
        """Who else is to hear of it."""
        self.moved = 0
        """Of the experts asked for so far, those that `SchedulerCounters.moved` counts."""
        self._read: Found | None = None

    @property
    def record(self) -> Record:
        """What is brought, once `bring` was called."""
        if self._record is None:
            raise InternalError(f"layer {self.layer} was asked about before it was run")
        return self._record

    def bring(self, record: Record, pieces: Callable[[], Sequence[Tensor]], reads: Sequence[Tensor] = ()) -> None:
        """Enqueue `record` and its way to the host; `pieces` and `reads` as of `Exchange.bring`."""
        self._record = record
        self.exchange.bring(record.front, record.nbytes - record.front, pieces, reads)

    def missing(self) -> Missing:
        """Wait for what is missing, the record having a front. Raises `InternalError` if the books had some of it."""
        missing = self.record.missing(self.exchange.front())
        for expert in missing.experts:
            self._compare(expert, ABSENT)
        return missing

    def landed(self) -> bool:
        """Whether `decision` would return at once."""
        return self._read is not None or self.exchange.landed()

    def decision(self) -> RoutingDecision:
        """Wait for the rest, and return the decision, its experts and scores on the host. Raises `InternalError` unless
        the device found every expert where the books had it.
        """
        if self._read is None:
            read = self.record.read(self.exchange.rest())
            self._check(read.slots)
            self._read = read
        return self._read.decision

    def found(self) -> dict[int, int]:
        """The experts that are computed by what was enqueued, and their slots, once `decision` has been read."""
        slots = None if self._read is None else self._read.slots
        return {} if slots is None else {expert: slot for expert, slot in enumerate(slots.tolist()) if slot >= 0}

    def _check(self, slots: Tensor | None) -> None:
        if slots is None:
            return
        seen = slots.numpy()
        for expert in ((seen != UNUSED) & (seen != self.row)).nonzero()[0].tolist():
            self._compare(expert, int(seen[expert]))
        if not self.record.front and (seen == ABSENT).any():
            raise InternalError(f"layer {self.layer} misses experts, but the books had all of them in slots")

    def _compare(self, expert: int, slot: int) -> None:
        known = int(self.row[expert])
        if slot != known:
            raise InternalError(
                f"expert {expert} of layer {self.layer} is in slot {known}, "
                f"but the slot table on the device said {slot} ({ABSENT}: none)"
            )


class Accounts:
    """The open ones, oldest first, no more than there are `exchanges`."""

    def __init__(self, exchanges: Sequence[Exchange]) -> None:
        self.exchanges = list(exchanges)
        self._free = deque(self.exchanges)
        """The one that has been free for longest comes first."""
        self.open: deque[Account] = deque()

    @property
    def full(self) -> bool:
        """Whether one must be closed before another is opened."""
        return not self._free

    def begin(self, layer: int, row: Row = NOTHING) -> Account:
        """Open one, unless `full`; its exchange has begun."""
        self._free[0].begin()
        account = Account(layer, self._free[0], row)
        self.open.append(account)
        self._free.popleft()
        return account

    def end(self) -> None:
        """The oldest has been read."""
        self._free.append(self.open[0].exchange)
        self.open.popleft()

    def forget(self) -> None:
        """None will be read, as after an interrupt: whoever uses an exchange again waits for what it was bringing."""
        self.open.clear()
        self._free = deque(self.exchanges)

    def close(self) -> None:
        """Give everything back, once everything enqueued has run. Idempotent."""
        self.forget()
        for exchange in self.exchanges:
            exchange.close()
