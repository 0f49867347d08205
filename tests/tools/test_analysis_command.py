"""`python -m tools.analyse` as it is called: what it refuses, what it keeps, and one whole quick run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from offload_engine.engine.engine import Engine
from tests.tools.analysis_engine import CONFIG, open_tiny
from tests.tools.test_analysis_report import check_self_contained
from tools import analyse
from tools.analysis import evaluations, measurements, runs, seam
from tools.analysis.sections import SECTIONS
from tools.analysis.study import Study


def call(*arguments: object) -> Result:
    return CliRunner().invoke(analyse.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--only", "table2,tabel3"], "--only names 'tabel3', which is no section; there are table2, fig5a,"),
        (["--task", "gsm9k"], "task 'gsm9k' doesn't exist"),
        (["--data", "gsm8k"], "--data is 'gsm8k'; wanted TASK=FILE"),
        (["--data", "gsm8k=x.jsonl"], "data is given for task 'gsm8k', which isn't among tiny-arithmetic"),
        (["--expert-share", "1.5"], "expert-share is 1.5"),
        (["--gpu-mem", "lots"], "'lots': wanted a size"),
        (["--n", "0"], "0 is not in the range"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, arguments: list[str], complaint: str) -> None:
    result = call("--out", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert complaint in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_exit_code_3(tmp_path: Path) -> None:
    result = call("--out", tmp_path, "--model", tmp_path / "none", "--only", "table3", "--n", "2")
    assert result.exit_code == 3
    assert str(tmp_path / "none") in result.output


def test_report_only_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "from_pretrained", lambda **_: pytest.fail("an engine was opened"))
    result = call("--out", tmp_path, "--report-only", "--n", "3", "--markdown", tmp_path / "copy.md")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == str(tmp_path / "report.html")
    assert "table2: 1 not run, the evaluation original on tiny-arithmetic" in result.output
    assert (tmp_path / "copy.md").exists()


def test_a_measurement_is_kept_until_its_settings_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def measure(study: Study) -> dict[str, Any]:
        made.append(study.out.name)
        return {"value": len(made)}

    monkeypatch.setitem(measurements.MEASUREMENTS, "speed", measure)
    study = Study(model=None, base=None, out=tmp_path, n=2)
    assert measurements.load(study, "speed") is None
    assert measurements.ensure(study, "speed")["result"] == {"value": 1}
    assert measurements.ensure(study, "speed")["result"] == {"value": 1}
    changed = Study(model=None, base=None, out=tmp_path, n=2, max_new_tokens=64)
    assert measurements.load(changed, "speed") is None
    assert measurements.ensure(changed, "speed")["result"] == {"value": 2}
    measurements.path_of(changed, "speed").write_text("{torn")
    assert measurements.ensure(changed, "speed")["result"] == {"value": 3}


def test_a_command_makes_the_same_study_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Study] = []
    monkeypatch.setattr(analyse.report, "build", lambda study: seen.append(study) or exit(0))
    options = ["--task", "tiny-arithmetic", "--n", "7", "--gpu-mem", "2GB", "--threads", "1", "--expert-share", "0.2"]
    call("--out", tmp_path, "--report-only", *options, "--quick", "--max-new-tokens", "99")
    (study,) = seen
    words = study.command("fig6").split()
    assert words[:3] == ["python", "-m", "tools.analyse"]
    assert words[-2:] == ["--only", "fig6"]
    call(*words[3:-2], "--report-only")
    assert seen[1] == study


def test_without_matplotlib_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    result = call("--out", tmp_path / "out", "--quick")
    assert result.exit_code == 2
    assert "figures need matplotlib" in result.output
    assert not (tmp_path / "out").exists()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_tiny(tmp_path) as opened:
        yield opened


def test_parameters_are_all_weights_of_the_checkpoint(engine: Engine) -> None:
    from tests.checkpoints import random_tensors

    tensors = random_tensors(CONFIG, dtype=engine.dtype, layout="split", seed=0)
    everything = sum(tensor.numel() for name, tensor in tensors.items() if not name.endswith("expert_bias"))
    assert seam.parameters(engine) == everything


@pytest.mark.slow
def test_a_quick_run_of_everything_and_once_more(tmp_path: Path) -> None:
    arguments = ("--out", tmp_path, "--quick", "--n", "4", "--gpu-mem", "4GB")
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    page = check_self_contained((tmp_path / "report.html").read_text())
    assert "Not run yet" not in page.text
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert set(numbers["sections"]) == {section.name for section in SECTIONS}
    assert all(section["tables"] or name == "fig6" for name, section in numbers["sections"].items())
    _check_table_2(tmp_path, numbers["sections"]["table2"]["numbers"]["tiny-arithmetic"])
    for bar in numbers["sections"]["fig2ab"]["numbers"]["bars"]:
        assert 0 < bar["moe"] < bar["total"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "eval").rglob("records.jsonl")}
    again = call(*arguments)
    assert again.exit_code == 0
    assert "evaluating" not in again.output
    assert "measuring" not in again.output
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "eval").rglob("records.jsonl")}
    _check_other_settings(tmp_path)


def _check_table_2(out: Path, rows: list[dict[str, Any]]) -> None:
    """The table's numbers, counted again from the records on disk."""
    assert len(rows) == 13
    for row in rows:
        lines = (out / "eval" / f"tiny-arithmetic--{row['run']}" / "records.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) == 4
        by_answer = [sum(one["unique_by_forward"]) / one["steps"] for one in records]
        assert row["unique_experts"] == pytest.approx(sum(by_answer) / 4, abs=1e-3)
        assert row["strict"]["right"] == sum(one["strict"] for one in records)


def _check_other_settings(out: Path) -> None:
    """An evaluation made with other settings is not taken for one of these."""
    same = Study(model=None, base=None, out=out, n=4, engine={"gpu_mem": 4 * 10**9}, quick=True)
    assert evaluations.load(same, "tiny-arithmetic", runs.original()) is not None
    less = Study(**{**vars_of(same), "engine": {"gpu_mem": 3 * 10**9}})
    assert evaluations.load(less, "tiny-arithmetic", runs.original()) is not None
    for change in ({"max_new_tokens": 64}, {"n": 5}):
        other = Study(**{**vars_of(same), **change})
        assert evaluations.load(other, "tiny-arithmetic", runs.original()) is None
        result = call("--out", out, "--quick", "--only", "fig3b", *_words(other))
        assert result.exit_code == 2
        assert "holds a run with" in result.output


def vars_of(study: Study) -> dict[str, Any]:
    return {name: getattr(study, name) for name in ("model", "base", "out", "n", "engine", "quick")}


def _words(study: Study) -> list[object]:
    longest = ["--max-new-tokens", study.max_new_tokens] if study.max_new_tokens else []
    return ["--n", study.n, "--gpu-mem", study.engine["gpu_mem"], *longest]
