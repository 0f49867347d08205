"""When there are grouped kernels, and in what blocks they compute; `tests/triton_kernels` says what."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload_engine.errors import UsageError
from offload_engine.kernels import grouped

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
NO_TRITON = importlib.util.find_spec("triton") is None


@pytest.fixture(autouse=True)
def decided_afresh() -> Iterator[None]:
    grouped.why_not.cache_clear()
    yield
    grouped.why_not.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(NO_TRITON, reason="Triton is not installed")
def test_the_kernels_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_kernels"]
    environment = {**os.environ, grouped.INTERPRETED: "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "[100%]" in done.stdout


@pytest.mark.parametrize(
    ("rows", "experts", "size"), [(0, 4, 16), (64, 4, 16), (65, 4, 32), (128, 4, 32), (129, 4, 64), (10**6, 4, 64)]
)
def test_the_size_of_tiles(rows: int, experts: int, size: int) -> None:
    assert grouped.rows_per_tile(rows, experts) == size


@pytest.mark.parametrize(("group", "depth"), [(0, 64), (1, 64), (128, 64), (64, 32), (32, 16), (256, 64), (8, 64)])
def test_blocks_of_int4_are_of_one_group_where_they_can_be(group: int, depth: int) -> None:
    assert grouped.block_depth(group) == depth


def test_without_a_gpu_or_triton_or_when_off_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(grouped.CHOICE, "off")
    assert grouped.why_not(CPU) == "OFFLOAD_ENGINE_TRITON is off"
    grouped.why_not.cache_clear()
    monkeypatch.setenv(grouped.CHOICE, "auto")
    monkeypatch.delenv(grouped.INTERPRETED, raising=False)
    monkeypatch.setattr(grouped, "_installed", lambda: True)
    assert grouped.why_not(CPU) == "Triton needs a GPU (or TRITON_INTERPRET=1, to test it)"
    grouped.why_not.cache_clear()
    monkeypatch.setattr(grouped, "_installed", lambda: False)
    assert grouped.why_not(CPU) == "Triton is not installed"


def test_a_bad_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(grouped.CHOICE, "on")
    with pytest.raises(UsageError, match="OFFLOAD_ENGINE_TRITON='on' is none of auto, off"):
        grouped.why_not(CPU)


def test_a_card_that_is_too_old_is_told_by_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert grouped.why_not(torch.device("cuda:0")) == "compute capability 7.5, and Triton wants 8.0"


def test_a_triton_that_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_device: torch.device) -> None:
        raise RuntimeError("no C compiler found\nand more lines")

    monkeypatch.setattr(grouped, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    monkeypatch.setattr(grouped, "_try_out", failing)
    assert grouped.why_not(torch.device("cuda:0")) == "Triton fails here: RuntimeError: no C compiler found"
