"""What the host learns of a layer that has routed on the device: where its tokens go, and what was there for them."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision


class Found(NamedTuple):
    """A record, read."""

    decision: RoutingDecision
    """Experts and block scores on the host, the rest where it was."""
    slots: Tensor | None
    """int32 [E]: the slot that each expert was found in, `ABSENT` or `UNUSED`; None where nothing was looked up."""


class Record:
    """The bytes of a decision, [T, k] int64 if it has scores [B, E] float32, and a look-up of `experts` slots."""

    def __init__(self, decision: RoutingDecision, experts: int = 0) -> None:
        self._decision = decision
        self._scores = decision.block_scores
        self._experts = experts
        self.sizes = [decision.experts.nbytes, 0 if self._scores is None else self._scores.nbytes, 4 * experts]

    @property
    def nbytes(self) -> int:
        """Of all together."""
        return sum(self.sizes)

    def pieces(self, slots: Tensor | None = None) -> list[Tensor]:
        """What it is made of; `slots` if there was a look-up."""
        found = (self._decision.experts, self._scores, slots)
        return [piece.contiguous() for piece in found if piece is not None]

    def read(self, raw: Tensor) -> Found:
        """The record as it came, uint8 [nbytes]."""
        chosen, scores, slots = raw.split(self.sizes)
        decision = replace(
            self._decision,
            experts=chosen.view(torch.int64).view(self._decision.experts.shape),
            block_scores=None if self._scores is None else scores.view(torch.float32).view(self._scores.shape),
        )
        return Found(decision, slots.view(torch.int32) if self._experts else None)
