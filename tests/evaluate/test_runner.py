"""Runs of the built-in model: what a record says is what the engine did."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from offload_engine.core import Phase, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import PromptError
from offload_engine.evaluate.fingerprint import PIECE, PIECES, fingerprint
from offload_engine.evaluate.grading import Grade
from offload_engine.evaluate.records import Memory, Record, RunFolder, read_run
from offload_engine.evaluate.runner import about, evaluate, run_folder_settings
from offload_engine.evaluate.summary import middle_layer, summarise, table
from offload_engine.evaluate.tasks import arithmetic_task
from offload_engine.trace import TraceRecord, read_trace

PARAMS = SamplingParams(max_new_tokens=128)
TASK = arithmetic_task(5, seed=2)


def unique_by_forward(records: list[TraceRecord]) -> list[dict[int, int]]:
    """Layer -> distinct experts of each denoising forward of one answer, by its routing trace."""
    forwards: dict[tuple[int, int], dict[int, int]] = defaultdict(dict)
    for record in records:
        if record.phase == Phase.DENOISE:
            forwards[record.block, record.step][record.layer] = len(record.experts)
    return list(forwards.values())


@pytest.fixture(scope="module")
def records(engine: Engine) -> list[Record]:
    return list(evaluate(engine, TASK, PARAMS))


def test_records_say_what_the_engine_did(engine: Engine, records: list[Record]):
    for sample, record in zip(TASK.samples, records, strict=True):
        done = engine.generate(sample.prompt, PARAMS)
        assert record["generation"] == done.text
        assert record["prompt"] == sample.prompt
        assert (record["strict"], record["soft"]) == TASK.grade(done.text, sample.gold)
        assert record["strict"] == done.text.endswith(f"\\boxed{{{sample.gold}}}")
        assert record["tokens"] == len(done.token_ids)
        assert record["steps"] == record["forwards"]["denoise"] == len(record["unique_by_forward"])
        assert record["finish_reason"] == done.finish_reason
        assert record["unique_experts"] == done.stats.unique_experts
        assert record["tags"]["kind"]
    assert json.loads(json.dumps(records)) == records


def test_unique_experts_are_those_of_the_routing_trace(engine: Engine, tmp_path: Path):
    path = tmp_path / "trace.jsonl"
    engine.record_trace(path)
    try:
        records = list(evaluate(engine, TASK, PARAMS))
    finally:
        engine.close_trace()
    traced: dict[int, list[TraceRecord]] = defaultdict(list)
    for row in read_trace(path)[1]:
        traced[row.sequence].append(row)
    for record, rows in zip(records, traced.values(), strict=True):
        forwards = unique_by_forward(rows)
        means = [sum(layers.values()) / len(layers) for layers in forwards]
        assert record["unique_by_forward"] == pytest.approx(means, abs=1e-4)
        assert record["unique_mid_by_forward"] == [layers[2] for layers in forwards]
        assert record["unique_experts"] == pytest.approx(sum(means) / len(means))
        for layer in (1, 2, 3):
            expected = sum(layers[layer] for layers in forwards) / len(forwards)
            assert record["unique_by_layer"][str(layer)] == pytest.approx(expected)


def test_a_run_that_was_cut_off_equals_one_that_was_not(engine: Engine, tmp_path: Path, records: list[Record]):
    settings, facts = run_folder_settings(engine, TASK, PARAMS), about(engine)
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 12

    with RunFolder(tmp_path, settings, facts) as folder:
        first = list(evaluate(engine, TASK, PARAMS, folder, cancelled=cancelled))
    assert 0 < len(first) < len(records), "an answer that was cut off is not kept"
    with RunFolder(tmp_path, settings, facts) as folder:
        rest = list(evaluate(engine, TASK, PARAMS, folder))
        assert list(evaluate(engine, TASK, PARAMS, folder)) == []
    timeless = [
        {key: record[key] for key in ("index", "id", "generation", "strict", "tokens", "unique_by_forward")}
        for record in read_run(tmp_path).records
    ]
    assert timeless == [{key: record[key] for key in timeless[0]} for record in records]
    assert len(first) + len(rest) == len(records)


def test_sampled_answers_do_not_depend_on_where_a_run_was_cut(engine: Engine):
    params = SamplingParams(max_new_tokens=16, steps=4, temperature=20.0, seed=5)
    whole = [record["generation"] for record in evaluate(engine, TASK, params)]
    memory = Memory()
    memory.done = {TASK.samples[0].id: True, TASK.samples[1].id: True}
    assert [record["generation"] for record in evaluate(engine, TASK, params, memory)] == whole[2:]
    same = replace(TASK, samples=[TASK.samples[0], replace(TASK.samples[0], id="again")])
    one, other = (record["generation"] for record in evaluate(engine, same, params))
    assert one != other, "each sample is drawn with a seed of its own"


def test_settings_tell_runs_apart(engine: Engine):
    settings = run_folder_settings(engine, TASK, PARAMS)
    assert json.loads(json.dumps(settings))["routing"] == {"name": "original", "k": 8}
    assert settings["fingerprint"] == fingerprint(engine.directory)
    assert settings["sampling"]["max_new_tokens"] == 128
    assert settings["engine"]["gpu_mem"] == 4 * 10**9
    assert (settings["model"], settings["dtype"], settings["seed"]) == ("built-in", "float32", 2)


def test_a_prompt_too_long_is_named(engine: Engine):
    task = replace(TASK, samples=[replace(TASK.samples[0], prompt="apples " * 900)])
    with pytest.raises(PromptError, match=r"sample 2-0: the prompt has .* tokens"):
        list(evaluate(engine, task, PARAMS))


def test_a_line_too_long_is_refused_before_the_first_answer(engine: Engine):
    long = replace(TASK.samples[1], prompt="apples " * 900, where="data.jsonl:2")
    task, memory = replace(TASK, samples=[TASK.samples[0], long]), Memory()
    with pytest.raises(PromptError) as refused:
        list(evaluate(engine, task, PARAMS, memory))
    assert re.fullmatch(
        r"data\.jsonl:2: the prompt has \d{3,} tokens, but the context holds 512 with the answer in whole blocks "
        r"of 32; set max_context higher \(the model has \d+ positions; gpu_mem must hold them\), or remove the line",
        str(refused.value),
    )
    assert memory.records() == []
    memory.done = {long.id: False}
    assert len(list(evaluate(engine, task, PARAMS, memory))) == 1, "what was answered before isn't asked again"


def test_a_samples_place_is_no_part_of_its_record(engine: Engine):
    placed = [replace(sample, where=f"/somewhere/data.jsonl:{n}") for n, sample in enumerate(TASK.samples[:1], 1)]
    [record] = evaluate(engine, replace(TASK, samples=placed), PARAMS)
    assert "somewhere" not in json.dumps(record)


def test_a_samples_choices_reach_its_grader(engine: Engine):
    told: list[tuple[str, ...]] = []

    def grader(_generation: str, _gold: str, labels: tuple[str, ...] = ()) -> Grade:
        told.append(labels)
        return Grade(True, True)

    sample = TASK.samples[0]
    samples = [replace(sample, labels=("A", "B")), replace(sample, id="other")]
    list(evaluate(engine, replace(TASK, samples=samples, grader=grader), PARAMS))
    assert told == [("A", "B"), ()]


def test_a_summary_is_the_sum_of_its_records(engine: Engine, records: list[Record]):
    summary = summarise(run_folder_settings(engine, TASK, PARAMS), about(engine), records)
    assert (summary["n"], summary["complete"]) == (5, True)
    assert summary["strict"]["right"] == sum(record["strict"] for record in records)
    assert summary["strict"]["low"] < summary["strict"]["accuracy"] <= summary["strict"]["high"]
    assert summary["tokens_per_step"] == sum(r["tokens"] for r in records) / sum(r["steps"] for r in records)
    assert summary["unique_experts"] == pytest.approx(sum(r["unique_experts"] for r in records) / 5)
    middle = [count for record in records for count in record["unique_mid_by_forward"]]
    mean = sum(middle) / len(middle)
    assert summary["unique_experts_middle"]["layer"] == 2
    assert summary["unique_experts_middle"]["mean"] == pytest.approx(mean)
    spread = (sum((count - mean) ** 2 for count in middle) / len(middle)) ** 0.5
    assert summary["unique_experts_middle"]["cv"] == pytest.approx(spread / mean)
    assert summary["finish_reasons"] == {"eos": 5}
    assert summary["peak_bytes"] > 0
    assert summary["planned_peak_bytes"] == engine.plan.total
    shown = table(summary)
    assert f"{100 * summary['strict']['accuracy']:.2f} % ({summary['strict']['right']} of 5" in shown
    assert "original (k 8)" in shown
    assert summarise(run_folder_settings(engine, TASK, PARAMS), about(engine), records[:3])["complete"] is False


def made_record(**fields: Any) -> Record:
    """A record of numbers that tell apart what they are summed with."""
    return {
        "strict": True,
        "soft": True,
        "finish_reason": "eos",
        "unique_experts": 6.0,
        "unique_by_layer": {"1": 6.0},
        "unique_by_forward": [6.0],
        "unique_mid_by_forward": [6],
        "forwards": {"denoise": 1},
        **dict.fromkeys(("tokens", "steps", "blocks", "seconds", "stall_seconds", "hits", "late", "misses"), 0),
        **dict.fromkeys(("bytes_moved", "peak_bytes"), 0),
    } | fields


def test_rates_are_of_totals_and_variation_is_over_all_forwards():
    records = [
        made_record(tokens=10, seconds=1.0, hits=6, late=1, misses=1, unique_by_forward=[2.0, 4.0, 6.0]),
        made_record(tokens=90, seconds=3.0, hits=0, late=3, misses=9, unique_by_forward=[8.0]),
    ]
    summary = summarise({"n": 2}, {"moe_layers": [1]}, records)
    assert summary["tokens_per_second"] == 25.0, "not the mean of 10 and 30"
    assert summary["hit_rate"] == 6 / 20, "late is no hit, and it is of all requests"
    assert summary["unique_experts_cv"] == pytest.approx(5**0.5 / 5), "of 2, 4, 6, 8 together"


def test_an_empty_run_has_a_summary(engine: Engine):
    summary = summarise(run_folder_settings(engine, TASK, PARAMS), about(engine), [])
    assert summary["strict"] == {"right": 0, "accuracy": None, "low": None, "high": None}
    assert summary["unique_experts"] is None
    assert "n/a" in table(summary)
    json.dumps(summary)


def test_the_middle_layer_is_the_papers():
    assert middle_layer(range(1, 20)) == 10
    assert middle_layer(range(1, 4)) == 2


def test_the_fingerprint_is_of_content_not_of_place(tmp_path: Path):
    def checkpoint(name: str, weights: bytes, config: str = "{}") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "notes.txt").write_text(name)
        return fingerprint(tmp_path / name)

    weights = bytes(range(256)) * 1000
    one = checkpoint("one", weights)
    assert one == checkpoint("two", weights)
    changed = {checkpoint(f"byte-{at}", weights[:at] + b"!" + weights[at + 1 :]) for at in (1, 100_000, 255_999)}
    assert len(changed | {one, checkpoint("config", weights, "[]"), checkpoint("longer", weights + b"\0")}) == 6
    assert one != checkpoint("same-weights", weights, "{ }")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        before = fingerprint(tmp_path / "two")
        (tmp_path / "two" / name).write_text("{}")
        assert fingerprint(tmp_path / "two") != before, name
    large = bytes(PIECE * (PIECES + 9))
    assert checkpoint("large", large) != checkpoint("tuned", b"\1" * len(large))
