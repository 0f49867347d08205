"""Pinning host memory of exactly the size that is there, with `cudaHostRegister`.

torch's own `pin_memory` rounds every size up to a power of two, and pages that it pins are pages that it allocates.
"""

from __future__ import annotations

from typing import Any

CHUNK_BYTES = 2**30
"""Registered at a time: a driver locks the pages of one call in one go, for seconds if there are many."""


def register(address: int, nbytes: int, unit: int, runtime: Any) -> str | None:
    """Pin `nbytes` from `address` on, whole pages, chunk by chunk; all of it, or on a refusal nothing.

    Chunks hold whole units of `unit` bytes, for no copy may span two of them.

    `runtime` has `cudaHostRegister(address, nbytes, flags)` and `cudaHostUnregister(address)`, which return an error
    code, 0 for success; `torch.cuda.cudart()` is one. Returns the reason of a refusal.
    """
    done: list[int] = []
    for start, size in _chunks(address, nbytes, unit):
        error = runtime.cudaHostRegister(start, size, 0)
        if int(error) != 0:
            for begun in reversed(done):
                runtime.cudaHostUnregister(begun)
            return f"cudaHostRegister of {nbytes} bytes failed after {start - address}: {error}"
        done.append(start)
    return None


def unregister(address: int, nbytes: int, unit: int, runtime: Any) -> None:
    """Undo `register` of the same memory."""
    for start, _size in _chunks(address, nbytes, unit):
        runtime.cudaHostUnregister(start)


def _chunks(address: int, nbytes: int, unit: int) -> list[tuple[int, int]]:
    chunk = max(1, CHUNK_BYTES // unit) * unit
    end = address + nbytes
    return [(start, min(chunk, end - start)) for start in range(address, end, chunk)]
