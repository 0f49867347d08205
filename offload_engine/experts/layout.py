"""One expert's slab: which bytes are read to where, and where each matrix then starts. Pure arithmetic.

Safetensors offsets are arbitrary while direct reads want aligned ones, so a slab receives whole aligned windows of the
file: it has slack, its matrices start where their bytes happen to fall, and their order is the file's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.model.moe import ExpertWeights
from offload_engine.model.weights import ExpertSpans, FileSpan

SLOT_ALIGNMENT = 4096
"""Slots, slabs and the windows read into them start and end on multiples of this, in bytes; direct I/O needs it."""


def align_down(offset: int) -> int:
    """The last multiple of `SLOT_ALIGNMENT` not above `offset`."""
    return offset - offset % SLOT_ALIGNMENT


def align_up(offset: int) -> int:
    """The first multiple of `SLOT_ALIGNMENT` not below `offset`."""
    return align_down(offset + SLOT_ALIGNMENT - 1)


class MatrixPlace(NamedTuple):
    """A row-major matrix inside a slab."""

    offset: int
    """Bytes from the start of the slab; a multiple of the dtype's size."""
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class SlabLayout:
    """Where an expert's matrices are once its slab is filled."""

    gate: MatrixPlace
    up: MatrixPlace
    down: MatrixPlace
    dtype: torch.dtype
    nbytes: int
    """Bytes of the slab, a multiple of `SLOT_ALIGNMENT`."""

    def weights(self, slab: Tensor) -> ExpertWeights:
        """Views of the matrices in `slab`, uint8 [at least nbytes, whole alignment units]; nothing is copied."""
        typed = slab.view(self.dtype)
        return ExpertWeights(*(self._view(typed, place) for place in (self.gate, self.up, self.down)))

    def _view(self, typed: Tensor, place: MatrixPlace) -> Tensor:
        start = place.offset // self.dtype.itemsize
        return typed[start : start + place.rows * place.columns].view(place.rows, place.columns)


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
