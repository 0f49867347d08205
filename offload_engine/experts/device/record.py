"""What the host learns of a layer that has routed on the device.

First what is missing, for which it waits: who is in no slot, in the order in which to fetch them. Then, for its books,
where all tokens go and where their experts were found.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.device.table import ABSENT
from offload_engine.routing.base import total

WORD = 4
"""Bytes of a count, a slot, an expert's number or a score."""


class Missing(NamedTuple):
    """The experts wanted that no slot was found for, by falling block score summed over the blocks."""

    experts: list[int]
    scores: list[float]


class Found(NamedTuple):
    """The rest of a record, read."""

    decision: RoutingDecision
    """Experts and block scores on the host, the rest where it was."""
    slots: Tensor | None
    """int32 [E]: the slot that each expert was found in, `ABSENT` or `UNUSED`; None where nothing was looked up."""


class Record:
    """The bytes of one layer's news, in two parts.

    `front`, where something was looked up and the host waits for it: how many experts are missing, int32, who they are,
    int32 [E], and their scores, float32 [E]; what lies behind that many means nothing. Then the decision, [T, k] int64
    and, if it has them, scores [B, E] float32; and the look-up of `experts` slots, int32 [E].
    """

    def __init__(self, decision: RoutingDecision, experts: int = 0, *, waited_for: bool = True) -> None:
        """`experts`: as many are looked up; `waited_for`: it is to have a `front` then."""
        self.decision = decision
        self._scores = decision.block_scores
        self._experts = experts
        self.front = WORD * (1 + 2 * experts) if experts and waited_for else 0
        """Bytes of the first part."""
        self.sizes = [decision.experts.nbytes, 0 if self._scores is None else self._scores.nbytes, WORD * experts]

    @property
    def nbytes(self) -> int:
        """Of both parts together."""
        return self.front + sum(self.sizes)

    def pieces(self, slots: Tensor | None = None) -> list[Tensor]:
        """What it is made of, on the decision's device; `slots` if there was a look-up. What is missing comes with the
        decision, if that was shown the table.
        """
        lookup, first = self.decision.lookup, list[Tensor]()
        if slots is not None and self.front:
            first = missing_first(slots, self._scores) if lookup is None else [lookup.missing, lookup.scores]
        found = (self.decision.experts, self._scores, slots)
        return [*first, *(piece.contiguous() for piece in found if piece is not None)]

    def missing(self, raw: Tensor) -> Missing:
        """The first part as it came, uint8 [front]."""
        return read_missing(raw)

    def read(self, raw: Tensor) -> Found:
        """The second part as it came, uint8."""
        chosen, scores, slots = raw.split(self.sizes)
        decision = replace(
            self.decision,
            lookup=None,
            experts=chosen.view(torch.int64).view(self.decision.experts.shape),
            block_scores=None if self._scores is None else scores.view(torch.float32).view(self._scores.shape),
        )
        return Found(decision, slots.view(torch.int32) if self._experts else None)


def read_missing(raw: Tensor) -> Missing:
    """What `missing_first` made, as it came: uint8 [4 * (1 + 2 * E)]."""
    words = raw.view(torch.int32)
    count, experts = int(words[0]), len(words) // 2
    return Missing(words[1 : 1 + count].tolist(), words[1 + experts :].view(torch.float32)[:count].tolist())


def missing_first(slots: Tensor, block_scores: Tensor | None) -> list[Tensor]:
    """Of a look-up [E] int32: how many are `ABSENT`, int32 [1]; all experts, int32 [E], these first, by falling sum of
    `block_scores` [B, E] (None: all alike), ties to the lower index; and their sums, float32 [E], in the same order.
    """
    absent = slots == ABSENT
    if block_scores is None:
        sums = torch.ones_like(slots, dtype=torch.float32)
    else:  # damaged weights must not damage the cache's books
        sums = total(block_scores, 0)[0].nan_to_num()
    order = sums.masked_fill(~absent, -torch.inf).argsort(descending=True, stable=True)
    return [absent.sum(dtype=torch.int32).view(1), order.int(), sums[order]]
