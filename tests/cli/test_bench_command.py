"""`dmoe bench` from outside: a small run in processes of its own, what is refused, what an interrupt leaves."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_engine.bench.cgroup import CgroupUnavailableError
from offload_engine.bench.spec import Run
from offload_engine.cli import bench as command
from tests.bench.bench_data import BANDWIDTH, measured, ours, run
from tests.cli.command_line import complaint, dmoe_command

SMALL = ["--gpu-mem", "4GB", "--max-context", "256", "--expert-mem", "2MB", "--threads", "1"]
SHORT = ["--rounds", "1", "--blocks", "1", "--warm-up", "1", "--steps", "2", "--prompt-tokens", "8"]


def made_up(*runs: Run) -> Any:
    """Rounds that end with these runs, and with what comes after them."""

    def rounds(*_arguments: Any) -> Iterator[Run]:
        yield from runs

    return rounds


def test_a_run_on_the_built_in_model(tmp_path: Path) -> None:
    only = ["--only", "engine/dmoe", "--only", "mmap/dmoe"]
    result = dmoe_command("bench", *SMALL, *SHORT, *only, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found["contenders"]) == {"engine/dmoe", "mmap/dmoe"}
    assert found["contenders"]["engine/dmoe"]["belady"] > 0
    assert found["ratios"]["mmap/dmoe : engine/dmoe"] > 0
    assert not [note for note in found["notes"] if "busy" not in note]
    assert "round 1 of 1: mmap/dmoe:" in result.stderr
    told = re.search(r"^runs: 1 of 2, (.+) each, (.+) left$", result.stderr, re.MULTILINE)
    assert told is not None
    assert told[1] == told[2], "the other one is taken to need as long"
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    assert "| engine/dmoe" in (tmp_path / "bench.md").read_text()


def test_without_control_groups_it_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "refusal", lambda limit: "not for you")
    monkeypatch.setattr(command, "run_rounds", made_up(run("engine/dmoe", ours())))
    result = dmoe_command("bench", "--limit", "2GB", "--only", "engine/dmoe")
    assert result.exit_code == 0
    assert "no memory limit was in force: not for you" in result.stdout
    assert "note: contenders run without a memory limit: not for you" in result.stderr


def test_what_had_ended_before_an_interrupt_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rounds(*_arguments: Any) -> Iterator[Run]:
        yield run("engine/dmoe", ours())
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_rounds", rounds)
    result = dmoe_command("bench", "--out", tmp_path)
    assert result.exit_code == 130
    assert "interrupted: these are the contenders that had finished" in result.stdout
    assert "engine/dmoe" in json.loads((tmp_path / "bench.json").read_text())["contenders"]


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_it_do_so_as_ctrl_c_does(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sent: signal.Signals
) -> None:
    def rounds(*_arguments: Any) -> Iterator[Run]:
        yield run("engine/dmoe", ours())
        signal.raise_signal(sent)

    monkeypatch.setattr(command, "run_rounds", rounds)
    before = signal.signal(sent, signal.SIG_DFL)  # a run under nohup ignores SIGHUP, and so would the command
    try:
        assert dmoe_command("bench", "--out", tmp_path).exit_code == 130
        assert signal.getsignal(sent) == signal.SIG_DFL
    finally:
        signal.signal(sent, before)
    assert "engine/dmoe" in json.loads((tmp_path / "bench.json").read_text())["contenders"]


def test_what_had_ended_before_an_error_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rounds(*_arguments: Any) -> Iterator[Run]:
        yield run("engine/dmoe", ours())
        raise CgroupUnavailableError("the group is gone")

    monkeypatch.setattr(command, "run_rounds", rounds)
    result = dmoe_command("bench", "--out", tmp_path)
    assert result.exit_code == 1
    assert "error: the group is gone" in result.stderr
    assert "| engine/dmoe" in result.stdout
    assert "engine/dmoe" in json.loads((tmp_path / "bench.json").read_text())["contenders"]


def test_tables_are_printed_whatever_becomes_of_the_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def rounds(*_arguments: Any) -> Iterator[Run]:
        yield run("engine/dmoe", ours())
        tmp_path.joinpath("out").rmdir()
        tmp_path.joinpath("out").write_text("")

    monkeypatch.setattr(command, "run_rounds", rounds)
    result = dmoe_command("bench", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "can't be written" in result.stderr
    assert "| engine/dmoe" in result.stdout


def test_the_files_of_every_model_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    seen: list[Path] = []
    monkeypatch.setattr(command, "run_rounds", lambda _tasks, _rounds, _limit, files, _tell: seen.extend(files) or [])
    assert dmoe_command("bench", "--model", "~/model").exit_code == 0
    assert seen == [tmp_path / "model" / "config.json"]
    assert dmoe_command("bench", "--model", tmp_path / "gone").exit_code == 3


def test_the_exit_code_tells_of_bars_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = [run("bandwidth", BANDWIDTH), run("engine/dmoe", ours()), run("mmap/dmoe", measured(2.0))]
    monkeypatch.setattr(command, "run_rounds", made_up(*broken))
    assert dmoe_command("bench").exit_code == 0
    assert dmoe_command("bench", "--check").exit_code == 1
    monkeypatch.setattr(command, "run_rounds", made_up(run("bandwidth", BANDWIDTH)))
    assert dmoe_command("bench", "--check").exit_code == 0
    monkeypatch.setattr(command, "run_rounds", made_up(run("mmap/dmoe", "killed")))
    assert dmoe_command("bench").exit_code == 0
    assert dmoe_command("bench", "--check").exit_code == 1


def test_a_preset_is_looked_for_and_how_to_make_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    result = dmoe_command("bench", "--preset", "llada2-mini", "--layers", "4")
    assert result.exit_code == 3
    told = complaint(result)
    assert "--preset llada2-mini --layers 4 --out checkpoints/llada2-mini-4-layers" in told
    folder = tmp_path / "checkpoints" / "llada2-mini"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert command.preset_directory("llada2-mini", None) == Path("checkpoints/llada2-mini")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--limit", "much"], "--limit is 'much'"),
        (["--limit", "90MB"], "--limit is 90.0 MB"),
        (["--budget", "0"], "--budget is '0'"),
        (["--only", "nobody"], "--only nobody: no contender of that name; there are bandwidth, engine/original"),
        (["--preset", "x", "--model", "y"], "--preset and --model both name the model"),
        (["--layers", "3"], "--layers has no effect without --preset"),
        (["--steps", "33"], "33"),
        (["--warm-up", "0"], "0 is not in the range x>=1"),
        (["--out", __file__], "is a file; wanted a folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments: list[str], told: str) -> None:
    result = dmoe_command("bench", *arguments)
    assert result.exit_code == 2
    assert told in complaint(result)
