"""A layer's decision as the scheduler, the predictor and the cache are told of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.experts.outlook import FURTHEST, Outlook
from offload_engine.kernels import selection as fused
from offload_engine.routing.base import by_block, total


class Ranked(NamedTuple):
    """The distinct experts of a decision, in the order in which they should be fetched."""

    experts: list[int]
    scores: list[float]


def ranked_experts(decision: RoutingDecision) -> Ranked:
    """The experts actually chosen, by falling block score summed over the blocks of the forward (REFERENCE §3)."""
    ranked = fused.ranked(decision.experts, decision.block_scores)
    if ranked is not None:
        return Ranked(*ranked)
    used = decision.experts.flatten().unique()
    used = used[used >= 0]
    if decision.block_scores is None:
        return Ranked(used.tolist(), [1.0] * used.numel())
    scores = total(decision.block_scores, 0)[0, used].nan_to_num()  # damaged weights must not damage the cache's books
    order = scores.argsort(descending=True, stable=True)
    return Ranked(used[order].tolist(), scores[order].tolist())


def going_on(ranked: Ranked, decision: RoutingDecision, info: ForwardInfo) -> Ranked:
    """Of a decision's experts those of the blocks that go on being denoised, where there are others; else all."""
    blocks = by_block(info, decision)
    denoised = [part.experts for one, part in blocks if one.phase is Phase.DENOISE]
    if len(denoised) in (0, len(blocks)):
        return ranked
    kept = set(torch.cat(denoised).unique().tolist())
    pairs = [pair for pair in zip(ranked.experts, ranked.scores, strict=True) if pair[0] in kept]
    return Ranked([expert for expert, _ in pairs], [score for _, score in pairs])


def outlook_of(chosen: Sequence[int], block_scores: Tensor | None, info: ForwardInfo) -> Outlook:
    """How a layer's experts stand after the votes [B, E] of the forward's blocks that go on being denoised, of which
    these were `chosen`, best first; after all votes where it does not say which blocks those are.
    """
    if block_scores is None:
        return Outlook(chosen)
    rows = [row for row, block in enumerate(info.blocks) if block.phase is Phase.DENOISE]
    if not 0 < len(rows) < len(info.blocks) == len(block_scores):
        rows = list(range(len(block_scores)))
    votes = block_scores[rows].sum(dim=0).nan_to_num().cpu().numpy()
    votes[chosen] = 0.0
    best = np.argsort(-votes, kind="stable")[:FURTHEST]
    return Outlook(chosen, best[votes[best] > 0].tolist())
