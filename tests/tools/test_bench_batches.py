"""The table of batches: what it counts, on a model that runs in milliseconds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from tests.checkpoints import tiny_config, write_checkpoint
from tools import bench_batches
from tools.bench_batches import Measured, answer, main, samples, table


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("batches"), tiny_config())


def test_every_batch_size_answers_all_prompts(small: Path) -> None:
    size = ["--gpu-mem", "2GB", "--expert-mem", "150KB", "--batches", "1,3"]
    length = ["--prompts", "4", "--blocks", "1", "--prompt-tokens", "9", "--rounds", "1", "--steps", "2"]
    ran = CliRunner().invoke(main, ["--model", str(small), *size, *length, "--json"])
    assert ran.exit_code == 0, ran.output
    rounds = json.loads(ran.stdout.splitlines()[-1])
    assert [[one["batch_size"] for one in row] for row in rounds] == [[1, 3]]
    alone, together = rounds[0]
    assert alone["tokens"] == together["tokens"] > 0
    assert 2 <= alone["slots"] == together["slots"] < 32, "as many as --expert-mem holds"
    assert together["forwards"] < alone["forwards"], "prompts of a batch share their forwards"


def test_samples_are_of_one_prompt_and_differ(small: Path) -> None:
    asked = samples([5, 6, 7, 8], 3, SamplingParams(max_new_tokens=28, steps=4))
    assert {tuple(prompt) for prompt, _params in asked} == {(5, 6, 7, 8)}
    assert len({params.seed for _prompt, params in asked}) == 3
    with Engine.from_pretrained(small, gpu_mem="2GB", batch_size=2) as engine:
        answers = [engine.generate(list(prompt), params).token_ids for prompt, params in asked]
        assert answer(engine, asked) == sum(map(len, answers))
    assert len(set(map(tuple, answers))) == 3
    size = [
        "--gpu-mem",
        "2GB",
        "--batches",
        "2",
        "--prompts",
        "2",
        "--blocks",
        "1",
        "--prompt-tokens",
        "9",
        "--samples",
    ]
    ran = CliRunner().invoke(main, ["--model", str(small), *size, "--steps", "2"])
    assert ran.exit_code == 0, ran.output
    assert "| 2 | " in ran.stdout


def test_every_batch_size_tells_how_long_the_rest_takes(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def takes_a_minute(config: EngineConfig, *_passes: Any) -> Measured:
        now[0] += 60
        return Measured(config.batch_size, 100, 7, 60.0, 10**9, 0.5, 9, 0.25, 1.75)

    monkeypatch.setattr(bench_batches, "measure_apart", takes_a_minute)
    ran = CliRunner().invoke(main, ["--model", str(small), "--gpu-mem", "2GB", "--batches", "1,4", "--rounds", "2"])
    assert ran.exit_code == 0, ran.output
    assert ran.stderr.splitlines() == [
        "passes: 0 of 4, round 1 of 2, batches of 1",
        "passes: 1 of 4, round 1 of 2, batches of 4, 1:00 each, 3:00 left",
        "passes: 2 of 4, round 2 of 2, batches of 1, 1:00 each, 2:00 left",
        "passes: 3 of 4, round 2 of 2, batches of 4, 1:00 each, 1:00 left",
    ]
    assert len(ran.stdout.splitlines()) == 4


@pytest.mark.parametrize("batches", ["x", "1,,2", "0", "-1"])
def test_batches_that_are_no_numbers_are_refused(batches: str) -> None:
    ran = CliRunner().invoke(main, ["--gpu-mem", "2GB", "--expert-mem", "150KB", "--batches", batches])
    assert ran.exit_code == 2
    assert "wanted batch sizes from 1 on" in ran.stderr


def test_medians_over_the_rounds() -> None:
    def one(seconds: float, moved: int) -> Measured:
        return Measured(2, 100, 7, seconds, moved, 0.5, 9, 0.25, 1.75)

    lines = table([[one(1.0, 10**9)], [one(9.0, 10**9)], [one(2.0, 3 * 10**9)]]).splitlines()
    assert lines[-1] == "| 2 | 1.8 | 9 | 20.0 | 10.00 | 50.0 % | 25.0 % |"
