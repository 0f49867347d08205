"""A layer's decision as the scheduler, the predictor and the cache are told of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.experts.scheduling.outlook import FURTHEST, Outlook
from offload_engine.kernels import selection as fused
from offload_engine.routing.base import by_block, total


class Ranked(NamedTuple):
    """The distinct experts of a decision, in the order in which they should be fetched."""

    experts: list[int]
    scores: list[float]


class Standing(NamedTuple):
    """What a decision says of its layer, now and next."""

    ranked: Ranked
    """To be run."""
    learned: Ranked
    """Of these, the ones of blocks that go on being denoised, where there are others; else all."""
    outlook: Outlook
    """After the votes of the blocks that go on, which chose `learned`; after all votes where no block does."""


def ranked_experts(decision: RoutingDecision) -> Ranked:
    """The experts actually chosen, by falling block score summed over the blocks of the forward (REFERENCE §3)."""
    experts, scores, _runners_up = _ranked(decision.experts, decision.block_scores, 0)
    return Ranked(experts, scores)


def standing(decision: RoutingDecision, info: ForwardInfo) -> Standing:
    """How a layer's experts stand after this decision of the forward `info`."""
    experts, scores, runners_up = _ranked(decision.experts, decision.block_scores, FURTHEST)
    ranked = Ranked(experts, scores)
    going_on = _going_on(decision, info)
    if going_on is None:
        return Standing(ranked, ranked, Outlook(experts, runners_up))
    kept, _scores, runners_up = _ranked(*going_on, FURTHEST)
    names = set(kept)
    pairs = [pair for pair in zip(experts, scores, strict=True) if pair[0] in names]
    learned = Ranked([expert for expert, _ in pairs], [score for _, score in pairs])
    return Standing(ranked, learned, Outlook(learned.experts, runners_up))


def _going_on(decision: RoutingDecision, info: ForwardInfo) -> tuple[Tensor, Tensor | None] | None:
    """Experts and votes of the blocks that are denoised; None where those are all, or there are none."""
    if len(info.blocks) < 2:
        return None
    blocks = by_block(info, decision)
    denoised = [part for one, part in blocks if one.phase is Phase.DENOISE]
    if len(denoised) in (0, len(blocks)):
        return None
    votes = [part.block_scores for part in denoised if part.block_scores is not None]
    return _joined([part.experts for part in denoised]), _joined(votes) if votes else None


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _ranked(experts: Tensor, block_scores: Tensor | None, furthest: int) -> fused.Ranked:
    ranked = fused.ranked(experts, block_scores, furthest)
    if ranked is not None:
        return ranked
    used = experts.flatten().unique()
    used = used[used >= 0]
    if block_scores is None:
        return fused.Ranked(used.tolist(), [1.0] * used.numel(), [])
    votes = total(block_scores, 0)[0].nan_to_num()  # damaged weights must not damage the cache's books
    scores = votes[used]
    order = scores.argsort(descending=True, stable=True)
    others = votes.index_fill(0, used, 0.0)
    best = others.argsort(descending=True, stable=True)[:furthest]
    return fused.Ranked(used[order].tolist(), scores[order].tolist(), best[others[best] > 0].tolist())
