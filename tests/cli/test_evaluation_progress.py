"""How an evaluation tells of its progress."""

from __future__ import annotations

import time

import pytest

from offload_engine.cli import progress
from offload_engine.cli.evaluation_progress import evaluation_progress

RIGHT, WRONG = {"strict": True}, {"strict": False}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then_with_accuracy_and_time_left(clock, capsys):
    with evaluation_progress(200, {}) as show:
        for number in range(1, 26):
            clock[0] += 1
            show(RIGHT if number % 5 else WRONG)
    assert capsys.readouterr().err.splitlines() == [
        "answers: 10 of 200, 80.0 % right, 1.0/s, 3:10 left",
        "answers: 20 of 200, 80.0 % right, 1.0/s, 3:00 left",
        "answers: 25 of 200, 80.0 % right, 1.0/s, 2:55 left",
    ]


def test_answers_of_an_earlier_run_count_for_accuracy_but_not_for_speed(clock, capsys):
    with evaluation_progress(4, {"a": True, "b": False}) as show:
        for _ in range(2):
            clock[0] += 2
            show(RIGHT)
    assert capsys.readouterr().err.splitlines() == [
        "going on after 2 of 4 answers",
        "answers: 4 of 4, 75.0 % right, 0.5/s, 0 s left",
    ]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(
    ("before", "told"),
    [
        ({"a": True, "b": False}, "answers: 2 of 2, 50.0 % right"),
        ({"a": True}, "answers: 1 of 2, 100.0 % right"),
        ({}, "no answers"),
    ],
)
def test_nothing_new_is_no_division_by_zero(capsys, monkeypatch, live: bool, before: dict[str, bool], told: str):
    monkeypatch.setattr(progress, "stderr_is_live", lambda: live)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with evaluation_progress(2, before):
        pass
    assert capsys.readouterr().err.splitlines()[-1].endswith(told)


def test_a_terminal_gets_a_bar_and_the_last_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "stderr_is_live", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with evaluation_progress(2, {}) as show:
        show(RIGHT)
        show(WRONG)
    shown = capsys.readouterr().err
    assert "2 of 2" in shown
    assert "50.0 % right" in shown
    assert shown.splitlines()[-1].endswith(" left")
