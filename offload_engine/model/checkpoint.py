"""A checkpoint directory as the hub publishes it: which tensor lies where. Nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from offload_engine.disk_file import DiskFile
from offload_engine.errors import CheckpointError
from offload_engine.model.safetensors_header import (
    MAX_HEADER_BYTES,
    FileHeader,
    TensorInfo,
    read_header,
    regular_file_size,
    unique_keys,
)
from offload_engine.model.tensor_reads import read_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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
        self._header_bytes: dict[Path, int] = {}
        """Of each file, to where its tensors begin."""
        for info in tensors.values():
            self._header_bytes[info.path] = min(info.offset, self._header_bytes.get(info.path, info.offset))
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

    def open_file(self, path: Path, direct: bool = True) -> DiskFile:
        """One of its files, for reads past the page cache; `direct=False` never tries direct I/O.

        Raises `CheckpointError` when it can't be opened or has changed since `open`.
        """
        size = regular_file_size(path)
        if size != self.file_sizes[path]:
            raise CheckpointError(
                f"{path}: {size} bytes long, but {self.file_sizes[path]} when opened; load the model again"
            )
        self._check_header(path)
        return DiskFile(path, size, self._header_bytes[path], direct)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor on the CPU, in its stored dtype or cast to `dtype`. Raises as `read_into` does."""
        info = self._info(name)
        tensor = torch.empty(info.shape, dtype=dtype or info.dtype)
        self.read_into({name: tensor})
        return tensor

    def read_into(self, targets: Mapping[str, Tensor], progress: Callable[[int, int], None] | None = None) -> None:
        """Fill contiguous tensors, on any device, by published name, cast to their dtype; leaves nothing of them in the
        page cache.

        Takes 24 MiB beside them; `progress(done, total)` is called as they come (`read_tensors`). Raises
        `CheckpointError` when there is no such tensor, or its file can't be read or has changed since `open`.
        """
        wanted = [(self._info(name), target) for name, target in targets.items()]
        wanted.sort(key=lambda one: (one[0].path, one[0].offset))
        with ExitStack() as opened:
            files: dict[Path, DiskFile] = {}
            for info, _ in wanted:
                if info.path not in files:
                    files[info.path] = opened.enter_context(closing(self.open_file(info.path)))
            read_tensors(wanted, files, progress)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise CheckpointError(f"{self.directory}: tensor {name!r} is missing")
        return self.tensors[name]

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
