"""A checkpoint directory as the hub publishes it: which tensor lies where. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from offload_engine.errors import CheckpointError
from offload_engine.model.safetensors_header import (
    MAX_HEADER_BYTES,
    FileHeader,
    TensorInfo,
    read_header,
    regular_file_size,
    unique_keys,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
READ_CHUNK = 16 * 2**20
"""Bytes read before they are dropped from the page cache again: what a read adds to it stays below this."""


class Checkpoint:
    """The tensors of a checkpoint, by published name, each known to lie within its file. Holds no file open."""

    def __init__(
        self,
        directory: Path,
        tensors: dict[str, TensorInfo],
        file_sizes: dict[Path, int],
        metadata: dict[Path, dict[str, str]] | None = None,
    ) -> None:
        """See `Checkpoint.open`."""
        self.directory = directory
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)
        self.file_sizes: Mapping[Path, int] = MappingProxyType(file_sizes)
        """Bytes of each safetensors file when its header was read."""
        self.metadata: Mapping[Path, Mapping[str, str]] = MappingProxyType(metadata or {})
        """The `__metadata__` of each safetensors file."""
        self._stamps = {path: path.stat().st_mtime_ns for path in file_sizes}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read the headers of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

        Raises `CheckpointError`, naming file and tensor, where a file is missing or not wholly as its format demands.
        """
        try:
            files = {path.name for path in directory.iterdir()}
        except OSError as error:
            raise CheckpointError(
                f"{directory}: can't be listed ({error.strerror}), wanted a directory with {SINGLE_FILE}"
            ) from None
        if SINGLE_FILE in files:
            path = directory / SINGLE_FILE
            header = read_header(path)
            return cls(directory, header.tensors, {path: header.size}, {path: header.metadata})
        if INDEX_FILE in files:
            return cls._open_sharded(directory)
        raise CheckpointError(f"{directory}: {_nothing_to_read(files)}")

    @classmethod
    def _open_sharded(cls, directory: Path) -> Checkpoint:
        weight_map = _read_weight_map(directory / INDEX_FILE)
        headers: dict[str, FileHeader] = {}
        tensors = {}
        for name, file in weight_map.items():
            if file not in headers:
                headers[file] = read_header(directory / file)
            if name not in headers[file].tensors:
                raise CheckpointError(
                    f"{directory / file}: tensor {name!r} is missing, but {INDEX_FILE} places it here"
                )
            tensors[name] = headers[file].tensors[name]
        sizes = {directory / file: header.size for file, header in headers.items()}
        return cls(directory, tensors, sizes, {directory / file: header.metadata for file, header in headers.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def fingerprint(self) -> str:
        """16 hex digits that tell checkpoints apart by their tensors' names, dtypes and shapes, however sharded."""
        rows = sorted((info.name, str(info.dtype), info.shape, info.nbytes) for info in self.tensors.values())
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def read(self, name: str, dtype: torch.dtype | None = None, into: Tensor | None = None) -> Tensor:
        """One tensor on the CPU, in its stored dtype or cast to `dtype`, or `into` a contiguous one of as many numbers,
        in its dtype; leaves nothing of it in the page cache.

        Takes the memory of the result and, to cast, at most `READ_CHUNK` bytes beside it. Raises `CheckpointError` when
        there is no such tensor, or its file can't be read or has changed since `open`.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: tensor {name!r} is missing")
        info = self.tensors[name]
        size = regular_file_size(info.path)
        if size != self.file_sizes[info.path]:
            raise CheckpointError(
                f"{info.path}: {size} bytes long, but {self.file_sizes[info.path]} when opened; load the model again"
            )
        self._check_header(info.path)
        if into is None:
            into = torch.empty(math.prod(info.shape), dtype=dtype or info.dtype)
        result = into.view(-1)
        cast = result.dtype != info.dtype
        try:
            done = _read_cast(info, result) if cast else _read_into(info.path, info.offset, _bytes_of(result))
        except OSError as error:
            raise CheckpointError(f"{info.path}: tensor {name!r} can't be read ({error.strerror})") from None
        if done < info.nbytes:
            raise CheckpointError(f"{info.path}: tensor {name!r} ends after {done} bytes, wanted {info.nbytes}")
        return result.view(info.shape)

    def _check_header(self, path: Path) -> None:
        """Look at a file that was written to since `open`: its tensors must still be where they were."""
        stamp = path.stat().st_mtime_ns
        if stamp == self._stamps[path]:
            return
        found = read_header(path).tensors
        for info in self.tensors.values():
            if info.path == path and found.get(info.name) != info:
                raise CheckpointError(f"{path}: has another header than when opened; load the model again")
        self._stamps[path] = stamp


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(torch.uint8).numpy().data


def _read_cast(info: TensorInfo, target: Tensor) -> int:
    """Fill `target` [numbers] with the tensor cast to its dtype, a chunk at a time; returns the bytes read."""
    count = READ_CHUNK // info.dtype.itemsize
    chunk = torch.empty(min(count, target.numel()), dtype=info.dtype)
    done = 0
    for part in target.split(count):
        piece = chunk[: part.numel()]
        got = _read_into(info.path, info.offset + done, _bytes_of(piece))
        done += got
        if got < piece.nbytes:
            break
        part.copy_(piece)
    return done


def _read_into(path: Path, offset: int, target: memoryview) -> int:
    """Fill `target` from `offset` of the file, chunk by chunk; returns the bytes read, fewer only at the file's end."""
    done = 0
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        while done < len(target):
            count = file.readinto(target[done : done + READ_CHUNK])
            if not count:
                break
            done += count
            drop_page_cache(file.fileno(), offset, done)
    return done


def drop_page_cache(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to forget these bytes of a file, so that a memory budget means what it says."""
    if nbytes and hasattr(os, "posix_fadvise"):  # a length of 0 would mean the whole file
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


def _nothing_to_read(files: set[str]) -> str:
    wanted = f"{SINGLE_FILE} or {INDEX_FILE}"
    pickles = sorted(file for file in files if file.endswith((".bin", ".pt", ".pth")))
    if pickles:
        return (
            f"holds {pickles[0]}, wanted {wanted}: only safetensors are read, since nothing of a checkpoint is "
            "executed; convert it first"
        )
    return f"holds no weights, wanted {wanted}"


def _read_weight_map(path: Path) -> dict[str, str]:
    size = regular_file_size(path)
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: {size} bytes long, wanted at most {MAX_HEADER_BYTES}")
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: has no weight_map, wanted an object from tensor name to file name")
    for name, file in weight_map.items():
        if not _plain_file_name(file):
            raise CheckpointError(
                f"{path}: tensor {name!r} is placed in {file!r}, wanted the plain name of a .safetensors file beside it"
            )
    return weight_map


def _plain_file_name(file: Any) -> bool:
    return isinstance(file, str) and file.endswith(".safetensors") and not set(file) & set("/\\\0:")
