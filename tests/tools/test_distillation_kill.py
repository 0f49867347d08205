"""Real processes, killed in the middle of a dataset: the finished one is as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tools.distillation.shards import WORK

ROOT = Path(__file__).resolve().parents[2]
SLOW_ANSWERS = """
import sys, time
from pathlib import Path
from tools.distillation.job import make_dataset
from tools.distillation.prompts import Prompt
from tools.distillation.shards import cut, generate_shard

def answer(prompt):
    time.sleep(0.004)
    with open(sys.argv[2], "a") as asked:
        asked.write(f"{prompt.id}\\n")
    if prompt.id % 5 == 2:
        return {"dropped": "length", "id": prompt.id}
    return {"id": prompt.id, "answer": "word " * 50}

out = Path(sys.argv[1])
shards = cut([Prompt(i, "", "") for i in range(200)], 30)
make_dataset(out, {"seed": 0}, shards, lambda todo: (generate_shard(out, one, answer) for one in todo))
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def answered(directory: Path) -> int:
    """Prompts done with in shards begun, as the journals have them."""
    return sum(path.read_bytes().count(b"\n") for path in (directory / WORK).glob("*.part"))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process of Python, dead in the end."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(true: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.005)


def test_a_run_killed_again_and_again_makes_the_same_dataset(tmp_path: Path) -> None:
    program, whole, killed = tmp_path / "program.py", tmp_path / "whole", tmp_path / "killed"
    program.write_text(SLOW_ANSWERS)
    with started(program, whole, tmp_path / "asked-once") as process:
        assert process.wait(60) == 0
    dice, kills = random.Random(3), 0
    asked = tmp_path / "asked"
    asked.touch()
    for _ in range(5):
        before = asked.stat().st_size
        with started(program, killed, asked) as process:
            wait_until(lambda before=before: asked.stat().st_size > before)  # type: ignore[misc]
            time.sleep(dice.uniform(0, 0.15))
            kills += process.poll() is None
            process.kill()
    assert kills == 5
    assert json.loads((killed / "manifest.json").read_text())["complete"] is False
    with started(program, killed, asked) as process:
        assert process.wait(60) == 0
    assert files_of(killed) == files_of(whole)
    assert json.loads((killed / "manifest.json").read_text())["counts"] == {
        "prompts": 200,
        "kept": 160,
        "dropped": {"length": 40},
    }
    assert len(asked.read_text().split()) <= 200 + kills  # a kill costs the answer under way and no other


@pytest.mark.slow
def test_workers_die_with_their_parent_and_the_run_is_gone_on_with(tmp_path: Path) -> None:
    command = ["-m", "tools.arithmetic_problems", "--n", "60", "--seed", "5"]
    (tmp_path / "p.jsonl").write_bytes(subprocess.check_output([sys.executable, *command], cwd=ROOT))
    options = ["--prompts", tmp_path / "p.jsonl", "--routing", "original", "--gpu-mem", "1GB", "--shard-size", 20]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with started("-m", "tools.self_distil", *options, "--out", whole) as process:
        assert process.wait(240) == 0
    with started("-m", "tools.self_distil", *options, "--out", killed, "--workers", 2) as process:
        wait_until(lambda: answered(killed) >= 6, 120)
        workers = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert len(gone) >= 2
    assert not alive
    left = answered(killed)
    with started("-m", "tools.self_distil", *options, "--out", killed, "--workers", 2) as process:
        wait_until(lambda: answered(killed) > left, 120)
        worker = next(one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline()))
        worker.kill()
        assert process.wait(60) == 1
        assert process.stderr is not None
        said = process.stderr.read().decode()
    assert "error: a worker was killed, perhaps for want of memory; run the same command again to go on" in said
    with started("-m", "tools.self_distil", *options, "--out", killed, "--workers", 2) as process:
        assert process.wait(240) == 0
    assert files_of(killed) == files_of(whole)
