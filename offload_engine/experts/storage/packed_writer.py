"""Writing `experts.packed`: expert after expert, the header last, so that what was cut off is no store."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.disk_file import drop_page_cache
from offload_engine.errors import CheckpointError, InternalError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.layout import packed_layout
from offload_engine.experts.storage.packed_header import Description, Slab, encode_header, header_bytes
from offload_engine.experts.storage.store import named
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.quantized import ExpertFormat, Matrix, QuantizedMatrix, quantize_int4, quantize_int8

SYNC_BYTES = 64 * 2**20
"""Bytes written before they are sent to the disk and dropped from the page cache: what a conversion adds to it."""


class PackedWriter:
    """A packed store under way. `write` every one of its experts in order, then `finish`; or leave, and nothing loads.

    Lets `OSError` through, as when the disk is full.
    """

    def __init__(self, path: Path, description: Description, keys: Sequence[ExpertKey]) -> None:
        self.description = description
        self._keys = list(keys)
        self._slabs: dict[ExpertKey, Slab] = {}
        form = description.format
        self._layout, self._payload = packed_layout(form, description.hidden_size, description.moe_intermediate_size)
        self._arena = SlotArena(1, self._layout.nbytes)
        """Zero wherever the layout has nothing; the same for every expert."""
        self._weights = self._arena.weights(0, self._layout)
        self._end = self._synced = header_bytes(description, len(self._keys))
        self._file = path.open("wb")
        self._file.seek(self._end)

    @property
    def slab_bytes(self) -> int:
        """Bytes of each slab."""
        return self._layout.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the finished file."""
        return header_bytes(self.description, len(self._keys)) + len(self._keys) * self._layout.nbytes

    def write(self, key: ExpertKey, weights: ExpertWeights) -> ExpertWeights:
        """Append an expert, whose matrices are plain; returns it as a store will, as views that last until the next.

        Raises `CheckpointError`, naming the expert, when it is to be quantised and holds a weight that is not finite.
        """
        if key != self._keys[len(self._slabs)]:
            raise InternalError(f"{named(key)} was written out of turn, wanted {self._keys[len(self._slabs)]}")
        try:
            for target, matrix in zip(self._weights, weights, strict=True):
                _store(target, matrix, self.description.format)
        except ValueError as error:
            raise CheckpointError(f"{named(key)}: {error}, so it can't be quantised") from None
        buffer = self._arena.buffer(0)
        self._file.write(buffer)
        self._slabs[key] = Slab(self._end, self._payload, zlib.crc32(buffer[: self._payload]))
        self._end += self._layout.nbytes
        if self._end - self._synced >= SYNC_BYTES:
            self._sync()
        return self._weights

    def finish(self) -> None:
        """Write the header; the store is whole, and on the disk, when this returns."""
        if len(self._slabs) != len(self._keys):
            raise InternalError(f"{len(self._slabs)} experts were written, wanted {len(self._keys)}")
        self._sync()
        self._file.seek(0)
        self._file.write(encode_header(self.description, self._slabs, self._end))
        self._file.flush()
        os.fsync(self._file.fileno())
        drop_page_cache(self._file.fileno(), 0, self._end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def _sync(self) -> None:
        self._file.flush()
        os.fdatasync(self._file.fileno())
        drop_page_cache(self._file.fileno(), self._synced, self._end - self._synced)
        self._synced = self._end


def _store(target: Matrix, matrix: Matrix, form: ExpertFormat) -> None:
    """Fill the matrix of a slab with `matrix` in the slab's format."""
    if not isinstance(matrix, Tensor):
        raise InternalError("an expert to be packed is quantised already")
    if not isinstance(target, QuantizedMatrix):
        target.copy_(matrix)
        return
    rounded = quantize_int8(matrix) if form.bits == 8 else quantize_int4(matrix, form.group)
    target.values.copy_(rounded.values)
    target.scales.copy_(rounded.scales)


def packed_format(kind: str, stored: torch.dtype, group: int) -> ExpertFormat:
    """The format of `stored`, `bf16`, `int8` or `int4` experts that are stored as `stored` now."""
    if kind == "stored":
        return ExpertFormat(stored)
    if kind == "bf16":
        return ExpertFormat(torch.bfloat16)
    return ExpertFormat(stored, 8) if kind == "int8" else ExpertFormat(stored, 4, group)
