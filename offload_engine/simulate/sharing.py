"""Misses shared with the CPU on the virtual clock: the engine's own decision, with what a profile says things take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from offload_engine.core import Phase
from offload_engine.experts.scheduling.sharing import Missing, Rates, ShareMode, choose
from offload_engine.simulate.forwards import ForwardRun, LayerRun

PHASES = (Phase.DENOISE, Phase.COMMIT)
"""In others the engine leaves everything to the device."""


class Shared(NamedTuple):
    """What the CPU does for one layer."""

    experts: frozenset[int] = frozenset()
    seconds: float = 0.0
    """From the decision until the outputs are on the device."""
    own: float = 0.0
    """Of these, the part in which everything else waits."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """How misses are shared."""

    mode: ShareMode
    top_k: int
    """Experts per token."""
    rates: Callable[[ForwardRun], Rates]

    def share(
        self,
        forward: ForwardRun,
        run: LayerRun,
        absent: Sequence[int],
        hosted: Sequence[bool],
        waiting: float,
    ) -> Shared:
        """As the engine decides it for `absent` experts, of which some are `hosted` in host memory."""
        if self.mode == "off" or not absent or forward.info.phase not in PHASES:
            return Shared()
        rates, tokens = self.rates(forward), tokens_by_score(forward, run, self.top_k)
        missing = [Missing(one, tokens[one], here) for one, here in zip(absent, hosted, strict=True)]
        experts = choose(self.mode, missing, rates, waiting)
        if not experts:
            return Shared()
        return Shared(frozenset(experts), rates.trip + sum(rates.cpu(tokens[one]) for one in experts), rates.own)


def tokens_by_score(forward: ForwardRun, run: LayerRun, top_k: int) -> dict[int, int]:
    """An estimate of how many tokens chose each of a layer's experts, which a trace doesn't tell: the forward's choices
    divided by block score, at least one each and at most all tokens.
    """
    tokens, total = forward.size.tokens, sum(run.scores)
    if total <= 0:
        total, scores = float(len(run.experts)), [1.0] * len(run.experts)
    else:
        scores = list(run.scores)
    return {
        expert: max(1, min(tokens, round(tokens * top_k * score / total)))
        for expert, score in zip(run.experts, scores, strict=True)
    }
