"""mlx-vlm as a contender: what its forwards come to, and, where it is installed, that it computes what we do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.bench import mlx_decoder
from offload_engine.bench.contender import carry_out
from offload_engine.bench.mlx_decoder import Block, Pass, PatienceError, Watch, bytes_in_memory, measured
from offload_engine.bench.spec import Kind, Measured, Task, Workload
from offload_engine.config import EngineConfig
from offload_engine.engine.assembly import find_source
from offload_engine.errors import MemoryBudgetError, OffloadError
from offload_engine.model.checkpoint import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint

WORKLOAD = Workload(prompt_tokens=12, block_length=8, steps=4, warm_up=1, blocks=2)
EXPERT_MATRICES = 2 * 16 * 3 * 32 * 16
MASK = 95


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("mlx") / "model", tiny_config())


def task(checkpoint: Path, kind: Kind = "mlx", **changes: Any) -> Task:
    config = {"model": str(checkpoint), "gpu_mem": "4GB", "max_context": 256, "routing": "original"}
    return Task(name=f"{kind}/x", kind=kind, config=config, workload=WORKLOAD).model_copy(update=changes)


def block(began: float, *masked: int, disk: int | None = 0) -> Block:
    """Forwards a second apart, with so many masks each, and a second for the last."""
    passes = [Pass(began + place, masks) for place, masks in enumerate(masked)]
    return Block(passes, began + len(masked), disk)


WARM_UP = block(0.0, 0, 4, 3, 2, 1, 0, disk=100)


def test_a_step_lasts_from_its_forward_to_the_next_and_the_commit_is_none() -> None:
    blocks = [WARM_UP, block(10.0, 8, 6, 4, 2, 0, disk=150), block(15.0, 8, 0, disk=170)]
    found = measured(task(Path("x")), blocks, [1, 2], startup=2.5)
    assert found.step_seconds == [1.0] * 5
    assert (found.tokens, found.disk_bytes, found.cut_short, found.startup_seconds) == (16, 70, False, 2.5)
    assert found.window_seconds == 17.0 - WARM_UP.ended
    assert found.answer == measured(task(Path("x")), blocks, [1, 2], startup=0).answer
    assert found.answer != measured(task(Path("x")), blocks, [1, 3], startup=0).answer
    assert (found.seconds, found.unique_experts, found.loads) == ({}, None, None)


def test_a_block_cut_short_counts_as_far_as_it_went() -> None:
    found = measured(task(Path("x")), [WARM_UP, block(10.0, 8, 6, 4, disk=None)], None, startup=0)
    assert (len(found.step_seconds), found.tokens, found.disk_bytes) == (2, 4, None)
    assert (found.cut_short, found.answer) == (True, "")


@pytest.mark.parametrize("blocks", [[WARM_UP], [WARM_UP, block(10.0, 8)]])
def test_without_a_single_step_nothing_was_measured(blocks: list[Block]) -> None:
    with pytest.raises(OffloadError, match="mlx/x: the warm-up took longer than the 900 s of --patience"):
        measured(task(Path("x")), blocks, None, startup=0)


def test_a_watch_hands_everything_on_and_stops_at_its_deadline() -> None:
    class Network:
        layers = (1, 2)

        def __call__(self, tokens: torch.Tensor, cache: str) -> str:
            return f"{len(tokens)} {cache}"

    watch = Watch(Network(), MASK, deadline=time.perf_counter() + 1000)
    assert watch.layers == (1, 2)
    assert watch(torch.tensor([MASK, 3, MASK]), cache="kept") == "3 kept"
    assert watch.end_block([1, 2])
    watch.deadline = 0.0
    with pytest.raises(PatienceError):
        watch(torch.tensor([MASK, 3]), cache="kept")
    assert [[one.masked for one in block.passes] for block in watch.blocks] == [[2], [1]]


def test_what_is_widened_takes_four_bytes_a_parameter(checkpoint: Path, tmp_path: Path) -> None:
    wide = Checkpoint.open(checkpoint)
    narrow = Checkpoint.open(write_checkpoint(tmp_path / "bf16", tiny_config(), dtype=torch.bfloat16))
    assert bytes_in_memory(wide, widened=True) == bytes_in_memory(wide, widened=False)
    stored = sum(tensor.nbytes for tensor in narrow.tensors.values())
    assert bytes_in_memory(narrow, widened=False) == stored
    assert bytes_in_memory(narrow, widened=True) == stored + 2 * EXPERT_MATRICES


def test_a_model_that_the_machine_cannot_hold_is_not_begun(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_source(EngineConfig(model=str(checkpoint)))
    mlx_decoder._require_room(source, widened=True)
    monkeypatch.setattr(mlx_decoder, "available_memory", lambda: 1000)
    with pytest.raises(MemoryBudgetError, match=r"every weight in memory, .* in float32; 1\.00 KB are available"):
        mlx_decoder._require_room(source, widened=True)


def measure(one: Task) -> Measured:
    found = carry_out(one, time.perf_counter()).measured
    assert found is not None
    return found


def test_mlx_answers_as_we_do_in_float32(checkpoint: Path) -> None:
    pytest.importorskip("mlx_vlm")
    found = measure(task(checkpoint, limited=False))
    assert found.answer == measure(task(checkpoint, "engine")).answer
    assert (len(found.step_seconds), found.tokens) == (2 * 4, 2 * 8)
    assert 0 < sum(found.step_seconds) < found.window_seconds
    assert found.startup_seconds > 0


def test_mlx_decodes_published_weights(tmp_path: Path) -> None:
    """bfloat16, which mlx's products with gathered experts refuse on a CPU unless they are widened."""
    pytest.importorskip("mlx_vlm")
    narrow = write_checkpoint(tmp_path / "bf16", tiny_config(), dtype=torch.bfloat16)
    assert measure(task(narrow)).tokens == 2 * 8


def test_patience_ends_mlx_in_the_middle(checkpoint: Path) -> None:
    pytest.importorskip("mlx_vlm")
    endless = task(checkpoint, patience=1.0, workload=Workload(prompt_tokens=12, block_length=8, steps=4, blocks=5000))
    found = measure(endless)
    assert found.cut_short
    assert found.tokens < 5000 * 8
