"""Memory that a virtual machine's host has yet to give.

A guest gives its free memory back (virtio's free page reporting), and gets it again page by page as it is touched, at a
fraction of DRAM's rate. Whoever runs first would pay for that, and the next would not.
"""

from __future__ import annotations

import time

import torch

from offload_engine.memory.machine import available_memory
from offload_engine.pages import huge_pages, touch

SHARE = 0.85
"""Of the memory that there is; all of it would be the peak that a control group reports."""
PAGE = 2 * 2**20
"""Bytes of a huge page."""


def touch_memory(nbytes: int) -> float | None:
    """Touch `nbytes` of fresh memory, or `SHARE` of what is available if that is less, and give it back to the kernel.

    Bytes per second; None where there was nothing to touch, or the system refused it.
    """
    nbytes = int(min(nbytes, SHARE * available_memory())) // PAGE * PAGE
    if nbytes <= 0:
        return None
    try:
        memory = torch.frombuffer(huge_pages(nbytes), dtype=torch.uint8)
    except (OSError, OverflowError):
        return None
    began = time.perf_counter()
    given = touch(memory)
    return nbytes / (time.perf_counter() - began) if given else None
