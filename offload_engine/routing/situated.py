"""Two options of dMoE whose coreset depends on more than the tokens: held over steps, and partial to resident experts.

Neither is in the paper. Both trade exactness for fewer bytes: denoising steps hardly change a layer's coreset
(REFERENCE §3), so one may serve several steps; and of two experts with about as many votes, the one that is in fast
memory already costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.core import BlockPass, ForwardInfo, Phase
from offload_engine.routing.base import Route, SituatedPolicy
from offload_engine.routing.coreset import Coreset

Residents = Callable[[int], Sequence[int]]
"""The experts of a layer that fast memory holds, or is being given, just now."""


class HeldCoreset(NamedTuple):
    """A block's coreset in one layer, and when it was chosen."""

    block: int
    step: int
    coreset: Tensor
    """[E] bool"""


def nobody(_layer: int) -> Sequence[int]:
    """`Residents` where no cache is known."""
    return ()


@dataclass(frozen=True, slots=True)
class SituatedCoreset(Coreset, SituatedPolicy):
    """dMoE with a coreset that is held over `hold_steps` denoising steps of a block, or that favours residents.

    Held: the coreset that (layer, block) chose at step s serves until step s + `hold_steps`; tokens still choose afresh
    inside it. Step 0 and every forward that doesn't denoise choose afresh, so no block, prompt or aborted generation
    leaves its coreset to another.

    Favoured: the votes of a resident expert count (1 + `residency_bonus`) times before they are normalised, so the
    cumulative top-p runs over the raised votes; an expert without a vote gains nothing. Weights and block scores stay
    those of the plain rule. What is chosen then depends on what the cache holds at that moment, and so on what ran
    before and on how fast transfers were: "offloaded equals resident" no longer holds. Forwards that only score choose
    by the plain rule, and so does the policy when called without a place.
    """

    hold_steps: int = 1
    """1: chosen afresh in every step."""
    residency_bonus: float = 0.0
    """0: no favour."""
    residents: Residents = nobody
    """Whose word on residency counts."""
    _held: dict[tuple[int, int], HeldCoreset] = field(default_factory=dict, init=False, repr=False, compare=False)
    """By layer and lane."""

    def at(self, layer: int, info: ForwardInfo, *, preview: bool = False) -> Route:
        """See `SituatedPolicy`."""
        return partial(self.decide, elect=partial(self._elect, layer, info, preview))

    def _elect(self, layer: int, info: ForwardInfo, preview: bool, votes: Tensor, voted: Tensor) -> Tensor:
        """The coresets [B, E]: for each block the one held for this place, else a fresh one, which is then held."""
        coresets = self.elect(votes if info.phase is Phase.SCORE else self._favoured(votes, layer), voted)
        if self.hold_steps == 1:
            return coresets
        for row, (phase, lane, block, step, _tokens) in enumerate(info.blocks or [_only_block(info)]):
            if phase is not Phase.DENOISE:
                continue
            held = self._held.get((layer, lane))
            if held and held.block == block and 0 < step - held.step < self.hold_steps:
                coresets[row] = held.coreset
            elif not preview:
                self._held[layer, lane] = HeldCoreset(block, step, coresets[row])
        return coresets

    def _favoured(self, votes: Tensor, layer: int) -> Tensor:
        """`votes` [B, E] with those for resident experts raised."""
        if not self.residency_bonus:
            return votes
        raised = torch.zeros_like(votes, dtype=torch.bool)
        raised[:, list(self.residents(layer))] = True
        return torch.where(raised & (votes > 0), votes * (1 + self.residency_bonus), votes)


def _only_block(info: ForwardInfo) -> BlockPass:
    """A forward that names no blocks is taken for one block's."""
    return BlockPass(info.phase, 0, info.block, info.step, 0)
