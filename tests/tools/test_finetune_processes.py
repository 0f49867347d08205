"""Training on more than one process: two of them, sharded by FSDP2 over gloo, learn what one does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import tiny_config, write_checkpoint

ROOT = Path(__file__).parents[2]
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
TOLERANCE = 2e-4
"""Relative, of losses; sums over processes are rounded in another order, and AdamW divides by small numbers."""


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, its experts not divisible by two processes' shares of every matrix, and a dataset."""
    folder, rng = tmp_path_factory.mktemp("given"), random.Random(0)
    write_checkpoint(folder / "base", tiny_config(num_experts=20), dtype=torch.bfloat16)
    (folder / "data").mkdir()
    (folder / "data" / "manifest.json").write_text('{"complete": true}')
    with (folder / "data" / "shard-00000.jsonl").open("w") as file:
        for _ in range(16):
            prompt = [rng.randrange(94) for _ in range(rng.randrange(1, 20))]
            answer = [(3 * token + 1) % 94 for token in prompt] + [94]
            file.write(json.dumps({"prompt_ids": prompt, "answer_ids": answer}) + "\n")
    return folder


def train(
    given: Path, out: Path, processes: int, *flags: str, program: Sequence[str] = ("-m", "tools.finetune")
) -> subprocess.CompletedProcess[str]:
    launcher = [*LAUNCHER, f"--nproc-per-node={processes}"]
    shape = "--length 32 --block-length 8 --batch 4 --steps 5 --lr 1e-3 --final-lr 1e-4 --min-experts 6 --threads 1"
    shape += " --teacher-share 0.3"
    command = [sys.executable, *(launcher if processes > 1 else []), *program, *shape.split()]
    paths = ["--model", str(given / "base"), "--data", str(given / "data"), "--out", str(out), "--dtype", "float32"]
    return subprocess.run(
        [*command, *paths, *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


CUT_OFF = """
import os
from tools.finetune import main
from tools.finetuning.run import Run
step = Run._step
def cut_off(run):
    if run.tuner.steps == 3:
        os._exit(9)
    return step(run)
Run._step = cut_off
main()
"""
"""Dies after three steps."""


@pytest.mark.slow
def test_two_processes_learn_what_one_does_though_cut_off_and_resumed(given: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(given, one, 1).returncode == 0
    (tmp_path / "cut_off.py").write_text(CUT_OFF)
    flags = ("--micro-batch", "1")
    assert train(given, two, 2, *flags, "--save-minutes", "0", program=[str(tmp_path / "cut_off.py")]).returncode != 0
    assert [path.name for path in (two / "checkpoints").iterdir()] == ["step-00000003"]
    both = train(given, two, 2, *flags, "--resume")
    assert both.returncode == 0, both.stderr
    assert "steps 3 to 5" in both.stderr
    assert losses(two) == pytest.approx(losses(one), rel=TOLERANCE)
    files = sorted(path.name for path in (two / "checkpoints" / "step-00000005").iterdir())
    assert files == ["rank-0.pt", "rank-1.pt"]
    shards = [torch.load(two / "checkpoints" / "step-00000005" / file) for file in files]
    experts = [shard["state"]["weights"]["experts.gate_up.1"] for shard in shards]
    assert [len(part) for part in experts] == [10, 10]  # each process holds half of the experts
    mine, theirs = (load_file(out / "model" / "model.safetensors") for out in (two, one))
    start = load_file(given / "base" / "model.safetensors")
    assert mine.keys() == theirs.keys()
    moved = sum((theirs[name].float() - start[name].float()).norm() for name in start)
    apart = sum((theirs[name].float() - mine[name].float()).norm() for name in mine)
    assert apart < 0.02 * moved  # bfloat16 rounds some weights that lie between two values the other way
    alone = train(given, two, 1, *flags, "--resume")
    assert alone.returncode == 2
    assert "this run has processes 2, not 1" in alone.stderr
