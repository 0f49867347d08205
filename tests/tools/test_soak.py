"""The soak: it passes on the engine as it is, and notices what it is there to notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.experts.storage.conversion import Kind
from tests.checkpoints import tiny_config, write_checkpoint
from tools.soak import FaultyReads, Report, checkpoint, experts_file, soak

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("soak"), tiny_config(), dtype=torch.bfloat16)


def run(small: Path, blocks: int, rate: float) -> Report:
    return soak(blocks, rate, 3, model=str(small), max_context=256, routing="dmoe", min_experts=6, threads=1)


@pytest.mark.slow
def test_a_hundred_blocks_of_the_built_in_model_in_two_slots() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tools.soak", "--blocks", "100", "--fault-rate", "0.003"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=300,
    )  # fmt: skip
    report = json.loads(ran.stdout)
    assert report["slots"] == 2
    assert report["exact"] > 10
    assert min(report["injected"].get(kind, 0) for kind in ("eio", "short", "slow")) > 0
    assert 0 < report["errors"]["TransferError"] <= report["injected"]["eio"], "a failed prefetch is no error"


def test_without_faults_every_answer_is_exact(small: Path) -> None:
    report = run(small, 12, 0.0)
    assert report.passed
    assert (report.exact > 0, report.wrong, report.errors, report.injected) == (True, 0, {}, {})


@pytest.mark.parametrize("kind", [None, "int8"])
def test_a_file_that_is_damaged_and_mended_ends_some_answers_and_spoils_none(small: Path, kind: Kind | None) -> None:
    with checkpoint(str(small), kind, copied=True) as soaked:
        assert soaked != str(small)
        file = experts_file(soaked)
        content = file.read_bytes()
        report = soak(80, 0.0, 3, 0.7, model=soaked, max_context=256, routing="dmoe", min_experts=6, threads=1)
        assert file.read_bytes() == content, "mended"
    assert report.passed
    assert report.exact > 0
    assert report.errors["TransferError"] > 0
    assert set(report.injected) == ({"cut"} if kind is None else {"cut", "damage"})
    assert not Path(soaked).exists()


def test_wrong_bytes_are_noticed(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupt(reads: FaultyReads, descriptor: int, buffers: Any, offset: int, flags: int = 0) -> int:
        count = reads._preadv(descriptor, buffers, offset, flags)
        if reads.on:
            buffers[0][:count] = bytes(count)
        return count

    monkeypatch.setattr(FaultyReads, "__call__", corrupt)
    report = run(small, 12, 0.0)
    assert report.wrong > 0
    assert not report.passed


@pytest.mark.parametrize("flaw", [{"wrong": 1}, {"rss_end": 10**8}, {"threads_left": ["expert-reader-0"]}])
def test_what_fails_a_soak(flaw: dict[str, Any]) -> None:
    assert Report().passed
    assert not Report(**flaw).passed
