"""Options of `tools.finetune` that can't be: one line at once, not a traceback, and not after hours of training."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import tools.finetune
from tests.checkpoints import tiny_config, write_checkpoint
from tools.finetune import main
from tools.finetuning import run as run_module
from tools.finetuning.dataset import Shape, load_dataset
from tools.finetuning.parallel import ALONE, Processes
from tools.finetuning.run import MODEL, Run, build_run
from tools.finetuning.settings import Settings
from tools.finetuning.weights import Published, companions, export
from tools.training import checkpoint

ROOT = Path(__file__).parents[2]
SAMPLES = [{"prompt_ids": [1, 2, number], "answer_ids": [3, number, 94]} for number in range(8)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base"), tiny_config(), dtype=torch.bfloat16)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"complete": true}')
    (folder / "shard-00000.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
    return folder


def settings_of(base: Path, data: Path, **changes: Any) -> dict[str, Any]:
    given = {"length": 16, "block_length": 8, "batch": 2, "lr": 1e-3, "final_lr": 1e-3, "steps": 2, "min_experts": 6}
    return {"model": str(base), "data": data, "out": data.parent / "out", **given, **changes}


def invoke(base: Path, data: Path, *flags: str, **changes: Any) -> Result:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings_of(base, data, **changes).items()]
    return CliRunner().invoke(main, [*options, *flags])


def said(result: Result) -> str:
    """The one line of complaint."""
    (line,) = [line for line in result.output.strip().splitlines() if line.startswith("error: ")]
    assert "internal error" not in line
    assert "Traceback" not in result.output
    return line


def documented() -> list[str]:
    texts = [(ROOT / "docs" / "distillation.md").read_text(), tools.finetune.__doc__ or ""]
    return [line for text in texts for line in re.findall(r"torchrun .*-m tools\.finetune .*", text)]


def test_documented_lines_for_several_processes_are_ones_that_run() -> None:
    lines = documented()
    assert len(lines) == 2
    for line in lines:
        launcher, _, arguments = line.partition(" -m tools.finetune ")
        count = int(launcher.rpartition(" ")[2])
        assert count > 1
        given = main.make_context("finetune", shlex.split(arguments)).params
        settings = Settings(**{name: value for name, value in given.items() if name in Settings.__dataclass_fields__})
        settings.check(Processes(count=count))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"shard_size": "lots"}, "--shard-size is 'lots', wanted a size such as"),
        ({"shard_size": "0"}, "--shard-size is '0', wanted at least one byte"),
        ({"lr": "nan"}, "--lr is nan, wanted a finite number"),
        ({"epochs": "inf"}, "--epochs is inf, wanted a finite number"),
        ({"device": "gpu0"}, "--device is 'gpu0', wanted cpu, cuda or cuda:N"),
        ({"device": "cuda:99"}, "--device is cuda:99, but torch finds"),
        ({"length": 2048}, "--length is 2048, but"),
        ({"teacher": "elsewhere"}, "--teacher is elsewhere, but --teacher-share is 0"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_trained(
    base: Path, data: Path, changes: dict[str, Any], complaint: str
) -> None:
    result = invoke(base, data, **changes)
    assert result.exit_code in (2, 4)
    assert complaint in said(result)
    assert not (data.parent / "out").exists()


def test_debug_shows_the_traceback(base: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(tools.finetune, "build_run", broken)
    assert "Traceback" not in invoke(base, data).output
    assert "Traceback" in invoke(base, data, "--debug").output


def test_an_out_that_is_a_file_is_named(base: Path, data: Path) -> None:
    (data.parent / "out").touch()
    assert f"{data.parent / 'out'}: can't be made" in said(invoke(base, data))


# --- a disk that is full -------------------------------------------------------------------------------------------


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_full_during_the_export_is_named_and_the_export_made_up_for(
    base: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "export", full)
    result = invoke(base, data)
    assert result.exit_code == 1
    assert f"{data.parent / 'out' / MODEL}: can't be written (No space left on device); free some space" in said(result)
    monkeypatch.undo()
    assert invoke(base, data, "--resume").exit_code == 0
    assert (data.parent / "out" / MODEL / "config.json").is_file()


def test_a_log_that_can_not_be_written_is_named(base: Path, data: Path) -> None:
    (data.parent / "out" / "log.jsonl").mkdir(parents=True)
    assert "log.jsonl: can't be written (Is a directory)" in said(invoke(base, data))


# --- a checkpoint made a model -------------------------------------------------------------------------------------


def test_after_a_loss_that_is_not_finite_another_run_starts_from_the_last_checkpoint(base: Path, data: Path) -> None:
    run = build_run(Settings(**settings_of(base, data)), ALONE, resume=False)
    run._step()
    run.save()
    path = data.parent / "out" / "checkpoints" / "step-00000001" / "rank-0.pt"
    good = checkpoint.load(path)
    broken = checkpoint.load(path)
    broken["state"]["weights"]["model.lm_head.weight"][:] = torch.inf
    checkpoint.save(path, broken)
    advice = said(invoke(base, data, "--resume"))
    assert "start again with a lower --lr and another --out, from the base, or from that checkpoint, which" in advice
    assert f"--export makes {data.parent / 'out' / MODEL}" in advice
    checkpoint.save(path, good)
    done = invoke(base, data, "--export")
    assert done.exit_code == 0, done.output
    assert "the weights after 1 of 2 steps" in done.output
    assert [one.name for one in (data.parent / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    other = {"lr": 1e-4, "final_lr": 1e-4, "out": data.parent / "again"}
    assert invoke(data.parent / "out" / MODEL, data, **other).exit_code == 0


def test_export_without_a_checkpoint_is_refused(base: Path, data: Path) -> None:
    assert "holds no checkpoint" in said(invoke(base, data, "--export"))


# --- what goes along -----------------------------------------------------------------------------------------------


def test_code_that_auto_map_names_goes_along_with_the_weights(
    base: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = build_run(Settings(**settings_of(base, data)), ALONE, resume=False)
    source = data.parent / "source"
    source.mkdir()
    named = {"AutoConfig": "configuration_x.XConfig", "AutoModel": "modeling_x.X", "AutoOther": "who/what--far.Away"}
    (source / "config.json").write_text(json.dumps({"auto_map": named}))
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["slow_x.Slow", None]}, "a": 1})
    )
    for name in ("configuration_x.py", "slow_x.py", "stranger.py"):
        (source / name).write_text(f"# {name}")
    assert companions(source) == (["tokenizer_config.json", "configuration_x.py", "slow_x.py"], ["modeling_x.py"])
    export(data.parent / "model", Published(run.tuner.network, run.config), {"a": 1}, source, 10**9, ALONE)
    assert (data.parent / "model" / "configuration_x.py").read_text() == "# configuration_x.py"
    assert {path.name for path in (data.parent / "model").glob("*.py")} == {"configuration_x.py", "slow_x.py"}
    assert "lacks modeling_x.py, which its auto_map names" in capsys.readouterr().err
    (source / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": "../outside.X"}}))
    assert companions(source)[1] == []


# --- whose answers -------------------------------------------------------------------------------------------------


def test_answers_of_another_model_are_told_of_and_trained_on(base: Path, data: Path) -> None:
    manifest = {"complete": True, "model": {"name": "another", "fingerprint": "0123456789abcdef"}}
    (data / "manifest.json").write_text(json.dumps(manifest))
    result = invoke(base, data)
    assert result.exit_code == 0
    assert "are those of another (fingerprint 0123456789abcdef), not of --model" in result.output
    found = load_dataset(data, Shape(16, 96, 94, 95))
    assert found.model["name"] == "another"


def test_answers_of_the_model_itself_are_nothing_to_tell(base: Path, data: Path) -> None:
    found = run_module.fingerprint(base)
    (data / "manifest.json").write_text(json.dumps({"complete": True, "model": {"fingerprint": found}}))
    assert "note:" not in invoke(base, data).output
