"""Writes sharded safetensors files piece by piece, so that memory never holds more than a piece of one tensor, and the
page cache not much more: a checkpoint larger than memory would otherwise push everything else out of it.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from offload_engine.cli.progress import Progress

SETTLE_BYTES = 128 * 2**20
"""How much of a file the page cache holds before it is settled."""
FORMAT_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Blank(NamedTuple):
    """A tensor that is still to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


NOTHING: Mapping[str, str] = MappingProxyType({})

Draw = Callable[[Blank], Iterable[Tensor]]


def shards(tensors: list[Blank], limit: int) -> list[list[Blank]]:
    """Split in order, each shard as full as `limit` bytes allow; a tensor beyond the limit gets a shard of its own.

    Inside a shard the order is the one safetensors' own writer gives: wide dtypes first, then by name.
    """
    split: list[list[Blank]] = []
    room = 0
    for blank in tensors:
        if not split or blank.nbytes > room:
            split.append([])
            room = limit
        split[-1].append(blank)
        room -= blank.nbytes
    return [sorted(shard, key=lambda blank: (-blank.dtype.itemsize, blank.name)) for shard in split]


def header(shard: list[Blank], metadata: Mapping[str, str] = NOTHING) -> bytes:
    """A safetensors header: its length as u64, then JSON, padded with blanks so that the data begins aligned to 8."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for blank in shard:
        entries[blank.name] = {
            "dtype": FORMAT_NAMES[blank.dtype],
            "shape": blank.shape,
            "data_offsets": [offset, offset + blank.nbytes],
        }
        offset += blank.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shards(
    folder: Path, split: list[list[Blank]], draw: Draw, progress: Progress, metadata: Mapping[str, str] = NOTHING
) -> None:
    """The shards and their index; `draw` gives each tensor's elements in order, in pieces of its dtype. `metadata` goes
    into every file's header.
    """
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(split, start=1):
        path = folder / f"model-{number:05d}-of-{len(split):05d}.safetensors"
        weight_map |= {blank.name: path.name for blank in shard}
        write_file(path, shard, draw, progress, metadata)
    total = sum(blank.nbytes for shard in split for blank in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_model(folder: Path, split: list[list[Blank]], draw: Draw, progress: Progress) -> None:
    """As `write_shards`, but a single shard becomes a plain `model.safetensors`, without an index."""
    if len(split) > 1:
        write_shards(folder, split, draw, progress)
    else:
        write_file(folder / "model.safetensors", split[0], draw, progress)


def write_file(
    path: Path, shard: list[Blank], draw: Draw, progress: Progress, metadata: Mapping[str, str] = NOTHING
) -> None:
    """One safetensors file, on the disk when this returns."""
    unsettled = 0
    with path.open("wb") as file:
        file.write(header(shard, metadata))
        for piece in itertools.chain.from_iterable(draw(blank) for blank in shard):
            written = file.write(piece.reshape(-1).view(torch.uint8).numpy().data)
            progress.advance(written)
            unsettled += written
            if unsettled >= SETTLE_BYTES:
                settle(file)
                unsettled = 0
        settle(file)


def write_json(path: Path, value: Any) -> None:
    """One file of JSON, on the disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        settle(file)


def settle(file: IO[Any]) -> None:
    """Bring what was written to the disk, and out of the page cache where the system can be asked to."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
