"""The disk that experts are read from: how fast, past the page cache or not, and how much is free."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload_engine.config import format_bytes
from offload_engine.disk_file import DiskFile
from offload_engine.doctor.finding import Finding, Level
from offload_engine.pages import huge_pages

PIECE = 6 * 2**20
"""Bytes of a read, about an expert of LLaDA2.0-mini."""
LEAST_SAMPLE = 64 * 2**20
"""A file must be this large to tell how fast a disk is."""
SECONDS = 0.5
"""How long the disk is read."""
SLOW = 500e6
"""Bytes per second of a SATA disk, below which most steps of a model larger than memory wait."""
LITTLE = 10**9


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """What a short read gave."""

    file: Path
    direct: bool
    """Whether it went past the page cache."""
    rate: float
    """Bytes per second, one read of an expert's size after the other."""


def check_space(folder: Path, free: int, converted: int | None) -> Finding:
    """`converted`: bytes that a converted copy of the model would take; None where that is unknown."""
    found = f"{format_bytes(free)} in {folder}"
    if free < LITTLE:
        return Finding("free space", found, Level.WARNING, "traces, results and hot sets may be cut short: free some")
    if converted is not None and free < converted:
        return Finding("free space", f"{found}; too little for dmoe convert, which writes {format_bytes(converted)}")
    return Finding("free space", found)


def check_direct(direct: bool, file: Path) -> Finding:
    """Whether reads go past the page cache."""
    if direct:
        return Finding("direct reads", "O_DIRECT works")
    return Finding(
        "direct reads",
        f"the file system of {file.parent} refuses O_DIRECT",
        Level.WARNING,
        "reads go through the page cache, at more CPU time, and are dropped from it; keep the model on a local ext4, "
        "xfs or btrfs",
    )


def check_speed(speed: DiskSpeed) -> Finding:
    """Whether the disk is fast enough for experts to be fetched while a step runs."""
    found = f"{format_bytes(int(speed.rate))}/s, {format_bytes(PIECE)} at a time, from {speed.file}"
    if speed.rate < SLOW:
        return Finding(
            "disk speed",
            found,
            Level.WARNING,
            "steps will wait for experts: keep the model on an NVMe disk, give --gpu-mem more, or move fewer bytes "
            "(dmoe convert --experts int4, --routing dmoe)",
        )
    return Finding("disk speed", found)


def read_speed(file: Path, seconds: float = SECONDS) -> DiskSpeed:
    """Read `file` from its beginning, as the engine reads experts, until its end or for `seconds`.

    Raises `CheckpointError` where it can't be opened, `TransferError` where it can't be read.
    """
    size = file.stat().st_size
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as handle:  # what another program left in memory says nothing about the disk
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with closing(DiskFile(file, size, head=min(size, mmap.PAGESIZE))) as opened, huge_pages(PIECE) as memory:
        with memoryview(memory) as target:
            began, done = time.perf_counter(), 0
            while done < size and time.perf_counter() - began < seconds:
                done += opened.read(target, done, min(PIECE, size - done))
            took = time.perf_counter() - began
        return DiskSpeed(file, opened.direct, done / max(took, 1e-9))


@contextmanager
def sample_file(directory: Path) -> Iterator[Path]:
    """The largest file of weights in `directory`; a temporary one where all are too small. Lets `OSError` by."""
    files = [file for pattern in ("*.safetensors", "*.packed") for file in directory.glob(pattern)]
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    if largest is not None and largest.stat().st_size >= LEAST_SAMPLE:
        yield largest
        return
    with tempfile.NamedTemporaryFile(prefix="dmoe-doctor-") as temporary:
        for _ in range(LEAST_SAMPLE // 2**20):
            temporary.write(os.urandom(2**20))  # file systems that compress don't get away with zeros
        temporary.flush()
        os.fsync(temporary.fileno())
        yield Path(temporary.name)


def free_space(folder: Path) -> int:
    """Bytes that this user may still write there. Lets `OSError` by."""
    return shutil.disk_usage(folder).free
