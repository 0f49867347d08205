"""`dmoe convert`, also killed in the middle."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from offload_engine.cli.convert import Request, convert_model
from offload_engine.engine.engine import Engine
from offload_engine.errors import OffloadError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.experts.storage.packed_header import PACKED_FILE, read_packed_header
from tests.cli.command_line import SHORT, complaint, dmoe_command, dmoe_run, process


def converted(*arguments):
    done = dmoe_command("convert", *arguments)
    assert done.exit_code == 0, done.stderr
    return done


def test_what_came_of_it_is_printed_and_runs(speaking, tmp_path):
    wanted = dmoe_run("--model", speaking, *SHORT, "--seed", 1, "-p", "a").stdout
    done = converted("--model", speaking, "--out", tmp_path / "out")
    assert done.stdout.splitlines()[0] == f"converted      {tmp_path / 'out'}"
    assert "experts        float32 -> float32, " in done.stdout
    assert done.stdout.splitlines()[-1] == "error          none: every weight is what it was"
    assert "wrote " in done.stderr
    assert dmoe_run("--model", tmp_path / "out", *SHORT, "--seed", 1, "-p", "a").stdout == wanted
    header = read_packed_header(tmp_path / "out" / PACKED_FILE)
    assert header.description.source == fingerprint(speaking)


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_every_format_runs_and_tells_its_error(speaking, tmp_path, kind):
    done = converted("--model", speaking, "--out", tmp_path / "out", "--experts", kind, "--json")
    facts = json.loads(done.stdout)
    assert facts["experts"] == {"bf16": "bfloat16", "int8": "int8", "int4": "int4 (groups of 16)"}[kind]
    assert not facts["lossless"]
    assert all(0 < error["relative_rms"] <= error["worst_relative_rms"] < 0.2 for error in facts["errors"].values())
    assert ("note: groups of 16, as 32 is no" in done.stderr) == (kind == "int4")
    assert dmoe_run("--model", tmp_path / "out", *SHORT, "-p", "a").exit_code == 0
    planned = dmoe_command("plan", "--model", tmp_path / "out", "--gpu-mem", "2GB", "--device", "cpu", "--json")
    assert json.loads(planned.stdout)["stored_dtype"] == facts["experts"]
    assert json.loads(planned.stdout)["plan"]["slab_bytes"] == facts["slab_bytes"]


def test_the_table_names_the_worst(speaking, tmp_path):
    done = converted("--model", speaking, "--out", tmp_path / "out", "--experts", "int4", "--group-size", 8)
    assert "int4 (groups of 8)" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("error of ")]
    assert [line.split()[2] for line in lines] == ["gate", "up", "down"]
    assert all(" % of the weights' RMS, " in line and "; worst " in line and " of layer " in line for line in lines)


def test_both_models_are_asked_the_same(tmp_path, capsys):
    convert_model(Request(model=None, out=tmp_path / "out", experts="int8", group_size=None, evaluate=3, as_json=True))
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["n"] == 3
    assert comparison["settings"]["model"] == ["built-in", str(tmp_path / "out")]
    assert comparison["strict"]["accuracy_a"] > 0


def test_the_table_is_out_before_the_models_are_asked(tmp_path, monkeypatch):
    def failing(_cls, *, config, progress):
        assert config.hot_set == "off"  # one of the two would start warmer
        raise OffloadError("no memory for that")

    monkeypatch.setattr(Engine, "from_pretrained", classmethod(failing))
    done = dmoe_command("convert", "--out", tmp_path / "out", "--evaluate", 3)
    assert done.exit_code == 1
    assert "error: no memory for that" in done.stderr
    assert done.stdout.startswith(f"converted      {tmp_path / 'out'}")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--group-size", 8], 2, "--group-size has no effect on stored experts"),
        (["--experts", "int4", "--group-size", 1], 2, "--group-size is 1, wanted at least 2"),
        (["--evaluate", 0], 2, "n is 0; wanted at least 1"),
        (["--experts", "int3"], 2, "'int3' is not one of 'stored', 'bf16', 'int8', 'int4'"),
    ],
)
def test_refusals(speaking, tmp_path, arguments, code, message):
    done = dmoe_command("convert", "--model", speaking, "--out", tmp_path / "out", *arguments)
    assert message in complaint(done)
    assert done.exit_code == code
    assert list(tmp_path.iterdir()) == []


def test_refusals_of_the_directories(speaking, mute, tmp_path):
    done = dmoe_command("convert", "--model", speaking)
    assert "Missing option '--out'" in complaint(done)
    assert done.exit_code == 2
    done = dmoe_command("convert", "--model", speaking, "--out", tmp_path)
    assert f"--out {tmp_path}: exists already" in complaint(done)
    assert done.exit_code == 2
    done = dmoe_command("convert", "--model", mute, "--out", tmp_path / "out", "--evaluate", 5)
    assert "has no tokenizer.json" in complaint(done)
    assert done.exit_code == 2
    done = dmoe_command("convert", "--model", tmp_path / "missing", "--out", tmp_path / "out")
    assert done.exit_code == 3
    assert list(tmp_path.iterdir()) == []


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else -1


@pytest.mark.slow
def test_a_conversion_killed_anywhere_leaves_nothing_that_loads(tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    whole = 6_320_128  # of experts.packed
    for begun in (0, whole // 3, whole - 10_000):
        with process("convert", "--out", out, "--experts", "int4") as child:
            deadline = time.monotonic() + 60
            while size(partial / PACKED_FILE) < begun:
                assert child.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.001)
            child.kill()
            assert child.wait(30) == -signal.SIGKILL
        assert not out.exists()
        assert partial.exists()
        for directory in (out, partial):
            refused = dmoe_command("plan", "--model", directory, "--gpu-mem", "2GB", "--device", "cpu")
            assert refused.exit_code == 3
            complaint(refused)
    converted("--out", out, "--experts", "int4")
    assert size(out / PACKED_FILE) == whole
    assert not partial.exists()


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    with process("convert", "--out", out, "--experts", "int4") as child:
        while size(partial / PACKED_FILE) < 1_000_000:
            assert child.poll() is None
            time.sleep(0.001)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert child.returncode == 130
    assert b"interrupted" in errors
    assert b"Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
