"""A checkpoint that is written to after it was opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from offload_engine.errors import CheckpointError
from offload_engine.model.checkpoint import Checkpoint
from tests.checkpoints import tiny_config, write_checkpoint

NAME = "model.norm.weight"


def rewritten(file: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in place; the file's clock is moved on, as clocks of files are coarse."""
    content = file.read_bytes()
    assert content.count(old) >= 1
    assert len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


@pytest.mark.parametrize("shards", [1, 2])
def test_another_header_of_the_same_size_is_refused(tmp_path: Path, shards: int) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tiny_config(), shards=shards))
    file = checkpoint.tensors[NAME].path
    rewritten(file, b'"model.norm.weight"', b'"model.norm.height"')
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{file.name}: has another header than when opened; load the model"):
            checkpoint.read(NAME)


def test_a_file_that_was_only_touched_is_read(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, tiny_config()))
    before = checkpoint.read(NAME)
    os.utime(checkpoint.tensors[NAME].path, ns=(0, 1))
    assert torch.equal(checkpoint.read(NAME), before)
