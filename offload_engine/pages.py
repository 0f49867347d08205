"""Memory for weights, in large pages where the system has them."""

from __future__ import annotations

import mmap
from contextlib import suppress


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
