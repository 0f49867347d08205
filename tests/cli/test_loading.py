from __future__ import annotations

import time

import pytest

from offload_engine.cli import progress
from offload_engine.cli.loading import loading_progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then_with_rate_and_time_left(clock, capsys):
    with loading_progress() as report:
        clock[0] += 60  # to find the model, say, which is not the disk's rate
        for second in range(13):
            report("weights", second * 100_000_000, 1_200_000_000)
            clock[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "loading weights: 500 MB of 1.20 GB, 100 MB/s, 7 s left",
        "loading weights: 1.00 GB of 1.20 GB, 100 MB/s, 2 s left",
        "loaded 1.20 GB of weights in 73.0 s",
    ]


def test_a_download_is_told_of_for_itself(clock, capsys):
    with loading_progress() as report:
        for second in range(11):
            report("download", second * 10**8, 10**9)
            clock[0] += 1
        for second in range(7):
            report("weights", second * 10**9, 6 * 10**9)
            clock[0] += 1
    assert capsys.readouterr().err.splitlines() == [
        "downloading: 500 MB of 1.00 GB, 100 MB/s, 5 s left",
        "downloaded 1.00 GB in 11.0 s",
        "loading weights: 5.00 GB of 6.00 GB, 1.00 GB/s, 1 s left",
        "loaded 6.00 GB of weights in 7.0 s",
    ]


def test_a_quick_load_is_one_line(clock, capsys):
    with loading_progress() as report:
        report("weights", 10, 20)
        report("weights", 20, 20)
    assert capsys.readouterr().err == "loaded 20 B of weights in 0.0 s\n"


def test_a_terminal_gets_a_bar_and_the_last_line(capsys, monkeypatch):
    monkeypatch.setattr(progress, "stderr_is_live", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with loading_progress() as report:
        report("weights", 10_000_000, 20_000_000)
        report("weights", 20_000_000, 20_000_000)
    shown = capsys.readouterr().err
    assert "loading weights" in shown
    assert "20.0 MB of 20.0 MB" in shown
    assert shown.endswith(" s\n")


def test_a_load_that_fails_is_not_called_done(capsys):
    def fail():
        with loading_progress() as report:
            report("weights", 10, 20)
            raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError):
        fail()
    assert "loaded" not in capsys.readouterr().err
