"""When to guess, and in which order guesses are fetched."""

from __future__ import annotations

from collections.abc import Iterable

from offload_engine.core import ExpertKey
from offload_engine.experts.scheduling.predictor import Prediction

PREDICTION_SHARE = 1 / 8
"""Share of the experts wanted lately that had to be moved, below which a block's first step alone is predicted, and no
preview is asked for: residents, which are computed first, then hide the loads by themselves, and to guess costs more
than it saves (docs/LOG.md).
"""
HOST_PREVIEWS = 1
"""Layers ahead that are previewed where the host computes. Two routers and their rankings per layer took 5 ms more of a
step than one (LLaDA2.0-mini, original routing, 8 GB) and saved nothing that showed: a layer guessed from the last step
is previewed in its turn.
"""
RECENT_RUNS = 64
"""Runs of layers after which that share has faded to about a third."""
PATIENCE = 0.7
"""What a guess is worth that may arrive one layer later than another."""


def prefetch_order(guesses: Iterable[tuple[int, Prediction]]) -> list[ExpertKey]:
    """The experts guessed for the coming layers, nearest layer first, in the order in which to fetch them.

    Falling score, as a share of its layer's best, times `PATIENCE` per layer until the deadline; ties to the nearer
    layer, then to the order of the prediction.
    """
    ranked: list[tuple[float, ExpertKey]] = []
    for distance, (layer, prediction) in enumerate(guesses):
        best = max((score for _expert, score in prediction), default=0.0) or 1.0
        worth = PATIENCE**distance / best
        ranked += [(worth * score, ExpertKey(layer, expert)) for expert, score in prediction]
    ranked.sort(key=lambda guess: guess[0], reverse=True)
    return [key for _worth, key in ranked]
