"""Guesses that a device makes: how coming layers would route what is there now, read when it has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.device.exchange import Exchange
from offload_engine.experts.device.record import WORD, Missing, missing_first, read_missing
from offload_engine.experts.device.table import ABSENT, UNUSED
from offload_engine.kernels import cuda_selection
from offload_engine.model.moe import Preview


class _Asked(NamedTuple):
    exchange: Exchange
    layer: int
    """That was about to run."""
    coming: Sequence[int]
    """Those that were asked about."""


class Previews:
    """What the routers of coming layers say, ranked on the device.

    One layer's previews are of use at a time. What is asked about a later one takes the place of what has not come,
    unless all exchanges are still under way: then nothing is asked.
    """

    def __init__(self, exchanges: Sequence[Exchange], experts: Mapping[int, int], device: torch.device) -> None:
        """`experts`: by layer, how many it has."""
        self.exchanges = list(exchanges)
        self._experts = experts
        self._absent = torch.full((max(experts.values(), default=0),), ABSENT, dtype=torch.int32, device=device)
        """A slot table in which nobody is: whoever is chosen is missing, and so comes ranked."""
        self._finished = torch.zeros(1, dtype=torch.int32, device=device)
        self._asked: _Asked | None = None

    def ask(self, layer: int, coming: Sequence[int], preview: Preview) -> bool:
        """Enqueue the previews of `coming` layers, `layer` being about to run; whether there was room for them."""
        self.drop()
        exchange = next((one for one in self.exchanges if one.idle()), None)
        if exchange is None:
            return False
        decisions = [self._decide(ahead, preview) for ahead in coming]
        sizes = [self._experts[ahead] for ahead in coming]

        def pieces() -> list[Tensor]:
            pairs = zip(decisions, sizes, strict=True)
            return [piece for decision, experts in pairs for piece in _ranking(decision, experts)]

        exchange.begin()
        exchange.bring(0, sum(map(_nbytes, sizes)), pieces)
        self._asked = _Asked(exchange, layer, tuple(coming))
        return True

    def heard(self, *, wait: bool = False) -> tuple[int, list[tuple[int, Missing]]] | None:
        """The layer that was about to run, and what each of the coming ones would choose; None if that was told, or
        dropped, or has not come, unless it is to `wait` for it.
        """
        asked = self._asked
        if asked is None or not (wait or asked.exchange.landed()):
            return None
        parts = asked.exchange.rest().split([_nbytes(self._experts[ahead]) for ahead in asked.coming])
        self._asked = None
        return asked.layer, [(ahead, read_missing(part)) for ahead, part in zip(asked.coming, parts, strict=True)]

    def drop(self) -> None:
        """What was asked is of no use any more."""
        self._asked = None

    def close(self) -> None:
        """Give everything back, once everything enqueued has run. Idempotent."""
        self.drop()
        for exchange in self.exchanges:
            exchange.close()

    def _decide(self, ahead: int, preview: Preview) -> RoutingDecision:
        absent = self._absent[: self._experts[ahead]]
        with cuda_selection.looking_up(cuda_selection.SlotTable.over(absent, self._finished)):
            return preview(ahead)


def _nbytes(experts: int) -> int:
    return WORD * (1 + 2 * experts)


def _ranking(decision: RoutingDecision, experts: int) -> list[Tensor]:
    """As `missing_first`, of all experts chosen."""
    if decision.lookup is not None:
        return [decision.lookup.missing, decision.lookup.scores]
    chosen = decision.experts
    slots = torch.full((experts + 1,), UNUSED, dtype=torch.int32, device=chosen.device)
    slots.index_fill_(0, chosen.flatten() + 1, ABSENT)  # -1, no expert, is the first place
    return missing_first(slots[1:], decision.block_scores)
