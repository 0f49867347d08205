"""One way of telling how far a long piece of work is."""

from __future__ import annotations

import threading
import time

import pytest

from offload_engine import Engine, SamplingParams
from offload_engine.cli import progress
from offload_engine.cli.loading import prefill_progress
from offload_engine.cli.progress import PIECES, RUNS, TOKENS, Progress, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(progress, "stderr_is_live", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (190, "3:10"), (7390, "2:03:10")]
)
def test_durations_read_as_on_a_clock(seconds, told):
    assert duration(seconds) == told


def test_what_was_done_before_is_no_speed(clock):
    with Progress("answers", 10, PIECES, done=4) as shown:
        clock[0] += 10
        assert shown.line() == "answers: 4 of 10"
        shown.advance(1)
        assert shown.line() == "answers: 5 of 10, 0.1/s, 50 s left"


def test_lines_come_so_many_seconds_apart_and_carry_the_remark(clock, capsys):
    with Progress("reading", 100, TOKENS, every=2) as shown:
        for done in range(10, 101, 10):
            clock[0] += 1
            shown.show(done, "all well")
    assert capsys.readouterr().err.splitlines() == [
        f"reading: {done} tokens of 100 tokens, all well, 10 tokens/s, {10 - done // 10} s left"
        for done in (20, 40, 60, 80)
    ]


def test_a_bar_goes_away_whatever_ends_the_work(live, capsys):
    def fail():
        with Progress("writing", 100) as shown:
            shown.show(10)
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        fail()
    shown = capsys.readouterr().err
    assert "writing: 10 B of 100 B" in shown
    assert shown.rstrip().endswith("\x1b[2K"), "the line was taken away"


def test_what_is_quick_draws_no_bar(live, clock, capsys):
    with Progress("reading", 100, TOKENS, patience=1) as shown:
        shown.show(50)
        assert capsys.readouterr().err == ""
        clock[0] += 2
        shown.show(60)
    assert "reading: 60 tokens of 100 tokens, 30 tokens/s, 1 s left" in capsys.readouterr().err


def test_a_long_prompt_is_shown_while_it_is_read(speaking, live, monkeypatch, capsys):
    monkeypatch.setattr("offload_engine.cli.loading.PATIENCE", 0.0)
    params = SamplingParams(max_new_tokens=8, block_length=16, steps=2)
    with Engine.from_pretrained(speaking, gpu_mem="4GB", max_context=512) as engine:
        with prefill_progress(engine):
            engine.generate("x" * 200, params)
            assert "reading the prompt: " in capsys.readouterr().err
            engine.generate("y" * 300, params)
            assert "tokens of 304 tokens" in capsys.readouterr().err
        engine.generate("z" * 200, params)
        assert capsys.readouterr().err == ""


def test_a_still_bar_is_drawn_when_told_and_by_no_thread(live, capsys):
    before = threading.active_count()
    with Progress("runs", 4, PIECES, still=True) as shown:
        shown.show(1)
        assert "runs: 1 of 4" in capsys.readouterr().err
        assert threading.active_count() == before


def test_a_total_may_be_corrected_on_the_way(live, capsys):
    with Progress("runs", 4, PIECES) as shown:
        shown.show(1, "all well")
        shown.show_of(1, 2)
    assert "runs: 1 of 2, all well" in capsys.readouterr().err


def test_what_takes_long_is_told_by_the_piece(clock, capsys):
    with Progress("runs", 4, RUNS, every=0, still=True) as shown:
        shown.show(0)
        for done in range(1, 5):
            clock[0] += 90
            shown.show(done)
        assert shown.line() == "runs: 4 of 4, 1:30 each, 0 s left"
    assert capsys.readouterr().err.splitlines() == [
        "runs: 0 of 4",
        "runs: 1 of 4, 1:30 each, 4:30 left",
        "runs: 2 of 4, 1:30 each, 3:00 left",
        "runs: 3 of 4, 1:30 each, 1:30 left",
    ]
