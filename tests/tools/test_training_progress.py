"""What trainers say on the way: rate and time left, as a bar on a terminal, as lines elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from offload_engine.cli import progress as telling
from tools import train
from tools.finetuning import tuner
from tools.finetuning.progress import Progress
from tools.training.checkpoint import Clock, Schedule
from tools.training.trainer import StepReport

SECONDS = 0.5
"""A step takes."""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telling, "stderr_is_live", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")


def tune(log: Path, clock: list[float], first: int, last: int) -> None:
    with Progress(log, 20, first, every=4) as progress:
        for step in range(first, last):
            clock[0] += SECONDS
            progress.add(step, tuner.StepReport(1.0 + step % 4, 0.5, 1.0, masked=10, tokens=100), 1e-3)


def test_fine_tuning_tells_a_line_every_so_many_steps(tmp_path, clock, capsys):
    tune(tmp_path / "log.jsonl", clock, 0, 10)
    remark = "loss {}, accuracy 0.5000, lr 1.00e-03, 200 tokens/s, 2.0/s, {} s left"
    assert capsys.readouterr().err.splitlines() == [
        f"steps: {done} of 20, {remark.format(loss, left)}"
        for done, loss, left in ((4, "2.5000", 8), (8, "2.5000", 6), (10, "1.5000", 5))
    ]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(10))
    assert {line["tokens_per_s"] for line in lines} == {200}


def test_fine_tuning_that_goes_on_counts_its_own_time(tmp_path, clock, capsys):
    tune(tmp_path / "log.jsonl", clock, 10, 12)
    assert capsys.readouterr().err.splitlines()[0].startswith("steps: 12 of 20, loss 3.5000,")
    tune(tmp_path / "log.jsonl", clock, 12, 12)
    assert capsys.readouterr().err == ""


def test_fine_tuning_at_a_terminal_is_a_bar(tmp_path, clock, live, capsys):
    tune(tmp_path / "log.jsonl", clock, 0, 3)
    drawn = capsys.readouterr().err
    assert "steps: 3 of 20, loss 2.0000" in drawn
    assert "\x1b[2K" in drawn, "it is redrawn, and taken away at the end"


def pretrain(log: Path, clock: list[float], schedule: Schedule, minutes: float | None, steps: int) -> None:
    limit = None if minutes is None else Clock(minutes, 0.25, started=clock[0])
    with train.Progress(log, schedule, limit, 0, every=4) as progress:
        for step in range(steps):
            clock[0] += SECONDS
            progress.add(step, StepReport(2.0, 0.25, 1.0), 50)


def test_training_tells_steps_and_time_left(tmp_path, clock, capsys):
    pretrain(tmp_path / "log.jsonl", clock, Schedule.of_steps(8, 1, 0.25), None, 8)
    assert capsys.readouterr().err.splitlines() == [
        "steps: 4 of 8, loss 2.0000, accuracy 0.2500, 100 tokens/s, 2.0/s, 2 s left",
        "steps: 8 of 8, loss 2.0000, accuracy 0.2500, 100 tokens/s, 2.0/s, 0 s left",
    ]
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [4, 8]


def test_training_by_the_clock_guesses_its_length(tmp_path, clock, capsys):
    pretrain(tmp_path / "log.jsonl", clock, Schedule(), 1.0, 4)
    assert "steps: 4 of 120, loss 2.0000" in (said := capsys.readouterr().err.splitlines()[0])
    assert said.endswith("2.0/s, 58 s left")
