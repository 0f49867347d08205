"""Fewer lanes in a forward than there are prompts under way: the same answers, and no more bytes than alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.config import EngineConfig
from offload_engine.core import Phase, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import ConfigError
from tests.checkpoints import tiny_config, write_checkpoint

PARAMS = SamplingParams(max_new_tokens=64, steps=4, threshold=1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 experts of 32 per token and layer, so that prompts differ in what they want."""
    config = tiny_config(num_experts=32, n_group=4, topk_group=2)
    return write_checkpoint(tmp_path_factory.mktemp("wide"), config, seed=1)


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, **{"gpu_mem": "3GB", "routing": "dmoe", "min_experts": 4, **options})


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 94, (20 + 7 * n,), generator=generator).tolist() for n in range(count)]


def test_answers_do_not_depend_on_how_many_go_together(checkpoint: Path) -> None:
    with open_engine(checkpoint) as engine:
        slab = engine.plan.slab_bytes
        alone = [engine.generate(prompt, PARAMS).token_ids for prompt in prompts(4)]
    forwards = []
    for together in (1, 2, "auto", 4):
        with open_engine(checkpoint, batch_size=4, lanes_together=together, expert_mem=12 * slab) as engine:
            for _ in range(2):
                assert [done.token_ids for done in engine.generate(prompts(4), PARAMS)] == alone
            forwards.append(engine.stats.forwards[Phase.DENOISE])
            assert engine.stats.prompts == 8
            if together != "auto":
                assert forwards[-1] >= engine.stats.denoise_steps / together
    assert forwards[0] > forwards[1] > forwards[3]
    assert forwards[0] >= forwards[2] >= forwards[3]


def test_with_room_for_one_a_batch_moves_no_more_than_one_prompt_after_the_other(checkpoint: Path) -> None:
    moved = {}
    for size in (1, 4):
        with open_engine(checkpoint, batch_size=size, predictor="none") as engine:
            slab, layers = engine.plan.slab_bytes, engine.plan.moe_layers
        with open_engine(checkpoint, batch_size=size, expert_mem=14 * layers * slab, predictor="none") as engine:
            engine.generate(prompts(4), PARAMS)
            before = engine.stats.snapshot()
            engine.generate(prompts(8)[4:], PARAMS)
            moved[size] = engine.stats.since(before).bytes_moved
            assert 1 <= engine.stats.lanes_together <= size
    assert moved[4] <= 1.1 * moved[1]


def test_how_many_share_forwards_is_told(checkpoint: Path) -> None:
    with open_engine(checkpoint, batch_size=3, lanes_together=2) as engine:
        done = engine.generate(prompts(3), PARAMS)
        assert [one.stats.lanes_together for one in done] == [2, 2, 1], "the last has nobody left to share with"
        assert engine.stats.as_dict()["lanes_together"] == 1


@pytest.mark.parametrize(("given", "kept"), [("auto", "auto"), ("AUTO", "auto"), (3, 3), ("3", 3)])
def test_a_number_or_auto(given: Any, kept: Any) -> None:
    assert EngineConfig(lanes_together=given).lanes_together == kept


@pytest.mark.parametrize("given", [0, -1, "0", "all", 2.5, True])
def test_nothing_else(given: Any) -> None:
    with pytest.raises(ConfigError, match="lanes_together"):
        EngineConfig(lanes_together=given)
