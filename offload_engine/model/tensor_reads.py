"""Tensors from files to where they are wanted, past the page cache, several reads under way at any time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.disk_file import UNIT, DiskFile, align_down, align_up
from offload_engine.errors import CheckpointError, MemoryBudgetError, TransferError
from offload_engine.model.safetensors_header import TensorInfo
from offload_engine.pages import huge_pages

PIECE_BYTES = 8 * 2**20
"""Read at a time, at most."""
READS = 3
"""Under way together: one leaves a fast disk idle between two reads, and more than three gained nothing."""


class Piece(NamedTuple):
    """Bytes of a tensor that are read together."""

    info: TensorInfo
    target: Tensor
    """The whole tensor's."""
    first: int
    """Byte of the tensor as it is stored."""
    nbytes: int

    @property
    def slack(self) -> int:
        """Bytes that a read from a whole unit on brings before the piece."""
        return (self.info.offset + self.first) % UNIT

    def read(self, file: DiskFile, buffer: memoryview) -> None:
        """Bring it to `slack` bytes behind the buffer's begin. Raises `TransferError`."""
        needed = self.slack + self.nbytes
        file.read(buffer[: align_up(needed)], align_down(self.info.offset + self.first), needed)

    def put(self, buffer: Tensor) -> None:
        """Copy it from a buffer, uint8, to its target, cast to the target's dtype."""
        stored, numbers = self.info.dtype, self.target.view(-1)
        come = buffer[self.slack : self.slack + self.nbytes]
        if self.slack % stored.itemsize:
            come = come.clone()  # the format lets tensors begin at any byte, and torch looks at no such numbers
        first = self.first // stored.itemsize
        numbers[first : first + self.nbytes // stored.itemsize].copy_(come.view(stored))


def read_tensors(
    wanted: Sequence[tuple[TensorInfo, Tensor]],
    files: Mapping[Path, DiskFile],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Fill contiguous tensors, of as many numbers as each info has, on any device, casting to their dtype.

    Takes `READS` buffers of `PIECE_BYTES` beside them, smaller ones if no tensor is as large. `progress(done, total)`
    is called as they come, in bytes as stored. Raises `CheckpointError`, naming the tensor, where one can't be read,
    and `MemoryBudgetError` where the system refuses the buffers; nothing is under way any more then.
    """
    pieces = [piece for info, target in wanted for piece in _pieces(info, target)]
    if not pieces:
        return
    done, total = 0, sum(piece.nbytes for piece in pieces)
    room = align_up(max(piece.slack + piece.nbytes for piece in pieces))
    buffers = [_buffer(room) for _ in range(min(READS, len(pieces)))]
    readers = ThreadPoolExecutor(len(buffers), thread_name_prefix="tensor-reader")
    try:
        for piece in _come(pieces, files, buffers, readers):
            done += piece.nbytes
            if progress is not None:
                progress(done, total)
    finally:
        readers.shutdown(cancel_futures=True)


def _come(
    pieces: Iterable[Piece], files: Mapping[Path, DiskFile], buffers: Sequence[Tensor], readers: ThreadPoolExecutor
) -> Iterator[Piece]:
    """Every piece in turn, once it is where it belongs."""
    under_way: deque[tuple[Piece, Tensor, Future[None]]] = deque()
    for piece, buffer in zip(pieces, cycle(buffers), strict=False):
        if len(under_way) == len(buffers):
            yield _finish(*under_way.popleft())  # whose buffer this is
        under_way.append((piece, buffer, readers.submit(piece.read, files[piece.info.path], buffer.numpy().data)))
    while under_way:
        yield _finish(*under_way.popleft())


def _finish(piece: Piece, buffer: Tensor, reading: Future[None]) -> Piece:
    try:
        reading.result()
    except TransferError as error:
        raise CheckpointError(f"tensor {piece.info.name!r}: {error}") from None
    piece.put(buffer)
    return piece


def _pieces(info: TensorInfo, target: Tensor) -> Iterator[Piece]:
    for first in range(0, info.nbytes, PIECE_BYTES):
        yield Piece(info, target, first, min(PIECE_BYTES, info.nbytes - first))


def _buffer(nbytes: int) -> Tensor:
    try:
        return torch.frombuffer(huge_pages(nbytes), dtype=torch.uint8)
    except OSError as error:
        raise MemoryBudgetError(
            f"the system refused {nbytes} bytes to read weights through ({error}); end other programs"
        ) from None
