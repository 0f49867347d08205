"""One expert's slab: which bytes are read to where, and where each matrix then starts. Pure arithmetic.

Safetensors offsets are arbitrary while direct reads want aligned ones, so a slab receives whole aligned windows of the
file: it has slack, its matrices start where their bytes happen to fall, and their order is the file's. A packed store's
slabs have one layout, chosen for the reader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine import kernels
from offload_engine.disk_file import UNIT, align_down, align_up
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.quantized import ExpertFormat, Matrix, QuantizedMatrix
from offload_engine.model.weights import ExpertSpans, FileSpan

SLOT_ALIGNMENT = UNIT
"""Slots, slabs and the windows read into them start and end on multiples of this, in bytes: direct reads fill them."""

MATRIX_ALIGNMENT = 64
"""In a packed slab values and scales start on multiples of this, in bytes: a cache line, the widest vector."""


class MatrixPlace(NamedTuple):
    """A row-major matrix inside a slab: plain, or quantised (`offload_engine.model.quantized`)."""

    offset: int
    """Bytes from the start of the slab; a multiple of the dtype's size."""
    rows: int
    columns: int
    scales: int | None = None
    """Where its scales start, likewise; None for a plain matrix."""
    group: int = 0
    """Columns that share a scale, two values per byte; 0: a row does, one value per byte."""


@dataclass(frozen=True)
class SlabLayout:
    """Where an expert's matrices are once its slab is filled."""

    gate: MatrixPlace
    up: MatrixPlace
    down: MatrixPlace
    dtype: torch.dtype
    """Of plain matrices."""
    nbytes: int
    """Bytes of the slab, a multiple of `SLOT_ALIGNMENT`."""

    def weights(self, slab: Tensor) -> ExpertWeights:
        """Views of the matrices in `slab`, uint8 [at least nbytes, whole alignment units]; nothing is copied."""
        if self.gate.scales is None:
            typed = slab.view(self.dtype)
            return ExpertWeights(*[_part(typed, place.offset, place.rows, place.columns) for place in self.places])
        return ExpertWeights(*[self._quantized(slab, place) for place in self.places])

    @cached_property
    def example(self) -> tuple[kernels.Expert | None, int]:
        """An expert in a slab of host memory as our kernels take it, if they do, and the slab's address. The memory is
        gone: the expert is there to be `moved`, for to check one takes longer than to compute some.
        """
        slab = torch.empty(self.nbytes, dtype=torch.uint8)
        expert = self.weights(slab).kernel_expert
        return None if expert is None else expert.moved(0, None), slab.data_ptr()

    @property
    def places(self) -> tuple[MatrixPlace, MatrixPlace, MatrixPlace]:
        """Gate, up, down."""
        return self.gate, self.up, self.down

    def _quantized(self, slab: Tensor, place: MatrixPlace) -> Matrix:
        rows, columns = place.rows, place.columns
        assert place.scales is not None
        if place.group == 0:
            scales = _view(slab, place.scales, torch.float32, rows, 1).view(rows)
            return QuantizedMatrix(_view(slab, place.offset, torch.int8, rows, columns), scales)
        scales = _view(slab, place.scales, torch.bfloat16, rows, columns // place.group)
        return QuantizedMatrix(_view(slab, place.offset, torch.uint8, rows, columns // 2), scales)


class SlabExpert:
    """`Weights` in a slab, looked at when somebody asks. Our kernels want addresses; matrices, which only torch wants,
    take longer to make than an expert to be claimed, and one that has come from the disk is new to its slot.
    """

    def __init__(self, layout: SlabLayout, memory: Tensor, start: int = 0) -> None:
        """The slab begins at byte `start` of `memory`, contiguous uint8."""
        self.layout = layout
        self.memory = memory
        self.start = start

    @cached_property
    def matrices(self) -> ExpertWeights:
        """Views; nothing is copied."""
        return self.layout.weights(self.memory[self.start : self.start + self.layout.nbytes])

    @cached_property
    def kernel_expert(self) -> kernels.Expert | None:
        """See `Weights`."""
        example, address = self.layout.example
        if example is None or not self.memory.is_cpu:
            return None
        return example.moved(self.memory.data_ptr() + self.start - address, self.memory)

    def __iter__(self) -> Iterator[Matrix]:
        return iter(self.matrices)


def _view(slab: Tensor, offset: int, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    return _part(slab.view(dtype), offset, rows, columns)


def _part(typed: Tensor, offset: int, rows: int, columns: int) -> Tensor:
    start = typed.storage_offset() + offset // typed.itemsize
    return typed.as_strided((rows, columns), (columns, 1), start)


def packed_layout(form: ExpertFormat, hidden: int, width: int) -> tuple[SlabLayout, int]:
    """The layout of every slab of a packed store, and its payload in bytes, from the first value to the last.

    Gate, up, down, where quantised each followed by its scales; each part on a multiple of `MATRIX_ALIGNMENT`.
    """
    places: list[MatrixPlace] = []
    end = 0
    for rows, columns in ((width, hidden), (width, hidden), (hidden, width)):
        offset = _align_part(end)
        if form.bits is None:
            end = offset + rows * columns * form.dtype.itemsize
            places.append(MatrixPlace(offset, rows, columns))
            continue
        scales = _align_part(offset + rows * columns * form.bits // 8)
        end = scales + rows * (
            columns // form.group * torch.bfloat16.itemsize if form.group else torch.float32.itemsize
        )
        places.append(MatrixPlace(offset, rows, columns, scales, form.group))
    gate, up, down = places
    return SlabLayout(gate, up, down, form.dtype, align_up(end)), end


def _align_part(offset: int) -> int:
    return -(-offset // MATRIX_ALIGNMENT) * MATRIX_ALIGNMENT


class ReadWindow(NamedTuple):
    """One read: a run of whole alignment units of a file, and where it lands."""

    path: Path
    file_offset: int
    nbytes: int
    """Bytes asked for; the file may end before them."""
    slab_offset: int
    needed: int
    """Leading bytes without which the read is short; the rest is slack."""


class Move(NamedTuple):
    """Bytes of a slab that go down a little after the read; source and target may overlap."""

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How one expert gets from its files into a slab: the reads in any order, then the moves in theirs."""

    windows: tuple[ReadWindow, ...]
    moves: tuple[Move, ...]
    """Empty unless a file's tensors start at odd addresses: then whatever is not aligned to its dtype moves down."""
    layout: SlabLayout

    @property
    def nbytes(self) -> int:
        """Bytes asked of the disk."""
        return sum(window.nbytes for window in self.windows)


def plan_reads(spans: ExpertSpans) -> ReadPlan:
    """Cover an expert's matrices with as few aligned windows as cost no byte more; plan the slab that results."""
    windows: list[ReadWindow] = []
    moves: list[Move] = []
    starts: dict[FileSpan, int] = {}
    for span in sorted((spans.gate, spans.up, spans.down), key=lambda span: (span.path, span.offset)):
        _cover(windows, span)
        landed = windows[-1].slab_offset + span.offset - windows[-1].file_offset
        # Moved down in rising order, a matrix only ever covers slack or bytes that have moved away themselves.
        starts[span] = landed - landed % spans.dtype.itemsize
        if starts[span] != landed:
            moves.append(Move(landed, starts[span], span.nbytes))
    layout = SlabLayout(
        gate=MatrixPlace(starts[spans.gate], spans.intermediate, spans.hidden),
        up=MatrixPlace(starts[spans.up], spans.intermediate, spans.hidden),
        down=MatrixPlace(starts[spans.down], spans.hidden, spans.intermediate),
        dtype=spans.dtype,
        nbytes=sum(window.nbytes for window in windows),
    )
    return ReadPlan(tuple(windows), tuple(moves), layout)


def _cover(windows: list[ReadWindow], span: FileSpan) -> None:
    """Let the last window reach over `span`, or begin a new one where that would read bytes nobody wants."""
    begin, end = align_down(span.offset), align_up(span.offset + span.nbytes)
    last = windows[-1] if windows else None
    if last and last.path == span.path and begin <= last.file_offset + last.nbytes:
        needed = span.offset + span.nbytes - last.file_offset
        windows[-1] = last._replace(nbytes=end - last.file_offset, needed=needed)
    else:
        slab_offset = last.slab_offset + last.nbytes if last else 0
        windows.append(ReadWindow(span.path, begin, end - begin, slab_offset, span.offset + span.nbytes - begin))
