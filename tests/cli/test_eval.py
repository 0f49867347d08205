"""`dmoe eval`: measures, goes on where it stopped, grades, compares, and says what is wrong in one line."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_engine.evaluate.runner import evaluate
from tests.cli.command_line import complaint, dmoe_command, process

QUICK = ["--gpu-mem", "4GB", "--max-context", "512", "--max-new-tokens", "96"]
SUMS = ["eval", "--task", "tiny-arithmetic", "--n", "4", *QUICK]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same four problems under two routings."""
    folders = {}
    for name, options in (("original", []), ("dmoe", ["--top-p", "0.5"])):
        folders[name] = tmp_path_factory.mktemp("runs") / name
        result = dmoe_command(*SUMS, "--routing", name, *options, "--out", folders[name])
        assert result.exit_code == 0, result.stderr
        assert result.stdout.startswith("task            tiny-arithmetic\n")
        assert "answers: 4 of 4, " in result.stderr
    return folders


def test_a_run_leaves_records_settings_and_a_summary(runs: dict[str, Path]):
    folder = runs["dmoe"]
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [record["id"] for record in records] == ["2-0", "2-1", "2-2", "2-3"]
    settings = json.loads((folder / "run.json").read_text())["settings"]
    assert settings["routing"]["name"] == "dmoe"
    assert settings["routing"]["top_p"] == 0.5
    assert settings["sampling"] | {"max_new_tokens": 2048} == {
        "max_new_tokens": 2048,
        "block_length": 32,
        "steps": 32,
        "threshold": 0.95,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": None,
        "stop": [],
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["strict"]["right"] == sum(record["strict"] for record in records)
    assert summary["complete"] is True


def test_a_finished_run_is_summed_up_again(runs: dict[str, Path]):
    before = (runs["original"] / "records.jsonl").read_bytes()
    result = dmoe_command(*SUMS, "--routing", "original", "--out", runs["original"], "--json")
    assert json.loads(result.stdout) == json.loads((runs["original"] / "summary.json").read_text())
    assert "going on after 4 of 4 answers" in result.stderr
    assert (runs["original"] / "records.jsonl").read_bytes() == before


def test_other_settings_are_refused(runs: dict[str, Path]):
    result = dmoe_command(*SUMS, "--routing", "dmoe", "--top-p", "0.8", "--out", runs["dmoe"])
    assert result.exit_code == 2
    assert "holds a run with routing.top_p 0.5, but now routing.top_p is 0.8" in complaint(result)


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = dmoe_command(*SUMS[:4], "2", *QUICK, "--seed", "9", "--json")
    assert result.exit_code == 0, result.stderr
    assert (json.loads(result.stdout)["n"], json.loads(result.stdout)["seed"]) == (2, 9)
    assert list(tmp_path.iterdir()) == []


def test_sampling_is_repeatable_unless_a_seed_is_given(tmp_path: Path):
    warm = [*SUMS[:4], "1", *QUICK, "--temperature", "0.7"]
    for options, seed in (([], 0), (["--sample-seed", "7"], 7)):
        folder = tmp_path / str(seed)
        assert dmoe_command(*warm, *options, "--out", folder).exit_code == 0
        assert json.loads((folder / "run.json").read_text())["settings"]["sampling"]["seed"] == seed


def test_two_runs_are_compared(runs: dict[str, Path]):
    result = dmoe_command("eval", "--compare", runs["original"], runs["dmoe"], "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["n"] == 4
    assert found["settings"]["routing.name"] == ["original", "dmoe"]
    assert 0.3 < found["unique_experts"]["reduction"] < 1
    shown = dmoe_command("eval", "--compare", runs["original"], runs["dmoe"])
    assert "McNemar p" in shown.stdout


def test_saved_answers_are_graded(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    path.write_text('{"generation": "\\\\boxed{4}", "gold": "#### 4"}\n{"generation": "4", "gold": "#### 4"}\n')
    result = dmoe_command("eval", "--grade-only", path)
    assert result.stdout.startswith("strict 50.00 % (1 of 2; 95 % interval ")
    found = json.loads(dmoe_command("eval", "--grade-only", path, "--task", "gsm8k", "--json").stdout)
    assert (found["strict"]["right"], found["soft"]["right"], found["n"]) == (1, 2, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ([], 2, "--task is missing; there are tiny-arithmetic, gsm8k, math500, arc-c, mmlu"),
        (["--task", "tiny-arithmetik"], 2, "did you mean 'tiny-arithmetic'?"),
        (["--task", "tiny-arithmetic", "--n", "0"], 2, "n is 0; wanted at least 1 sample"),
        (["--task", "tiny-arithmetic", "--n", "x"], 2, "'x' is not a valid integer"),
        (["--task", "gsm8k", "--data", "absent.jsonl"], 2, "absent.jsonl: can't be read (No such file or directory)"),
        (["--task", "tiny-arithmetic", "--model", "absent"], 3, "absent: no such model directory"),
        (["--task", "tiny-arithmetic", "--gpu-mem", "1KB"], 4, "1.00 KB"),
        (["--out", "x", "--grade-only", "y"], 2, "--out has no effect beside --grade-only; leave one of them out"),
        (["--grade-only", "x", "--n", "3"], 2, "--n has no effect beside --grade-only"),
        (["--grade-only", "x", "--data", "y"], 2, "--data has no effect beside --grade-only"),
        (["--grade-only", "x", "--compare", "a", "b"], 2, "--grade-only has no effect beside --compare"),
        (["--compare", "a", "b", "--task", "zzz"], 2, "--task has no effect beside --compare"),
        (["--compare", "a", "b", "--routing", "dmoe"], 2, "--routing has no effect beside --compare"),
        (["--compare", "a", "b", "--sample-seed", "1"], 2, "--sample-seed has no effect beside --compare"),
        (["--grade-only", "absent.jsonl"], 2, "absent.jsonl: can't be read"),
        (["--grade-only", "absent.jsonl", "--task", "gsm"], 2, "did you mean 'gsm8k'?"),
        (["--compare", "absent", "absent"], 2, "absent: holds no run.json"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, told: str):
    monkeypatch.chdir(tmp_path)
    result = dmoe_command("eval", *arguments)
    assert result.exit_code == code
    assert told in complaint(result)


def test_a_task_needs_a_tokenizer(mute: Path):
    result = dmoe_command(*SUMS, "--model", mute)
    assert result.exit_code == 2
    assert "has no tokenizer.json, and tasks are text" in complaint(result)


def test_ctrl_c_after_the_last_answer_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from offload_engine.cli import eval as evaluation

    def interrupted_at_the_end(*args: Any, **options: Any) -> Iterator[Any]:
        yield from evaluate(*args, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(evaluation, "evaluate", interrupted_at_the_end)
    result = dmoe_command(*SUMS, "--out", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["complete"] is True
    assert (tmp_path / "run" / "summary.json").exists()


def test_a_line_too_long_is_named_before_anything_is_asked(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    rows = [{"question": text, "answer": "#### 4"} for text in ("2 + 2?", "apples " * 900)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    result = dmoe_command("eval", "--task", "gsm8k", "--data", path, *QUICK, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert complaint(result).startswith(f"{path}:2: the prompt has ")
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == b""


@pytest.mark.parametrize("kept", [True, False])
def test_ctrl_c_keeps_what_is_there_and_says_how_to_go_on(tmp_path: Path, kept: bool):
    folder = tmp_path / "run"
    arguments: list[Any] = [*SUMS[:4], "200", *QUICK, *(["--out", folder] if kept else [])]
    running = process(*arguments)
    assert running.stderr is not None
    deadline = time.monotonic() + 60
    if kept:
        while not (folder / "records.jsonl").exists() or not (folder / "records.jsonl").stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    else:
        told = b""
        while b"plan: " not in told:
            told += running.stderr.read(1)
        time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert out == b""
    assert b"interrupted after " in err
    if not kept:
        assert b"without --out none of them is kept" in err
        return
    assert f"to go on: dmoe eval --task tiny-arithmetic --n 200 {' '.join(QUICK)} --out {folder}".encode() in err
    answered = len((folder / "records.jsonl").read_text().splitlines())
    assert 0 < answered < 200
    assert not (folder / "summary.json").exists()
