"""Memory in large pages where the system has them, and how it is had before anybody waits for it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from torch import Tensor

POPULATE_WRITE = 23
"""`MADV_POPULATE_WRITE` of Linux's madvise, which Python's mmap doesn't name."""

PIECE_BYTES = 8 * 2**20
"""Populated at a time. Meanwhile the process can neither map memory nor begin a thread, and a virtual machine whose
host has yet to find the memory takes .3 s for 100 MB.
"""

PATIENCE = 1.0
"""Seconds for which the kernel may be out of breath before its refusal counts."""


def huge_pages(nbytes: int) -> mmap.mmap:
    """`nbytes` of private memory, zeros until written to, not taken from the system before; in huge pages if there are
    any: products that run through weights then spend less on address translation, and leave its caches to others.

    Raises `OSError` or `OverflowError` where the system refuses.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages: slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class Toucher:
    """Has the system give whole pages, uint8, piece by piece on a thread of its own: gigabytes of fresh ones take
    seconds, in which others can use them already, for what the pages hold is left alone.

    Where the kernel knows no such way (Linux before 5.14), zeros are written to them before this returns.
    """

    def __init__(self, memory: Tensor) -> None:
        self._stopping = False
        self._refused = 0
        """Bytes that the system did not give when asked."""
        if not _populate(memory[: mmap.PAGESIZE]):
            _write_pages(memory)
            memory = memory[:0]
        self._thread = threading.Thread(target=self._touch, args=(memory,), name="page-toucher", daemon=True)
        self._thread.start()

    def wait(self) -> int:
        """Until all pages are there, or no more are wanted; returns the bytes that the system has refused."""
        self._thread.join()
        return self._refused

    def stop(self) -> None:
        """Want no more, and wait for the piece that is under way. Idempotent."""
        self._stopping = True
        self._thread.join()

    def _touch(self, memory: Tensor) -> None:
        self._refused = _populate_all(memory, lambda: self._stopping)


def touch(memory: Tensor) -> bool:
    """Have the system give these whole pages, uint8, which nobody uses yet; False where it refuses some of them."""
    if _populate(memory[: mmap.PAGESIZE]):
        return _populate_all(memory, lambda: False) == 0
    _write_pages(memory)
    return True


def _populate_all(memory: Tensor, stopping: Callable[[], bool]) -> int:
    """Populate piece by piece until that is `stopping`; returns the bytes that the system refused."""
    touched = 0
    while touched < memory.numel() and not stopping():
        piece = memory[touched : touched + PIECE_BYTES]
        if not _populate(piece):
            return memory.numel() - touched
        touched += piece.numel()
    return 0


def _write_pages(memory: Tensor) -> None:
    """Take pages where the kernel knows no better way than a write to each. A refusal is then a signal, and the end."""
    memory[:: mmap.PAGESIZE] = 0


def _populate(memory: Tensor) -> bool:
    """Have the kernel map these whole pages, as a write would, but leaving what they hold alone; False where it can't
    (Linux before 5.14, or there is no memory). Holds no interpreter lock.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    address, nbytes = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel())
    began = time.monotonic()
    while libc.madvise(address, nbytes, POPULATE_WRITE) != 0:
        if ctypes.get_errno() not in (errno.EAGAIN, errno.EINTR) or time.monotonic() - began > PATIENCE:
            return False
        time.sleep(0.001)
    return True
