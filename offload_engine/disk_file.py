"""A file of weights: read past the page cache, at any place, by any thread, and watched for changes."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
from pathlib import Path

from offload_engine.errors import CheckpointError, TransferError

UNIT = 4096
"""Direct reads begin and end on multiples of this, in bytes, in the file as in memory."""


def align_down(offset: int) -> int:
    """The last multiple of `UNIT` not above `offset`."""
    return offset - offset % UNIT


def align_up(offset: int) -> int:
    """The first multiple of `UNIT` not below `offset`."""
    return align_down(offset + UNIT - 1)


def read_nothing_ahead(descriptor: int) -> None:
    """Have the kernel read of a file what is asked for, and no more."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)


def drop_page_cache(descriptor: int, offset: int, nbytes: int) -> None:
    """Ask the kernel to forget these bytes of a file, so that a memory budget means what it says."""
    if nbytes and hasattr(os, "posix_fadvise"):  # a length of 0 would mean the whole file
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)


class DiskFile:
    """A file open for reading: with direct I/O where the file system knows it, else through the page cache and dropped
    from it at once.

    A file that is deleted or replaced while open stays readable as it was. One that is written to is refused as soon as
    its size or its head has changed; `generation` counts the writes that left both as they were.
    """

    def __init__(self, path: Path, size: int, head: int, direct: bool = True) -> None:
        """`size` and `head` in bytes: of the whole file, and of what says where everything in it is.

        Raises `CheckpointError` when the file can't be opened or its head can't be read.
        """
        self.path = path
        self.size = size
        self.generation = 0
        self._head_bytes = head
        self._changing = threading.Lock()
        try:
            descriptor = _open_direct(path) if direct else None
            self.direct = descriptor is not None
            self._descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        except OSError as error:
            raise CheckpointError(f"{path}: can't be opened ({error.strerror}); was it moved?") from None
        if not self.direct:
            read_nothing_ahead(self._descriptor)
        try:
            self._stamp = os.fstat(self._descriptor).st_mtime_ns
            self._head = self._head_digest()
        except (OSError, TransferError) as error:
            self.close()
            raise CheckpointError(f"{path}: can't be read ({_reason(error)})") from None

    def read(self, target: memoryview, offset: int, needed: int) -> int:
        """Fill `target` from `offset` of the file, both multiples of `UNIT`; returns the bytes read.

        The file may end before `target` does, but not before `needed` bytes. Blocks without holding the interpreter
        lock. Raises `TransferError`, naming the file, when it is short, has changed, or the disk reports an error.
        """
        try:
            self._check_unchanged()
            return self._fill(target, offset, needed)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise MemoryError(f"{self.path}: {_reason(error)}") from None
            raise TransferError(f"{self.path} can't be read ({_reason(error)})") from None

    def close(self) -> None:
        """Close the file, after the last `read` has returned; once."""
        os.close(self._descriptor)

    def _check_unchanged(self) -> None:
        status = os.fstat(self._descriptor)
        if status.st_size != self.size:
            raise TransferError(
                f"{self.path} has {status.st_size} bytes, but {self.size} when opened; load the model again"
            )
        if status.st_mtime_ns == self._stamp:
            return
        with self._changing:
            if self._head_digest() != self._head:
                raise TransferError(f"{self.path} has another header than when opened; load the model again")
            if status.st_mtime_ns != self._stamp:
                self.generation += 1  # first: who sees the new stamp looks no further
                self._stamp = status.st_mtime_ns

    def _head_digest(self) -> bytes:
        buffer = memoryview(mmap.mmap(-1, max(UNIT, align_up(self._head_bytes))))
        self._fill(buffer, 0, self._head_bytes)
        return hashlib.sha256(buffer[: self._head_bytes]).digest()

    def _fill(self, target: memoryview, offset: int, needed: int) -> int:
        got = 0
        while got < needed:
            # Where a direct read stopped short of a whole unit, the next one has to begin that unit again.
            start = align_down(got) if self.direct else got
            count = os.preadv(self._descriptor, [target[start:]], offset + start)
            if start + count <= got:
                raise TransferError(f"{self.path} gave {got} bytes at offset {offset}, wanted {needed}")
            got = start + count
        if not self.direct:
            drop_page_cache(self._descriptor, offset, len(target))
        return got


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _open_direct(path: Path) -> int | None:
    """Open for direct I/O, proved by a first read; None where the file system refuses it."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    try:
        os.preadv(descriptor, [mmap.mmap(-1, UNIT)], 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
