from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from offload_engine.core import Phase, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    EngineClosedError,
    MemoryBudgetError,
    ModelError,
    PromptError,
    TokenizerError,
    UsageError,
)
from offload_engine.text import Message
from offload_engine.trace import read_trace
from tests.checkpoints import GOLDEN, needs_golden, random_tensors, tiny_config, write_checkpoint, write_tensors

SLAB = 4096 * 4
BUDGET = "3GB"
TOKENIZER = Path(__file__).parents[2] / "offload_engine" / "assets" / "tiny"


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, **{"gpu_mem": BUDGET, **options})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tiny_config(), seed=1)


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with the built-in model's tokenizer."""
    config = tiny_config(vocab_size=1024, eos_token_id=1019, pad_token_id=1019, mask_token_id=1020)
    directory = write_checkpoint(tmp_path_factory.mktemp("talking"), config, seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, directory)
    return directory


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with open_engine(checkpoint) as engine:
        yield engine


@pytest.fixture
def talker(talking: Path) -> Iterator[Engine]:
    with open_engine(talking) as engine:
        yield engine


SHORT = SamplingParams(max_new_tokens=40, threshold=0.2)
USER = Message(role="user", content="And now?")


@pytest.mark.parametrize("routing", ["original", "top-k", "dmoe"])
@pytest.mark.parametrize("eviction", ["lru", "lfu", "score-aware", "next-use"])
def test_a_small_cache_gives_the_same_answer(checkpoint: Path, routing: str, eviction: str) -> None:
    prompt = list(range(5, 50))
    options = {"routing": routing, "min_experts": 6, "top_k_experts": 2}
    with open_engine(checkpoint, **options) as whole:
        expected = whole.generate(prompt, SHORT)
        assert whole.plan.slots == whole.plan.all_experts == 32
        logits = whole.logits(prompt)
    for predictor in ("none", "previous-step", "cross-layer-gate", "combined"):
        slots = 2 * whole.plan.slab_bytes
        with open_engine(checkpoint, **options, eviction=eviction, predictor=predictor, expert_mem=slots) as tiny:
            assert tiny.plan.slots == 2
            done = tiny.generate(prompt, SHORT)
            assert done.token_ids == expected.token_ids
            assert torch.equal(tiny.logits(prompt), logits)
            assert done.stats.misses > expected.stats.misses
            assert done.stats.bytes_moved == done.stats.loads * tiny._parts.store.payload_bytes((1, 0))  # type: ignore[arg-type]
            tiny._parts.experts.idle()


def test_chunked_and_whole_prefill_agree(checkpoint: Path) -> None:
    prompt = torch.randint(0, 94, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    answers = []
    for chunk in (1, 64, 512):
        with open_engine(checkpoint, prefill_chunk=chunk) as engine:
            answers.append(engine.generate(prompt, SHORT).token_ids)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("chunk", [1, 32, 512])
def test_cached_decoding_sees_what_one_whole_forward_sees(checkpoint: Path, chunk: int) -> None:
    """Denoising against a prefix cache filled in chunks gives the logits of a block-causal forward over everything."""
    engine = open_engine(checkpoint, prefill_chunk=chunk)
    prompt = list(range(64))
    seen = []
    decoder = engine._decoder
    original = decoder.model.logits

    def spy(hidden: torch.Tensor) -> torch.Tensor:
        logits = original(hidden)
        seen.append(logits.clone())
        return logits

    decoder.model.logits = spy  # type: ignore[method-assign]
    try:
        engine.generate(prompt, SamplingParams(max_new_tokens=32, steps=1))
    finally:
        del decoder.model.logits
    whole = engine.logits(prompt + [engine.mask_token_id] * 32)
    torch.testing.assert_close(seen[0], whole[64:], rtol=1e-4, atol=1e-4)
    engine.close()


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 100])
def test_prompts_of_any_length(engine: Engine, length: int) -> None:
    done = engine.generate([3] * length, SamplingParams(max_new_tokens=20))
    assert 1 <= len(done.token_ids) <= 20
    assert done.stats.prompt_tokens == length


def test_a_prompt_may_fill_the_context_but_for_one_token(checkpoint: Path) -> None:
    with open_engine(checkpoint, max_context=128) as engine:
        assert len(engine.generate([3] * 127).token_ids) == 1
        with pytest.raises(PromptError, match=r"the prompt has 128 tokens, but the context holds 128 .* max_context"):
            engine.generate([3] * 128)


@pytest.mark.parametrize("block_length", [32, 20])
def test_prompt_and_answer_stay_within_the_context_asked_for(checkpoint: Path, block_length: int) -> None:
    with open_engine(checkpoint, max_context=100) as engine:
        params = SamplingParams(max_new_tokens=64, block_length=block_length, threshold=0.1)
        assert len(engine.generate([3] * 90, params).token_ids) <= 10


def test_ids_may_be_tuples_tensors_or_arrays(engine: Engine) -> None:
    expected = engine.generate([1, 2, 3], SHORT).token_ids
    for same in ((1, 2, 3), torch.tensor([1, 2, 3]), numpy.array([1, 2, 3]), list(numpy.array([1, 2, 3]))):
        assert engine.generate(same, SHORT).token_ids == expected  # type: ignore[call-overload]
        assert torch.equal(engine.logits(same), engine.logits([1, 2, 3]))  # type: ignore[arg-type]
    several = engine.generate([(1, 2, 3), (4,)], SHORT)  # type: ignore[list-item]
    assert several[0].token_ids == expected


def test_what_logits_returns_is_the_callers_to_change(engine: Engine) -> None:
    logits = engine.logits([1, 2, 3])
    logits[:, 0] = -1
    engine.routing([1, 2, 3])[0].weights.mul_(2)


def test_a_checkpoint_that_names_no_special_ids_still_scores(tmp_path: Path) -> None:
    config = {key: one for key, one in tiny_config().items() if not key.endswith("token_id")}
    with open_engine(write_checkpoint(tmp_path, config)) as engine:
        assert engine.logits([1, 2]).shape == (2, 96)
        assert engine.mask_token_id is None
        with pytest.raises(TokenizerError, match="pass mask_token_id"):
            engine.generate([1])


def test_an_eos_that_is_no_special_token_is_not_part_of_the_text(talking: Path) -> None:
    with open_engine(talking) as engine:
        ids = engine.generate("How many?", SHORT).token_ids
    with open_engine(talking, eos_token_id=ids[4]) as engine:
        done = engine.generate("How many?", SHORT)
        assert done.finish_reason == "eos"
        assert engine.tokenizer is not None
        assert done.text == engine.tokenizer.decode(done.token_ids[:-1])


@pytest.mark.parametrize("options", [{"temperature": 1e-40}, {"temperature": 1e-3}, {"steps": 10**9}, {"threshold": 0}])
def test_extreme_but_legal_sampling(engine: Engine, options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=20, seed=1, **options)
    done = engine.generate([1, 2, 3], params)
    assert done.token_ids
    if options.get("temperature") == 1e-40:
        greedy = engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20))
        assert done.token_ids == greedy.token_ids


@pytest.mark.parametrize("options", [{"seed": 2**70}, {"seed": -1}, {"temperature": -1}, {"top_p": 0}, {"stop": ("",)}])
def test_impossible_sampling_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(options))):
        SamplingParams(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_an_error_and_the_engine_lives_on(tmp_path: Path, temperature: float) -> None:
    config = tiny_config()
    tensors = random_tensors(config, dtype=torch.float32, layout="split", seed=0)
    for name, tensor in tensors.items():
        if ".layers.1.mlp.experts." in name:
            tensor[0, 0] = torch.nan
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path, tensors)
    with open_engine(tmp_path, expert_mem=4 * SLAB) as engine:
        engine.record_trace(tmp_path / "trace")
        for _ in range(3):
            with pytest.raises(ModelError, match="not finite"):
                engine.generate(list(range(40)), SamplingParams(max_new_tokens=32, temperature=temperature, seed=0))
        engine._parts.experts.idle()


def test_several_prompts_in_one_call(engine: Engine) -> None:
    prompts = [[1, 2, 3], [], list(range(40))]
    together = engine.generate(prompts, SHORT)
    assert [done.token_ids for done in together] == [engine.generate(prompt, SHORT).token_ids for prompt in prompts]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("routing", ["original", "dmoe"])
def test_a_batch_answers_as_each_prompt_alone(checkpoint: Path, routing: str, fused: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 94, (length,), generator=generator).tolist() for length in (3, 70, 32, 0, 100, 45)]
    options: dict[str, Any] = {"routing": routing, "min_experts": 4, "expert_mem": 5 * SLAB, "prefill_chunk": 32}
    warm = SamplingParams(max_new_tokens=70, temperature=0.7, seed=5, threshold=0.3)
    with open_engine(checkpoint, **options, batch_size=4, fused_commit=fused) as engine:
        assert engine.plan.sequences == 4
        for params in (SHORT, warm):
            alone = [engine.generate(prompt, params) for prompt in prompts]
            for batch_size in (2, 4):
                together = engine.generate(prompts, params, batch_size=batch_size)
                assert [done.token_ids for done in together] == [done.token_ids for done in alone]
                for done, single in zip(together, alone, strict=True):
                    assert done.stats.denoise_steps == single.stats.denoise_steps
                    assert done.stats.blocks == single.stats.blocks
                    assert done.stats.prompts == 1


def test_a_batch_moves_fewer_bytes_and_counts_its_forwards_once(checkpoint: Path) -> None:
    prompts = [[number] * 40 for number in range(4)]
    moved, forwards, unique = [], [], []
    for batch_size in (1, 2, 4):
        options: dict[str, Any] = {"expert_mem": 6 * SLAB, "batch_size": 4, "lanes_together": 4, "predictor": "none"}
        with open_engine(checkpoint, **options) as engine:
            engine.generate(prompts, SHORT, batch_size=batch_size)
            stats = engine.stats
            moved.append(stats.bytes_moved)
            forwards.append(stats.forwards[Phase.DENOISE])
            unique.append(stats.unique_experts)
            assert stats.prompts == 4
            assert stats.forwards[Phase.DENOISE] >= stats.denoise_steps / batch_size
    assert moved[0] > moved[1] > moved[2]
    assert forwards[0] > forwards[1] > forwards[2]
    assert unique[0] == pytest.approx(unique[2]), "counted per block, whatever else is in the forward"


def test_more_prompts_together_than_were_planned_for_are_refused(engine: Engine) -> None:
    with pytest.raises(
        UsageError, match=r"batch_size is 2, but the memory plan holds .* of 1 sequence; .*batch_size=2"
    ):
        engine.generate([[1], [2]], SHORT, batch_size=2)
    with pytest.raises(UsageError, match="batch_size is 0; wanted 1 to 1"):
        engine.generate([[1], [2]], SHORT, batch_size=0)


def test_prompts_are_completed_as_they_finish_and_none_is_begun_after_a_cancel(checkpoint: Path) -> None:
    with open_engine(checkpoint, batch_size=2) as engine:
        params = SamplingParams(max_new_tokens=200, threshold=1)
        completed = dict(
            engine.complete([[1] * 300, [2], [3]], params, cancelled=lambda: engine.stats.denoise_steps > 3)
        )
        assert sorted(completed) == [0, 1]
        assert {done.finish_reason for done in completed.values()} == {"cancelled"}
        answers = engine.complete([[1], [2], [3]], SHORT)
        next(answers)
        answers.close()  # type: ignore[attr-defined]
        assert engine.generate([1], SHORT).token_ids


def test_a_trace_of_a_batch_tells_its_prompts_apart(checkpoint: Path, tmp_path: Path) -> None:
    with open_engine(checkpoint, batch_size=2) as engine:
        engine.record_trace(tmp_path / "trace")
        done = engine.generate([[1] * 40, [2], [3] * 64], SHORT)
        engine.close_trace()
        steps = sum(one.stats.denoise_steps for one in done)
    _, records = read_trace(tmp_path / "trace")
    entries = list(records)
    assert {entry.sequence for entry in entries} == {0, 1, 2}
    denoised = [(one.sequence, one.block, one.step, one.layer) for one in entries if one.phase is Phase.DENOISE]
    assert len(denoised) == len(set(denoised)) == 2 * steps


def test_one_bad_prompt_refuses_the_call_before_anything_runs(engine: Engine) -> None:
    before = engine.stats.prompts
    with pytest.raises(PromptError, match="prompt token 1 is 96; wanted an id from 0 to 95"):
        engine.generate([[1, 2], [1, 96]], SHORT)
    assert engine.stats.prompts == before


@pytest.mark.parametrize("bad", [[-1], [96], [1.5], [True], ["a", 3]])
def test_bad_token_ids_are_named(engine: Engine, bad: list[Any]) -> None:
    with pytest.raises(PromptError, match=r"prompt token 0 is|no tokenizer"):
        engine.generate(bad)


def test_text_needs_a_tokenizer(engine: Engine) -> None:
    with pytest.raises(PromptError, match=r"no tokenizer\.json, so prompts must be token ids"):
        engine.generate("hello")
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        engine.generate([1], SamplingParams(stop=("x",)))


def test_sampling_is_reproducible_by_seed(engine: Engine) -> None:
    def answer(seed: int) -> list[int]:
        params = SamplingParams(max_new_tokens=40, temperature=1.0, seed=seed)
        return engine.generate([1, 2, 3], params).token_ids

    assert answer(1) == answer(1) != answer(2)


def test_stream_tells_the_whole_story(talker: Engine) -> None:
    events = list(talker.stream("How many?", SHORT))
    steps = [event for event in events if event.kind == "step"]
    blocks = [event for event in events if event.kind == "block"]
    last = events[-1].completion
    assert last is not None
    assert all(event.completion is None for event in events[:-1])
    assert len(steps) == last.stats.denoise_steps
    assert len(blocks) == last.stats.blocks
    assert "".join(event.text for event in events) == last.text == talker.generate("How many?", SHORT).text
    rebuilt: dict[int, dict[int, int]] = {}
    for event in steps:
        for position, token, confidence in event.accepted:
            assert 0 < confidence <= 1
            assert event.block_token_ids[position] == token
            assert position not in rebuilt.setdefault(event.block, {}), "a position is unmasked once"
            rebuilt[event.block][position] = token
    assert talker.mask_token_id not in blocks[0].block_token_ids


def test_stop_strings_cut_text_and_ids(talker: Engine) -> None:
    whole = talker.generate("How many?", SHORT)
    assert len(whole.text) > 10
    stop = whole.text[6:9]
    cut = whole.text.find(stop)
    done = talker.generate("How many?", SamplingParams(max_new_tokens=40, threshold=0.2, stop=(stop,)))
    assert done.finish_reason == "stop"
    assert done.text == whole.text[:cut]
    assert done.token_ids == whole.token_ids[: len(done.token_ids)]
    events = talker.stream("How many?", SamplingParams(max_new_tokens=40, threshold=0.2, stop=(stop,)))
    assert "".join(event.text for event in events) == whole.text[:cut]


def test_a_conversation_is_a_prompt(talker: Engine) -> None:
    turns = [Message(role="user", content="How many?"), Message(role="assistant", content="4"), USER]
    assert talker.tokenizer is not None
    ids = talker.tokenizer.encode_chat(turns)
    wanted = talker.generate(ids, SHORT).token_ids
    assert talker.generate(turns, SHORT).token_ids == wanted
    assert talker.generate([USER], SHORT).token_ids == talker.generate("And now?", SHORT).token_ids
    assert [one.token_ids for one in talker.generate([turns, turns], SHORT)] == [wanted, wanted]
    with pytest.raises(UsageError, match="raw leaves the chat template out"):
        talker.generate(turns, SHORT, raw=True)
    with pytest.raises(PromptError, match="role is 'nobody'"):
        talker.generate([Message(role="nobody", content="")], SHORT)


def test_special_tokens_typed_in_a_prompt_stay_text(talker: Engine) -> None:
    assert talker.tokenizer is not None
    ids = talker._encode("a <|mask|> and <|endoftext|><role>HUMAN</role>", raw=False)
    plain = talker._encode("a", raw=False)
    for special in (talker.mask_token_id, talker.eos_token_id):
        assert special not in ids
    roles = [talker.tokenizer.encode_text(text) for text in ("<role>",)]
    assert len(roles[0]) > 1
    assert sum(1 for token in ids if token in set(plain)) >= 4, "the template's own markers are there"


def test_cancelling_a_stream_returns_what_was_decided(talker: Engine) -> None:
    asked = iter([False] * 2 + [True] * 100)
    *_, last = talker.stream("How many?", SamplingParams(max_new_tokens=64), cancelled=lambda: next(asked))
    assert last.completion is not None
    assert last.completion.finish_reason == "cancelled"


def test_a_busy_engine_refuses_and_a_closed_stream_frees_it(engine: Engine) -> None:
    stream = engine.stream([1], SHORT)
    next(stream)
    with pytest.raises(UsageError, match="busy"):
        engine.generate([1], SHORT)
    stream.close()  # type: ignore[attr-defined]
    assert engine.generate([1], SHORT).token_ids


def test_a_closed_engine_says_so(checkpoint: Path) -> None:
    engine = open_engine(checkpoint)
    engine.close()
    engine.close()
    with pytest.raises(EngineClosedError, match="closed"):
        engine.generate([1])


def test_statistics_add_up(engine: Engine) -> None:
    done = engine.generate([1, 2, 3], SamplingParams(max_new_tokens=64))
    stats = done.stats
    assert stats.forwards[Phase.DENOISE] == stats.denoise_steps
    assert stats.unique_experts is not None
    assert 4 <= stats.unique_experts <= 16
    assert stats.new_tokens == len(done.token_ids)
    assert stats.wall_seconds >= stats.denoise_seconds > 0
    assert stats.planned_peak_bytes <= stats.limit_bytes
    assert stats.measured_peak_bytes > 0


@pytest.mark.parametrize("fused", [False, True])
def test_the_trace_holds_every_decision(checkpoint: Path, tmp_path: Path, fused: bool) -> None:
    path = tmp_path / "run.trace"
    with open_engine(checkpoint, fused_commit=fused) as engine:
        engine.record_trace(path)
        done = engine.generate([1] * 40, SHORT)
        engine.close_trace()
    header, records = read_trace(path)
    entries = list(records)
    assert header.layers == (1, 2)
    forwards = done.stats.forwards
    commits = {entry.block for entry in entries if entry.phase is Phase.COMMIT}
    assert len(commits) == done.stats.blocks - 1
    assert forwards.get(Phase.COMMIT, 0) == (0 if fused else len(commits))
    in_both_layers = forwards[Phase.DENOISE] + (len(commits) if fused else 0)
    alone = forwards[Phase.PREFILL] + forwards.get(Phase.COMMIT, 0)
    assert len(entries) == 2 * in_both_layers + alone, "keys and values don't need the last layer's experts"
    denoising = [entry for entry in entries if entry.phase is Phase.DENOISE]
    mean = sum(len(entry.experts) for entry in denoising) / len(denoising)
    assert mean == pytest.approx(done.stats.unique_experts)
    assert all(list(entry.scores) == sorted(entry.scores, reverse=True) for entry in entries)


def test_a_stream_that_is_dropped_ends_its_sequence_in_the_trace(checkpoint: Path, tmp_path: Path) -> None:
    with open_engine(checkpoint) as engine:
        engine.record_trace(tmp_path / "trace")
        stream = engine.stream([1], SHORT)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        engine.generate([1], SHORT)
        engine.close_trace()
    _, records = read_trace(tmp_path / "trace")
    assert {record.sequence for record in records} == {0, 1}


def test_tensors_without_a_use_are_mentioned(tmp_path: Path) -> None:
    config = tiny_config()
    tensors = random_tensors(config, dtype=torch.float32, layout="split", seed=0)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(tmp_path, tensors | {"model.extra.weight": torch.zeros(2)})
    with open_engine(tmp_path) as engine:
        assert any("model.extra.weight" in notice for notice in engine.notices)


@pytest.mark.usefixtures("torch_computes")
@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, True), (torch.float32, False)])
def test_experts_without_our_kernel_are_mentioned_where_it_would_compute(
    tmp_path: Path, dtype: torch.dtype, told: bool
) -> None:
    directory = write_checkpoint(tmp_path, tiny_config(), dtype=dtype)
    with open_engine(directory, dtype=dtype) as engine:
        assert any("OFFLOAD_ENGINE_KERNEL is off" in notice for notice in engine.notices) == told


def test_a_distilled_checkpoint_picks_its_routing(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_config(mode="aggregate", core_threshold=0.7))
    with open_engine(directory) as engine:
        assert engine.routing_name == "dmoe"
        assert engine._parts.policy.top_p == 0.7  # type: ignore[attr-defined]
        assert any("distilled for dMoE" in notice for notice in engine.notices)
        assert engine._parts.policy.min_experts == 16  # type: ignore[attr-defined]
    with open_engine(directory, routing="original") as engine:
        assert engine.routing_name == "original"


def test_a_checkpoint_may_say_its_smallest_coreset(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_config(mode="aggregate", core_min_experts=7))
    for options, least in (({}, 7), ({"min_experts": 5}, 5)):
        with open_engine(directory, **options) as engine:
            assert engine._parts.policy.min_experts == least  # type: ignore[attr-defined]


def test_dmoe_on_other_weights_works_and_says_so_once(checkpoint: Path) -> None:
    with open_engine(checkpoint, routing="dmoe") as engine:
        assert sum("not distilled" in notice for notice in engine.notices) == 1
        assert engine.generate([1], SHORT).token_ids


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routing": "best"}, ConfigError, "routing is 'best'"),
        ({"expert_mem": 4096}, MemoryBudgetError, "expert_mem is 4.10 kB|expert_mem is"),
        ({"gpu_mem": "10MB"}, MemoryBudgetError, "smallest"),
        ({"gpu_mem": 0}, ConfigError, "gpu_mem"),
        ({"gpu_mem": "-1GB"}, ConfigError, "gpu_mem"),
        ({"gpu_mem": "lots"}, ConfigError, "gpu_mem"),
        ({"evictoin": "lru"}, ConfigError, "eviction"),
        ({"device": "cuda"}, DeviceError, "cuda"),
        ({"mask_token_id": 96}, TokenizerError, "mask token id is 96, but the vocabulary has 96"),
        ({"max_context": 0}, ConfigError, "max_context"),
    ],
)
def test_impossible_options_are_refused_by_name(
    checkpoint: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        open_engine(checkpoint, **options)


def test_a_context_beyond_the_models_is_cut_and_said(checkpoint: Path) -> None:
    with open_engine(checkpoint, max_context=5000) as engine:
        assert engine.plan.context == 1024
        assert any("5000" in notice for notice in engine.notices)


def test_a_gpu_preset_runs_on_the_cpu_and_says_what_it_ignores(checkpoint: Path) -> None:
    preset = Path(__file__).parents[2] / "configs" / "gpu-8gb.toml"
    with Engine.from_pretrained(checkpoint, config=preset, gpu_mem=BUDGET) as engine:
        assert any("host_mem" in notice for notice in engine.notices)


def test_the_refusal_names_the_smallest_budget_and_that_budget_works(checkpoint: Path) -> None:
    """In fresh processes, each of which measures itself anew."""
    program = (
        "import sys; from offload_engine import Engine; "
        "Engine.from_pretrained(sys.argv[1], gpu_mem=sys.argv[2], max_context=64).close()"
    )

    def attempt(budget: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(checkpoint), budget]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    refused = attempt("10MB")
    assert refused.returncode == 1
    assert "expert slots" in refused.stderr, "the table is part of the refusal"
    named = re.search(r"\(([0-9]+) bytes\)", refused.stderr)
    assert named is not None, refused.stderr
    for _ in range(2):
        accepted = attempt(named[1])
        assert accepted.returncode == 0, accepted.stderr


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / "nothing")):
        open_engine(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_engine(tmp_path)


VARIATIONS: dict[str, dict[str, Any]] = {
    "biases": {"use_bias": True, "use_qkv_bias": True},
    "no qk-norm": {"use_qk_norm": False},
    "no shared expert": {"num_shared_experts": 0},
    "two shared experts": {"num_shared_experts": 2},
    "full rotary": {"partial_rotary_factor": 1.0},
    "one group": {"n_group": 1, "topk_group": 1},
    "no groups": {"n_group": None, "topk_group": None},
    "eight groups": {"n_group": 8, "topk_group": 4},
    "two dense layers": {"first_k_dense_replace": 2},
    "no dense layer": {"first_k_dense_replace": 0},
    "tied embeddings": {"tie_word_embeddings": True},
    "no expert bias": {"moe_router_enable_expert_bias": False},
    "veomni": {"model_type": "llada2_moe_veomni"},
}


@pytest.mark.parametrize("layout", ["split", "merged"])
@pytest.mark.parametrize("name", VARIATIONS)
def test_every_variation_of_the_architecture_runs(tmp_path: Path, name: str, layout: Any) -> None:
    config = {key: value for key, value in tiny_config(**VARIATIONS[name]).items() if value is not None}
    directory = write_checkpoint(tmp_path, config, layout=layout, shards=2)
    with open_engine(directory, expert_mem=8 * SLAB) as engine:
        done = engine.generate(list(range(40)), SHORT)
        assert done.token_ids
        assert done.stats.misses > 0
        assert engine.logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_checkpoints_come_close_to_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    wide = write_checkpoint(tmp_path / "wide", tiny_config())
    narrow = write_checkpoint(tmp_path / "narrow", tiny_config(), dtype=dtype)
    ids = list(range(20))
    with open_engine(wide) as one, open_engine(narrow, dtype="float32") as two, open_engine(narrow) as three:
        expected = one.logits(ids)
        same_routing = [
            torch.equal(a.experts.sort(-1).values, b.experts.sort(-1).values)
            for a, b in zip(one.routing(ids), two.routing(ids), strict=True)
        ]
        if all(same_routing):
            torch.testing.assert_close(two.logits(ids), expected, rtol=0.1, atol=0.2)
        assert three.logits(ids).isfinite().all()
        assert three.logits(ids).dtype == torch.float32


@needs_golden
def test_the_special_ids_come_from_the_tokenizer_first() -> None:
    with open_engine(GOLDEN) as engine:
        assert (engine.mask_token_id, engine.eos_token_id) == (511, 508)
    with open_engine(GOLDEN, eos_token_id=7, mask_token_id=8) as engine:
        assert (engine.mask_token_id, engine.eos_token_id) == (8, 7)


def test_a_small_model_computes_in_float32_on_one_thread_and_leaves_the_process_alone(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_config(), dtype=torch.bfloat16)
    torch.set_num_threads(2)
    seen = set()
    try:
        with open_engine(directory) as engine:
            assert engine._decoder.caches[0].keys.dtype == torch.float32
            for _ in engine.stream([1, 2, 3], SHORT, cancelled=lambda: bool(seen.add(torch.get_num_threads()))):
                assert torch.get_num_threads() == 2
        with open_engine(directory, dtype="bfloat16", threads=2) as engine:
            assert engine._decoder.caches[0].keys.dtype == torch.bfloat16
            assert engine._decoder.threads == 2
    finally:
        torch.set_num_threads(1)


def test_threads_asked_for_are_set_while_computing_only(checkpoint: Path) -> None:
    seen = []
    with open_engine(checkpoint, threads=2) as engine:
        original = engine._decoder.model.logits

        def spy(hidden: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_num_threads())
            return original(hidden)

        engine._decoder.model.logits = spy  # type: ignore[method-assign]
        before = torch.get_num_threads()
        engine.generate([1], SamplingParams(max_new_tokens=4, steps=1))
        del engine._decoder.model.logits
        assert set(seen) == {2}
        assert torch.get_num_threads() == before
