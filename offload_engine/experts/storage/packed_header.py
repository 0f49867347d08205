"""The header of a packed store, `experts.packed`: written, and read back checked before anything of it is believed.

docs/packed-format.md specifies the file byte by byte. All integers are little-endian.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload_engine.core import ExpertKey
from offload_engine.disk_file import align_up, drop_page_cache
from offload_engine.errors import CheckpointError
from offload_engine.experts.storage.layout import SLOT_ALIGNMENT, SlabLayout, packed_layout
from offload_engine.model.quantized import ExpertFormat
from offload_engine.model.safetensors_header import regular_file_size

PACKED_FILE = "experts.packed"
MAGIC = b"DMOEPACK"
VERSION = 1
SOURCE_KEY = "offload_engine.source"
"""Key under which the safetensors files beside a packed store name the checkpoint that all of them were made of."""
CHECKED_FROM = 16
"""The header's checksum is of its bytes from here on."""
MAX_HEADER_BYTES = 2**28

_START = struct.Struct("<8sIIQQQQ")
"""Magic, version, CRC-32, and in bytes the header, the file and the description; number of slabs."""
_SLAB = struct.Struct("<IIQQII")
"""Layer, expert, offset, payload, CRC-32, zero."""
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_BITS: dict[str, Literal[4, 8]] = {"int8": 8, "int4": 4}

Size = Annotated[int, Field(ge=1, le=2**24)]


class Description(BaseModel):
    """What all slabs have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    experts: Literal["bfloat16", "float16", "float32", "int8", "int4"]
    """What weights are stored as."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """What they were before; the same as `experts` unless that is int8 or int4."""
    group_size: Annotated[int, Field(ge=0, le=2**24)]
    """int4: columns that share a scale; else 0."""
    hidden_size: Size
    moe_intermediate_size: Size
    source: Annotated[str, Field(min_length=1, max_length=256)]
    """Identity of the checkpoint they come from."""

    @classmethod
    def of(cls, form: ExpertFormat, hidden: int, width: int, source: str) -> Description:
        """Describe experts of `width` in a model of `hidden`."""
        dtype = str(form.dtype).removeprefix("torch.")
        experts = dtype if form.bits is None else f"int{form.bits}"
        values = {"experts": experts, "dtype": dtype, "group_size": form.group, "source": source}
        return cls.model_validate(values | {"hidden_size": hidden, "moe_intermediate_size": width})

    @property
    def format(self) -> ExpertFormat:
        """How the weights are stored."""
        return ExpertFormat(_DTYPES[self.dtype], _BITS.get(self.experts), self.group_size)

    def fault(self) -> str | None:
        """What contradicts itself here, if anything does."""
        if self.experts in _DTYPES and self.experts != self.dtype:
            return f"experts is {self.experts!r}, wanted {self.dtype!r} as dtype, or int8 or int4"
        group, columns = self.group_size, (self.hidden_size, self.moe_intermediate_size)
        if self.experts != "int4":
            return f"group_size is {group}, wanted 0 as experts is {self.experts!r}" if group else None
        if group < 2 or group & (group - 1) or any(count % group for count in columns):
            return f"group_size is {group}, wanted a power of two above 1 that divides {columns[0]} and {columns[1]}"
        return None


class Slab(NamedTuple):
    """Where one expert lies."""

    offset: int
    """Of its first byte, from the start of the file; a multiple of `SLOT_ALIGNMENT`."""
    payload: int
    """Bytes from its first value to its last, alignment between its parts included."""
    crc32: int
    """Of the payload."""


@dataclass(frozen=True, slots=True)
class PackedHeader:
    """A packed store's header, consistent in itself and with its file's size."""

    description: Description
    slabs: dict[ExpertKey, Slab]
    header_bytes: int
    file_bytes: int

    @property
    def layout(self) -> SlabLayout:
        """Of every slab."""
        one = self.description
        return packed_layout(one.format, one.hidden_size, one.moe_intermediate_size)[0]


def header_bytes(description: Description, slabs: int) -> int:
    """Bytes of the header of a store with that many slabs: where the first one starts."""
    return align_up(_START.size + len(_encoded(description)) + slabs * _SLAB.size)


def encode_header(description: Description, slabs: dict[ExpertKey, Slab], file_bytes: int) -> bytes:
    """The header as it is written, `header_bytes` long."""
    text, length = _encoded(description), header_bytes(description, len(slabs))
    records = b"".join(_SLAB.pack(*key, *slab, 0) for key, slab in slabs.items())
    blank = _START.pack(MAGIC, VERSION, 0, length, file_bytes, len(text), len(slabs))
    body = (blank[CHECKED_FROM:] + text + records).ljust(length - CHECKED_FROM, b"\0")
    return MAGIC + struct.pack("<II", VERSION, zlib.crc32(body)) + body


def read_packed_header(path: Path) -> PackedHeader:
    """Raises `CheckpointError`, naming the file, unless all of the header is as the format demands."""
    size = regular_file_size(path)
    try:
        with path.open("rb", buffering=0) as file:
            start = file.read(_START.size)
            length = _header_length(path, start, size)
            content = start + file.read(length - len(start))
            drop_page_cache(file.fileno(), 0, length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read ({error.strerror})") from None
    if len(content) < length:
        raise CheckpointError(f"{path}: header ends after {len(content)} bytes, wanted {length}")
    _magic, _version, checksum, _length, file_bytes, text_bytes, count = _START.unpack_from(content)
    found = zlib.crc32(content[CHECKED_FROM:])
    if found != checksum:
        raise CheckpointError(
            f"{path}: the header's checksum is {found:#010x}, wanted {checksum:#010x}; it is damaged: convert again"
        )
    if file_bytes != size:
        raise CheckpointError(f"{path}: {size} bytes long, wanted {file_bytes}; it is cut short: convert again")
    if _START.size + text_bytes + count * _SLAB.size > length:
        raise CheckpointError(f"{path}: {count} slabs don't fit a header of {length} bytes")
    description = _decoded(path, content[_START.size : _START.size + text_bytes])
    table = content[_START.size + text_bytes :][: count * _SLAB.size]
    header = PackedHeader(description, _slabs(path, table), length, size)
    _check_places(path, header)
    return header


def _header_length(path: Path, start: bytes, size: int) -> int:
    """The header's length, by the file's first bytes."""
    if not start.startswith(MAGIC) or len(start) < _START.size:
        raise CheckpointError(f"{path}: starts with {start[:8]!r}, wanted {MAGIC!r}; this is no packed store")
    _magic, version, _checksum, length, *_rest = _START.unpack(start)
    if version != VERSION:
        raise CheckpointError(
            f"{path}: format version {version}, wanted {VERSION}; convert again with this version, or install its own"
        )
    if length % SLOT_ALIGNMENT or not 0 < length <= min(size, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: header length {length}, wanted a multiple of {SLOT_ALIGNMENT} up to {min(size, MAX_HEADER_BYTES)}"
        )
    return int(length)


def _encoded(description: Description) -> bytes:
    return json.dumps(description.model_dump(), separators=(",", ":")).encode()


def _decoded(path: Path, text: bytes) -> Description:
    try:
        description = Description.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise CheckpointError(f"{path}: description in the header, {where}: {first['msg']}") from None
    fault = description.fault()
    if fault is not None:
        raise CheckpointError(f"{path}: description in the header: {fault}")
    return description


def _slabs(path: Path, table: bytes) -> dict[ExpertKey, Slab]:
    slabs: dict[ExpertKey, Slab] = {}
    for layer, expert, offset, payload, checksum, _zero in _SLAB.iter_unpack(table):
        key = ExpertKey(layer, expert)
        if key in slabs:
            raise CheckpointError(f"{path}: expert {expert} of layer {layer} is listed twice")
        slabs[key] = Slab(offset, payload, checksum)
    return slabs


def _check_places(path: Path, header: PackedHeader) -> None:
    one = header.description
    layout, payload = packed_layout(one.format, one.hidden_size, one.moe_intermediate_size)
    end = header.header_bytes
    for key, slab in sorted(header.slabs.items(), key=lambda item: item[1].offset):
        where = f"{path}: expert {key.expert} of layer {key.layer}"
        if slab.payload != payload:
            raise CheckpointError(f"{where}: slab of {slab.payload} bytes, wanted {payload}")
        if slab.offset % SLOT_ALIGNMENT or slab.offset < end or slab.offset + layout.nbytes > header.file_bytes:
            raise CheckpointError(
                f"{where}: slab at byte {slab.offset}, wanted a multiple of {SLOT_ALIGNMENT} "
                f"from {end} to {header.file_bytes - layout.nbytes}"
            )
        end = slab.offset + layout.nbytes


def require_experts(path: Path, header: PackedHeader, keys: Sequence[ExpertKey], hidden: int, width: int) -> None:
    """Raises `CheckpointError` unless the store holds these experts, no others, of these sizes."""
    one = header.description
    if (one.hidden_size, one.moe_intermediate_size) != (hidden, width):
        raise CheckpointError(
            f"{path}: experts of width {one.moe_intermediate_size} in a model of {one.hidden_size}, "
            f"wanted {width} in {hidden} by config.json"
        )
    missing = [key for key in keys if key not in header.slabs]
    spare = sorted(header.slabs.keys() - set(keys))
    for fault, found in (("is missing, wanted", missing), ("is not wanted", spare)):
        if found:
            raise CheckpointError(f"{path}: expert {found[0].expert} of layer {found[0].layer} {fault} by config.json")
