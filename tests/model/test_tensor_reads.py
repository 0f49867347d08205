"""Tensors read piece by piece, several at a time."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload_engine import disk_file
from offload_engine.errors import CheckpointError, MemoryBudgetError
from offload_engine.model import tensor_reads
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.weights import load_resident
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint, write_tensors
from tests.page_cache import cached_bytes, evictable

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@pytest.fixture(params=["direct", "buffered"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a file system that knows direct I/O (where this one does), and through one that doesn't."""
    if request.param == "buffered":
        monkeypatch.setattr(disk_file, "_open_direct", lambda _path: None)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tensor-reader")]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("nbytes", [4, 1000, 4096, 2**20])
def test_every_number_comes_whatever_the_size_of_the_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int
) -> None:
    monkeypatch.setattr(tensor_reads, "PIECE_BYTES", nbytes)
    tensors = {
        "a": torch.arange(5001, dtype=torch.int32),
        "scalar": torch.tensor(7.0),
        "none": torch.empty(0, 3),
        "b": torch.randn(37, 53).bfloat16(),
    }
    write_tensors(tmp_path, tensors)
    checkpoint = Checkpoint.open(tmp_path)
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
    targets = {name: torch.full_like(tensor, 5, dtype=torch.float64) for name, tensor in tensors.items()}
    checkpoint.read_into(targets)
    assert all(torch.equal(target, tensors[name].double()) for name, target in targets.items())


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
@pytest.mark.parametrize("before", range(9))
def test_a_tensor_may_begin_at_any_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: torch.dtype, before: int
) -> None:
    monkeypatch.setattr(tensor_reads, "PIECE_BYTES", 64)
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(before)).to(stored)
    ends = (before, before + tensor.nbytes)
    header = json.dumps(
        {
            "shift": {"dtype": "U8", "shape": [before], "data_offsets": [0, before]},
            "a": {"dtype": DTYPES[stored], "shape": [100], "data_offsets": ends},
        }
    ).encode()
    data = bytes(before) + tensor.view(torch.uint8).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert torch.equal(Checkpoint.open(tmp_path).read("a", wanted), tensor.to(wanted))


def test_some_pieces_are_taken_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tiny_config()
    config = ModelConfig.from_dict(raw)
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, raw, dtype=torch.float16))
    buffers: list[int] = []
    make = tensor_reads._buffer

    def watched(nbytes: int) -> Tensor:
        buffers.append(nbytes)
        return make(nbytes)

    monkeypatch.setattr(tensor_reads, "_buffer", watched)
    monkeypatch.setattr(tensor_reads, "PIECE_BYTES", 100)
    model = load_resident(config, checkpoint, torch.float32)
    assert len(buffers) == tensor_reads.READS
    assert max(buffers) <= 2 * disk_file.UNIT, "a piece, and the rest of the units it lies in"
    stored = random_tensors(raw, dtype=torch.float16, layout="split", seed=0)
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in model.state_dict().items())


def test_several_reads_are_under_way_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path, {"a": torch.arange(20_000, dtype=torch.float32)})
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(tensor_reads, "PIECE_BYTES", 20_000)
    together, real = threading.Barrier(tensor_reads.READS), os.preadv

    def meets(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if threading.current_thread() in readers() and offset < 60_000 - disk_file.UNIT:
            together.wait(60)
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(disk_file.os, "preadv", meets)
    assert torch.equal(checkpoint.read("a"), torch.arange(20_000, dtype=torch.float32))
    assert not readers()


@pytest.mark.usefixtures("way")
def test_what_was_read_is_not_left_in_the_page_cache(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": torch.zeros(2**20)})
    file = tmp_path / "model.safetensors"
    if not evictable(file):
        pytest.skip("this file system keeps its files in memory")
    Checkpoint.open(tmp_path).read("a")
    assert cached_bytes(file) <= 2 * 4096  # the pages at either end may belong to a neighbour, and stay


def test_a_disk_error_names_the_tensor_and_ends_the_other_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tensors(tmp_path, {"first": torch.zeros(5000), "second": torch.zeros(50_000)})
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(tensor_reads, "PIECE_BYTES", 4096)
    asked, real = list[int](), os.preadv

    def fails(descriptor: int, buffers: Sequence[Any], offset: int) -> int:
        if threading.current_thread() not in readers():
            return real(descriptor, buffers, offset)
        asked.append(offset)
        if offset >= 40_000:
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(disk_file.os, "preadv", fails)
    targets = {"first": torch.ones(5000), "second": torch.ones(50_000)}
    with pytest.raises(CheckpointError, match=r"^tensor 'second': .*model\.safetensors can't be read \(Input/output"):
        checkpoint.read_into(targets)
    assert max(asked) < 100_000, "reads went on behind the failed one"
    assert not readers()


def test_a_file_cut_short_while_it_is_read_names_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tensors(tmp_path, {"a": torch.zeros(50_000)})
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(tensor_reads, "PIECE_BYTES", 4096)

    def cut(done: int, _total: int) -> None:
        if done == 4096:
            os.truncate(tmp_path / "model.safetensors", 20_000)

    with pytest.raises(CheckpointError, match=r"tensor 'a': .* has 20000 bytes, but \d+ when opened"):
        checkpoint.read_into({"a": torch.ones(50_000)}, cut)
    assert not readers()


def test_buffers_that_the_system_refuses_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_nbytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    write_tensors(tmp_path, {"a": torch.zeros(3)})
    checkpoint = Checkpoint.open(tmp_path)
    monkeypatch.setattr(tensor_reads, "huge_pages", refuse)
    with pytest.raises(MemoryBudgetError, match=r"refused 4096 bytes to read weights .*Cannot allocate memory"):
        checkpoint.read("a")


def test_whoever_is_told_may_end_it(tmp_path: Path) -> None:
    targets = {str(number): torch.ones(10) for number in range(50)}
    write_tensors(tmp_path, {name: torch.zeros(10) for name in targets})

    def enough(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Checkpoint.open(tmp_path).read_into(targets, enough)
    assert not readers()
    assert sum(bool(target.any()) for target in targets.values()) == 49
