"""Experts left to the operating system: read in place from a memory-mapped checkpoint, as it pages them in and out."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.errors import CheckpointError
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.weights import FileSpan, all_expert_spans


def mapped_weights(config: ModelConfig, checkpoint: Checkpoint, *, random: bool) -> Callable[[int, int], ExpertWeights]:
    """Views of every expert's matrices in the mapped shards: `weights(layer, expert)` for `ResidentExperts`.

    `random` has the kernel fetch the pages that are touched and no others (MADV_RANDOM); without it the kernel reads
    ahead as it sees fit. Raises `CheckpointError` for a matrix that doesn't start on a multiple of its dtype's size.
    """
    spans = all_expert_spans(config, checkpoint)
    files: dict[Path, mmap.mmap] = {}

    def view(span: FileSpan, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
        if span.offset % dtype.itemsize:
            raise CheckpointError(
                f"{span.path}: a matrix starts at byte {span.offset}, wanted a multiple of {dtype.itemsize} to map it"
            )
        if span.path not in files:
            files[span.path] = _map(span.path, random)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that the pages are read-only, and nobody writes them
            flat = torch.frombuffer(files[span.path], dtype=dtype, count=rows * columns, offset=span.offset)
        return flat.view(rows, columns)

    def weights(layer: int, expert: int) -> ExpertWeights:
        found = spans[ExpertKey(layer, expert)]
        wide, narrow = (found.intermediate, found.hidden), (found.hidden, found.intermediate)
        return ExpertWeights(
            gate=view(found.gate, found.dtype, *wide),
            up=view(found.up, found.dtype, *wide),
            down=view(found.down, found.dtype, *narrow),
        )

    return weights


def _map(path: Path, random: bool) -> mmap.mmap:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if random:
        mapped.madvise(mmap.MADV_RANDOM)
    return mapped
