"""What an earlier request left of a prompt's first blocks: used where it is the same, and nowhere else."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.core import Phase, SamplingParams
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.engine.batching import Batcher
from offload_engine.engine.engine import Engine
from offload_engine.errors import TransferError
from offload_engine.model.config import ModelConfig
from tests.checkpoints import GOLDEN, needs_golden, tiny_config, write_checkpoint
from tests.golden_cases import cases, generate_name, routing_options, tensors

PARAMS = SamplingParams(max_new_tokens=96, steps=3, threshold=0.5)
BLOCK = 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("again"), tiny_config(), seed=1)


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, **{"gpu_mem": "3GB", "min_experts": 4, "max_context": 1024, **options})


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Iterator[Engine]:
    """Computes everything anew."""
    with open_engine(checkpoint) as engine:
        yield engine


@pytest.fixture
def again(checkpoint: Path) -> Iterator[Engine]:
    with open_engine(checkpoint, prefix_reuse="on", batch_size=3, expert_mem=12 * 4096 * 4) as engine:
        yield engine


def ids(count: int, seed: int = 0) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(94) for _ in range(count)]


def test_the_next_turn_computes_what_is_new_alone(plain: Engine, again: Engine) -> None:
    conversation = ids(70)
    for turn in range(4):
        done, expected = again.generate(conversation, PARAMS), plain.generate(conversation, PARAMS)
        assert (done.token_ids, done.text) == (expected.token_ids, expected.text)
        assert expected.stats.prompt_tokens_reused == 0
        reused = done.stats.prompt_tokens_reused
        assert reused % BLOCK == 0
        if turn:
            held = (len(conversation) - 10) // BLOCK * BLOCK
            assert reused in (held, held - BLOCK), "all but the last block of the answer, which nobody needed to commit"
        conversation = [*conversation, *done.token_ids, *ids(10, seed=turn + 1)]
    assert again.stats.prompt_tokens_reused > 300


def test_the_same_keys_and_values_as_a_prefill_leaves(plain: Engine, again: Engine) -> None:
    """Those of the answer too, which the forward of the next block committed."""
    prompt = ids(40)
    answer = again.generate(prompt, PARAMS).token_ids
    conversation = [*prompt, *answer, *ids(5, seed=9)]
    again.generate(conversation, PARAMS)
    plain.generate(conversation, PARAMS)
    used = next(cache for cache in again._decoder.caches if cache.length)
    whole = len(conversation) // BLOCK * BLOCK
    assert used.ids[:whole] == conversation[:whole]
    for mine, anew in ((used.keys, plain._decoder.caches[0].keys), (used.values, plain._decoder.caches[0].values)):
        torch.testing.assert_close(mine[:, :whole], anew[:, :whole], rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_held_whole_needs_no_prefill(plain: Engine, again: Engine) -> None:
    prompt = ids(3 * BLOCK)
    again.generate(prompt, PARAMS)
    before = again.stats.forwards[Phase.PREFILL]
    done = again.generate(prompt, PARAMS)
    assert done.stats.prompt_tokens_reused == 3 * BLOCK
    assert again.stats.forwards[Phase.PREFILL] == before
    assert done.token_ids == plain.generate(prompt, PARAMS).token_ids
    shorter = again.generate(prompt[: 2 * BLOCK], PARAMS)
    assert shorter.stats.prompt_tokens_reused == 2 * BLOCK
    assert shorter.token_ids == plain.generate(prompt[: 2 * BLOCK], PARAMS).token_ids
    parting = [*prompt[:BLOCK], *ids(50, seed=4)]
    assert again.generate(parting, PARAMS).token_ids == plain.generate(parting, PARAMS).token_ids


def test_nothing_is_reused_of_another_policy_or_block_length(plain: Engine, checkpoint: Path) -> None:
    prompt = ids(3 * BLOCK)
    short = PARAMS.model_copy(update={"block_length": 16})
    with open_engine(checkpoint, batch_size=2) as engine, Batcher(engine) as batcher:

        def reused(params: SamplingParams = PARAMS, **options: Any) -> int:
            return batcher.submit(prompt, params, **options).result(60).stats.prompt_tokens_reused

        assert [reused(), reused()] == [0, 3 * BLOCK]
        assert [reused(routing="dmoe"), reused(routing="dmoe", top_p=0.6), reused(routing="dmoe", top_p=0.7)] == [
            0,
            96,
            0,
        ]
        assert [reused(short), reused(short)] == [0, 96]
        expected = plain.generate(prompt, short).token_ids
        assert batcher.submit(prompt, short).result(60).token_ids == expected


def test_generate_computes_everything_anew_unless_asked_and_a_batcher_does_not(checkpoint: Path) -> None:
    prompt = ids(3 * BLOCK)
    for chosen, by_engine, by_batcher in (("auto", 0, 96), ("on", 96, 96), ("off", 0, 0)):
        with open_engine(checkpoint, prefix_reuse=chosen) as engine:
            engine.generate(prompt, PARAMS)
            assert engine.generate(prompt, PARAMS).stats.prompt_tokens_reused == by_engine
            with Batcher(engine) as batcher:
                batcher.submit(prompt, PARAMS).result(60)
                assert batcher.submit(prompt, PARAMS).result(60).stats.prompt_tokens_reused == by_batcher


def test_a_shared_beginning_is_copied_from_a_lane_that_is_busy(plain: Engine, again: Engine) -> None:
    system = ids(2 * BLOCK)
    prompts = [[*system, *ids(40 + number, seed=number)] for number in range(6)]
    again.generate(prompts[0], PARAMS)
    done = again.generate(prompts, PARAMS)
    assert [one.token_ids for one in done] == [plain.generate(prompt, PARAMS).token_ids for prompt in prompts]
    assert [one.stats.prompt_tokens_reused for one in done] == [3 * BLOCK, *[2 * BLOCK] * 5]


def test_a_conversation_in_each_lane_is_kept_apart(plain: Engine, again: Engine) -> None:
    talks = [ids(40, seed=number) for number in range(3)]
    for turn in range(3):
        done = again.generate(talks, PARAMS)
        assert [one.token_ids for one in done] == [plain.generate(talk, PARAMS).token_ids for talk in talks]
        assert all(one.stats.prompt_tokens_reused >= turn * BLOCK for one in done)
        talks = [[*talk, *one.token_ids, turn] for talk, one in zip(talks, done, strict=True)]


def test_what_failed_or_was_cancelled_leaves_nothing_wrong(
    plain: Engine, again: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(5 * BLOCK)
    expected = plain.generate(prompt, PARAMS).token_ids
    with monkeypatch.context() as broken:
        broken.setattr(again._parts.experts, "run", _gone)
        with pytest.raises(TransferError):
            again.generate(prompt, PARAMS)
    assert again.generate(prompt, PARAMS).token_ids == expected
    again.generate(ids(200, seed=3), PARAMS)
    asked = iter([False] * 7)
    longer = [*prompt, *ids(300, seed=5)]
    list(again.stream(longer, PARAMS, cancelled=lambda: next(asked, True)))
    assert again.generate(longer, PARAMS).token_ids == plain.generate(longer, PARAMS).token_ids


def _gone(*_arguments: object, **_options: object) -> None:
    raise TransferError("the disk is gone")


def test_a_cache_keeps_what_it_is_told_to_and_leaves_no_number_behind_it() -> None:
    config = ModelConfig.from_dict(tiny_config())
    one, two = (PrefixCache(config, 64, torch.float32, torch.device("cpu")) for _ in range(2))
    one.keys.fill_(1.0)
    one.values.fill_(torch.nan)
    one.values[:, :8] = 2.0
    one.written = 40
    one.commit(range(32))
    two.begin_like(one, 8)
    assert (two.ids, two.length, two.written) == (list(range(8)), 8, 8)
    assert torch.equal(two.values[:, :8], one.values[:, :8])
    one.keep(8)
    assert (one.length, one.written) == (8, 8)
    assert not one.values[:, 8:40].isnan().any()
    one.reset()
    assert one.length == 0
    assert not one.values[:, :40].any()


@needs_golden
@pytest.mark.parametrize("routing", ["original", "dmoe_0.6"])
def test_the_reference_models_answers_from_what_is_held(routing: str) -> None:
    with Engine.from_pretrained(
        GOLDEN, gpu_mem="3GB", expert_mem=20 * 32768, prefix_reuse="on", **routing_options(routing)
    ) as engine:
        for case in [one for one in cases()["generate"] if one["routing"] == routing]:
            engine._decoder.eos_token_id = case.get("eos_id", cases()["eos_id"])
            prompt = tensors()[f"prompt_{case['P']}"].tolist()
            params = SamplingParams(max_new_tokens=64, threshold=case["threshold"])
            for reused in (None, case["P"] // BLOCK * BLOCK):
                done = engine.generate(prompt, params)
                assert done.token_ids == tensors()[generate_name(case)].tolist()
                assert reused is None or done.stats.prompt_tokens_reused == reused
