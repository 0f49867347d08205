"""Previews on the virtual clock: what a layer's router would have said of an earlier hidden state.

A trace has no hidden states, so the cross-layer gate is imitated: it names as many experts as the layer will want, a
share of them rightly, and errs among those wanted least.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from offload_engine.experts.scheduling.predictor import Chosen
from offload_engine.simulate.forwards import LayerRun

ACCURACY = 0.87
"""Share of a layer's experts named rightly just before its attention. Measured with LLaDA2.0-mini's shape and random
weights: .84 under dMoE, .91 under original routing (docs/simulation.md)."""
PER_LAYER = 0.92
"""By which that falls with each layer further ahead; .90 and .94 were measured."""


@dataclass(frozen=True, slots=True)
class Gate:
    """Draws previews. Deterministic: the same forward, layer and distance give the same preview."""

    num_experts: int
    accuracy: float = ACCURACY
    reach: int | None = None
    """Layers ahead that are previewed, of those that are guessed; None: all."""

    def preview(self, number: int, run: LayerRun, distance: int) -> Chosen:
        """What forward `number` is shown of `run`, `distance` layers ahead: distinct experts, falling score."""
        count = len(run.experts)
        wrong = round(count * (1 - self.accuracy * PER_LAYER**distance))
        draw = random.Random(f"{number} {run.layer} {distance}")
        lower = range(count // 2, count)
        dropped = set(draw.sample(lower, min(wrong, len(lower))))
        wanted = set(run.experts)
        others = [expert for expert in range(self.num_experts) if expert not in wanted]
        strangers = iter(draw.sample(others, min(len(dropped), len(others))))
        experts, scores = [], []
        for place, (expert, score) in enumerate(zip(run.experts, run.scores, strict=True)):
            named = next(strangers, None) if place in dropped else expert
            if named is not None:
                experts.append(named)
                scores.append(score)
        return experts, scores
