"""When watchers hear of decisions, where the host computes."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from offload_engine.core import BlockPass, ForwardInfo, Phase, RoutingDecision
from offload_engine.experts.observe import ObservedExperts
from offload_engine.model.moe import ExpertExecutor

DECISION = RoutingDecision(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))
HIDDEN = torch.zeros(2, 4)


class Running:
    """An executor that says what ran."""

    def __init__(self, told: list[Any]) -> None:
        self.told = told

    def begin(self, info: ForwardInfo) -> None:
        pass

    def run(self, layer: int, hidden: Tensor, *_rest: object) -> Tensor:
        self.told.append(f"runs {layer}")
        return hidden

    sweep = run


def observed(told: list[Any], last_layer: int | None) -> ObservedExperts:
    executor = cast("ExpertExecutor", Running(told))
    return ObservedExperts(executor, [lambda info, layer, _decision: told.append((info.step, layer))], last_layer)


def test_in_a_step_all_layers_are_told_of_before_the_last_one_runs() -> None:
    told: list[Any] = []
    experts = observed(told, last_layer=2)
    experts.begin(ForwardInfo(Phase.DENOISE))
    for layer in (1, 2):
        experts.run(layer, HIDDEN, DECISION)
    assert told == ["runs 1", (0, 1), (0, 2), "runs 2"]


def test_elsewhere_each_layer_is_told_of_before_it_runs() -> None:
    for last_layer, phase in ((None, Phase.DENOISE), (2, Phase.PREFILL), (2, Phase.SCORE)):
        told: list[Any] = []
        experts = observed(told, last_layer)
        experts.begin(ForwardInfo(phase))
        experts.run(1, HIDDEN, DECISION)
        experts.sweep(2, HIDDEN, DECISION, 2)
        assert told == [(0, 1), "runs 1", (0, 2), "runs 2"]


def test_a_step_that_broke_off_is_told_of_as_what_it_was() -> None:
    told: list[Any] = []
    experts = observed(told, last_layer=2)
    experts.begin(ForwardInfo(Phase.DENOISE, step=3))
    experts.run(1, HIDDEN, DECISION)
    experts.begin(ForwardInfo(Phase.DENOISE, step=4))
    assert told == ["runs 1", (3, 1)]


def test_a_forward_over_several_blocks_is_told_of_block_by_block() -> None:
    told: list[Any] = []
    experts = observed(told, last_layer=1)
    passes = [BlockPass(Phase.COMMIT, 0, 4, 0, 1), BlockPass(Phase.DENOISE, 0, 5, 7, 1)]
    experts.begin(ForwardInfo.of(passes))
    experts.run(1, HIDDEN, DECISION)
    assert told == [(0, 1), (7, 1), "runs 1"]
