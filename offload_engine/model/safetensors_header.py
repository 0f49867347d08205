"""The header of a safetensors file, read and checked byte for byte before anything else of the file is believed.

Format (safetensors README): u64 little-endian length N of the header; N bytes of JSON, an object from tensor name to
`{"dtype", "shape", "data_offsets": [begin, end]}` with offsets relative to the end of the header, plus an optional
`__metadata__`; then the data, which the tensors cover without gap or overlap, to the last byte of the file.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NamedTuple

import torch

from offload_engine.disk_file import drop_page_cache, read_nothing_ahead
from offload_engine.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
"""Longest header the format allows."""
LENGTH_BYTES = 8
MAX_ELEMENTS = 2**63 - 1
METADATA = "__metadata__"
"""The one entry that is no tensor."""

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class TensorInfo(NamedTuple):
    """Where one tensor lies; every field has been checked against its file."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte, from the start of the file."""
    nbytes: int


class FileHeader(NamedTuple):
    """One file's tensors by name, the file's size in bytes when they were read, and what else it says of itself."""

    tensors: dict[str, TensorInfo]
    size: int
    metadata: dict[str, str]


def regular_file_size(path: Path) -> int:
    """Size of a regular file (links followed); raises `CheckpointError` where `path` is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not found; download the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is no regular file, wanted a safetensors checkpoint's file")
    return status.st_size


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A hook for `json.loads` which refuses an object that says the same key twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} appears twice")
        found[key] = value
    return found


def read_header(path: Path) -> FileHeader:
    """Every tensor of a safetensors file; raises `CheckpointError` for a file that is not wholly as the format demands.

    Nothing is allocated on the word of the file: a length counts only once the file is known to be that long.
    """
    size = regular_file_size(path)
    try:
        with path.open("rb", buffering=0) as file:
            read_nothing_ahead(file.fileno())
            start = file.read(LENGTH_BYTES)
            if len(start) < LENGTH_BYTES:
                raise CheckpointError(f"{path}: {size} bytes long, wanted at least {LENGTH_BYTES} (header length)")
            length = int.from_bytes(start, "little")
            if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > size:
                raise CheckpointError(
                    f"{path}: header length {length}, wanted at most {min(MAX_HEADER_BYTES, size - LENGTH_BYTES)}; "
                    "the file is cut short or is no safetensors file"
                )
            header = file.read(length)
            drop_page_cache(file.fileno(), 0, LENGTH_BYTES + length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    if len(header) < length:
        raise CheckpointError(f"{path}: header ends after {len(header)} bytes, wanted {length}")
    data = LENGTH_BYTES + length
    entries = _entries(path, header)
    metadata = entries.pop(METADATA, {})
    tensors = [_tensor(path, name, entry, data, size) for name, entry in entries.items()]
    _check_cover(path, tensors, data, size)
    return FileHeader({tensor.name: tensor for tensor in tensors}, size, metadata)


def _entries(path: Path, header: bytes) -> dict[str, Any]:
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: header starts with {header[:1]!r}, wanted b'{{'; this is no safetensors file")
    try:
        entries: dict[str, Any] = json.loads(header.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: header is not valid JSON ({error})") from None
    metadata = entries.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: {METADATA} is {_short(metadata)}, wanted an object of strings")
    return entries


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> TensorInfo:
    where = f"{path}: tensor {_short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: entry is {_short(entry)}, wanted dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype is {_short(dtype)}, wanted one of {', '.join(DTYPES)}")
    if not _sizes(shape):
        raise CheckpointError(f"{where}: shape is {_short(shape)}, wanted a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data:
        raise CheckpointError(
            f"{where}: data_offsets are {_short(offsets)}, wanted [begin, end] with begin <= end <= {size - data}, "
            "the bytes of data in this file"
        )
    nbytes = _elements(where, shape) * DTYPES[dtype].itemsize
    begin, end = offsets
    if nbytes != end - begin:
        raise CheckpointError(
            f"{where}: data_offsets span {end - begin} bytes, wanted {nbytes} for shape {_short(shape)} of {dtype}"
        )
    return TensorInfo(name, path, DTYPES[dtype], tuple(shape), data + begin, nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size <= MAX_ELEMENTS for size in value)


def _elements(where: str, shape: list[int]) -> int:
    product = 1
    for size in shape:
        product *= size or 1  # an empty tensor's other sizes must be addressable too
        if product > MAX_ELEMENTS:
            raise CheckpointError(f"{where}: shape is {_short(shape)}, wanted at most {MAX_ELEMENTS} elements")
    return 0 if 0 in shape else product


def _check_cover(path: Path, tensors: list[TensorInfo], data: int, size: int) -> None:
    position = data
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != position:
            fault = "overlaps its predecessor" if tensor.offset < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}: tensor {_short(tensor.name)} {fault}: begins at byte {tensor.offset - data} of the data, "
                f"wanted {position - data}"
            )
        position += tensor.nbytes
    if position != size:
        raise CheckpointError(f"{path}: {size} bytes long, wanted {position}, where its last tensor ends")


def _short(value: Any) -> str:
    """`repr`, cut: a damaged header may hold anything."""
    try:
        text = repr(value)
    except RecursionError:
        return "nested too deeply to show"
    return text if len(text) <= 120 else f"{text[:117]}..."
