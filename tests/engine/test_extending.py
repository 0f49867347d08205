"""Policies of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_engine import (
    ConfigError,
    Engine,
    EngineConfig,
    ExpertKey,
    ExpertPredictor,
    ForwardInfo,
    Outlook,
    RouterShape,
    RoutingDecision,
    SamplingParams,
)
from offload_engine.engine.options import EngineOptions
from tests.checkpoints import tiny_config, write_checkpoint

PARAMS = SamplingParams(max_new_tokens=40, threshold=0.2)
PROMPT = list(range(5, 50))


class MostRecentlyUsed:
    """Evicts what was used last: about the worst there is, and it must not matter."""

    name = "mru"

    def __init__(self) -> None:
        self.order: dict[ExpertKey, None] = {}
        self.evictions = 0

    def begin(self, info: ForwardInfo) -> None:
        pass

    def on_route(self, layer: int, experts: Sequence[int], outlook: Outlook) -> None:
        pass

    def on_insert(self, key: ExpertKey) -> None:
        self.order[key] = None

    def on_use(self, key: ExpertKey, score: float) -> None:
        del self.order[key]
        self.order[key] = None

    def on_remove(self, key: ExpertKey) -> None:
        del self.order[key]
        self.evictions += 1

    def victim(self, evictable: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        return next((key for key in reversed(self.order) if evictable(key)), None)


class FirstOnes(ExpertPredictor):
    """Guesses the first experts of every layer."""

    name = "first ones"

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def _predict(self, layer: int) -> list[tuple[int, float]]:
        return [(expert, 1.0) for expert in range(self.count)]


class FirstExperts:
    """Sends every token to the model's first experts, in equal parts."""

    name = "first experts"

    def __init__(self, shape: RouterShape) -> None:
        self.shape = shape

    def __call__(self, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> RoutingDecision:
        experts = torch.arange(self.shape.top_k).expand(len(logits), -1).contiguous()
        return RoutingDecision(experts, torch.full(experts.shape, 1 / self.shape.top_k))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tiny_config(), seed=1)


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, gpu_mem="4GB", max_context=256, **options)


def test_what_only_moves_experts_changes_no_answer(checkpoint: Path) -> None:
    with open_engine(checkpoint) as engine:
        wanted = engine.generate(PROMPT, PARAMS).token_ids
    options = {"eviction": MostRecentlyUsed, "predictor": lambda: FirstOnes(3), "expert_mem": "100KB"}
    with open_engine(checkpoint, **options) as engine:
        done = engine.generate(PROMPT, PARAMS)
        cache = engine._parts.experts.scheduler.cache
        assert done.token_ids == wanted
        assert isinstance(cache.policy, MostRecentlyUsed)
        assert cache.policy.evictions > 0
        assert done.stats.prefetches_issued > 0
        assert [one for one in engine.notices if "of one's own" in one] == [
            "eviction is a policy of one's own",
            "predictor is a policy of one's own",
        ]


def test_each_engine_has_its_own(checkpoint: Path) -> None:
    with (
        open_engine(checkpoint, eviction=MostRecentlyUsed) as one,
        open_engine(checkpoint, eviction=MostRecentlyUsed) as other,
    ):
        policies = [engine._parts.experts.scheduler.cache.policy for engine in (one, other)]
        assert policies[0] is not policies[1]


def test_routing_of_ones_own_decides_answers(checkpoint: Path) -> None:
    with open_engine(checkpoint, routing=FirstExperts, predictor="none") as engine:
        assert engine.routing_name == "first experts"
        decisions = engine.routing(PROMPT)
        assert all(torch.equal(one.experts[0], torch.arange(4)) for one in decisions)
        done = engine.generate(PROMPT, PARAMS)
        assert done.stats.unique_experts == 4
        assert engine.stats.loads == 4 * len(engine.model_config.moe_layers)


@pytest.mark.parametrize(
    ("options", "lacks"),
    [
        ({"eviction": dict}, "eviction makes a dict, which lacks name, begin, on_route"),
        ({"predictor": lambda: None}, "predictor makes a NoneType, which lacks name, wants_preview"),
        ({"routing": lambda shape: len}, "routing makes a builtin_function_or_method, which lacks name"),
    ],
)
def test_what_is_no_policy_is_refused_before_anything_is_computed(
    checkpoint: Path, options: dict[str, Any], lacks: str
) -> None:
    with pytest.raises(ConfigError, match=lacks):
        open_engine(checkpoint, **options)


def test_the_typed_keywords_are_the_configs_fields() -> None:
    assert set(EngineOptions.__annotations__) == EngineConfig.model_fields.keys() - {"model"}
