"""The table of batches: what it counts, on a model that runs in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.checkpoints import tiny_config, write_checkpoint
from tools.bench_batches import Measured, main, table


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
