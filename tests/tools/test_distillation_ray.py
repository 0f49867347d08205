"""Two real Ray workers on this machine, one of which is killed at its work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from tools.distillation.on_ray import ATTEMPTS, Answerer
from tools.distillation.prompts import Prompt
from tools.distillation.shards import (
    WORK,
    begin_attempt,
    cut,
    forget_fruitless_attempts,
    fruitless_attempts,
    generate_shard,
    line_of,
)
from tools.self_distil import main as self_distil

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ray_home() -> Iterator[dict[str, str]]:
    """Ray's environment: its files in a folder of its own, whose path is short enough for a socket's."""
    pytest.importorskip("ray.data", reason="needs the extra `scale`")
    folder = tempfile.mkdtemp(prefix="ray")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONPATH"}
    try:
        yield {**kept, "RAY_TMPDIR": folder}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def worker_at_work(job: psutil.Process, journals: Path) -> psutil.Process | None:
    """A Ray worker that has answered some prompts of a shard."""
    for one in job.children(recursive=True):
        with suppress(psutil.Error):
            for file in one.open_files() if "MapWorker" in one.name() + " ".join(one.cmdline()) else ():
                path = Path(file.path)
                if path.parent == journals and path.suffix == ".part" and path.read_bytes().count(b"\n") >= 2:
                    return one
    return None


@pytest.mark.slow
def test_a_killed_workers_shard_is_done_again(tmp_path: Path, ray_home: dict[str, str]) -> None:
    command = [sys.executable, "-m", "tools.arithmetic_problems", "--n", "32", "--seed", "5"]
    (tmp_path / "p.jsonl").write_bytes(subprocess.check_output(command, cwd=ROOT))
    options = ["--prompts", tmp_path / "p.jsonl", "--routing", "original", "--gpu-mem", "2GB", "--shard-size", 8]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = CliRunner().invoke(self_distil, [*map(str, options), "--out", str(whole)])
    assert result.exit_code == 0, result.output

    command = [sys.executable, "-m", "tools.self_distil", *map(str, options), "--out", str(killed)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--ray", "--workers", "2"], cwd=ROOT, env=ray_home, stderr=file)
    started: set[psutil.Process] = set()
    try:
        job, victim, deadline = psutil.Process(process.pid), None, time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(psutil.NoSuchProcess):
                started |= set(job.children(recursive=True))
                if victim is None and (victim := worker_at_work(job, killed / WORK)) is not None:
                    victim.kill()
            time.sleep(0.05)
        assert process.wait(1) == 0, log.read_text()
        assert victim is not None
        _, alive = psutil.wait_procs(started, timeout=20)
        assert not alive
    finally:
        process.kill()
        process.wait()
        for one in started:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert (killed / path.name).read_bytes() == path.read_bytes()


def test_a_cluster_that_is_not_there_is_refused_at_once(tmp_path: Path, ray_home: dict[str, str]) -> None:
    (tmp_path / "p.txt").write_text("What is 1 + 2?\n")
    command = [sys.executable, "-m", "tools.self_distil", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "out"]
    done = subprocess.run(
        [*map(str, command), "--ray", "127.0.0.1:9"], cwd=ROOT, env=ray_home, capture_output=True, timeout=60, text=True
    )
    assert done.returncode == 2
    assert "error: --ray 127.0.0.1:9: no cluster there" in done.stderr
    assert "Traceback" not in done.stderr


DYING = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from offload_engine.errors import OffloadError
from tools.distillation.on_ray import answer_on_ray
from tools.distillation.prompts import Prompt
from tools.distillation.shards import cut

class Dying:
    config = SimpleNamespace(threads=1, gpu_mem=2**30)
    def open(self):
        os._exit(9)

try:
    list(answer_on_ray(Path(sys.argv[1]), Dying(), cut([Prompt(i, "", "") for i in range(1)], 1), 1, "local"))
except OffloadError as error:
    print(error)
"""


@pytest.mark.slow
def test_workers_that_always_die_end_the_job(tmp_path: Path, ray_home: dict[str, str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "dying.py").write_text(DYING)
    done = subprocess.run(
        [sys.executable, tmp_path / "dying.py", tmp_path / "out"],
        cwd=ROOT,
        env={**ray_home, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=500,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"shard-0000\d got no further with 3 workers in turn: a worker was killed, perhaps", done.stdout)


def test_attempts_are_counted_from_the_last_answer(tmp_path: Path) -> None:
    [shard] = cut([Prompt(0, "", ""), Prompt(1, "", "")], 2)
    assert fruitless_attempts(tmp_path, shard) == 0
    journals = [begin_attempt(tmp_path, shard) for _ in range(3)]
    assert fruitless_attempts(tmp_path, shard) == 3
    journals[1].write_bytes(line_of({"dropped": "length", "id": 0}))
    for number, journal in enumerate(journals):
        os.utime(journal, (number, number))
    assert fruitless_attempts(tmp_path, shard) == 1  # the third, which came after the second's answer
    forget_fruitless_attempts(tmp_path, shard)
    assert fruitless_attempts(tmp_path, shard) == 0
    receipt = generate_shard(tmp_path, shard, lambda one: {"id": one.id}, begin_attempt(tmp_path, shard))
    assert (receipt.kept, receipt.dropped) == (1, {"length": 1})
    assert [path.name for path in (tmp_path / WORK).iterdir()] == ["shard-00000.json"]


def test_a_worker_gives_a_shard_up_that_cost_others_their_lives(tmp_path: Path) -> None:
    [shard] = cut([Prompt(0, "", "")], 1)
    row = {"index": 0, "prompts": [asdict(prompt) for prompt in shard.prompts]}

    class Teacher:
        def open(self) -> Any:
            raise MemoryError

    answerer = Answerer(str(tmp_path), Teacher())  # type: ignore[arg-type]
    for _ in range(ATTEMPTS):
        with pytest.raises(MemoryError):  # as good as dead
            answerer._outcome(row)
    outcome = answerer._outcome(row)
    assert outcome["error"] == "OffloadError"
    assert "fewer --workers or a smaller --gpu-mem" in outcome["message"]
