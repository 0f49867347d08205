"""Writing tensors of a checkpoint into safetensors files of another one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from offload_engine.disk_file import drop_page_cache
from offload_engine.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from offload_engine.model.safetensors_header import TensorInfo

SHARD_BYTES = 512 * 2**20
"""Bytes of the tensors written, and so held in memory, together; a larger one is alone."""


def write_tensors(
    folder: Path,
    checkpoint: Checkpoint,
    infos: Sequence[TensorInfo],
    metadata: dict[str, str],
    progress: Callable[[int], None],
) -> None:
    """Write these tensors of `checkpoint` as they are stored, `metadata` in every file, and an index if they are many.

    `progress` is told the bytes of each file once it is on the disk. Raises `CheckpointError` where a tensor can't be
    read, and lets `OSError` through.
    """
    shards = _split(infos)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {info.name: torch.empty(info.shape, dtype=info.dtype) for info in shard}
        checkpoint.read_into(tensors)
        try:
            save_file(tensors, folder / name, {"format": "pt"} | metadata)
        except SafetensorError as error:  # what the library makes of a full disk
            raise OSError(str(error)) from None
        shutil.copymode(shard[0].path, folder / name)  # the library keeps its files from all but their owner
        settle(folder / name)
        weight_map |= {info.name: name for info in shard}
        progress(sum(info.nbytes for info in shard))
    if len(shards) > 1:
        total = sum(info.nbytes for info in infos)
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")
        settle(folder / INDEX_FILE)


def settle(path: Path) -> None:
    """Have a file, or the entries of a directory, on the disk when this returns, and no file's bytes in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if path.is_file():
            drop_page_cache(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def _split(infos: Sequence[TensorInfo]) -> list[list[TensorInfo]]:
    shards: list[list[TensorInfo]] = []
    room = 0
    for info in infos:
        if not shards or info.nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(info)
        room -= info.nbytes
    return shards
