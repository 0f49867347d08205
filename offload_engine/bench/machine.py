"""What a benchmark ran on, in a few facts that a reader of its numbers needs. Torch-free."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path

import psutil

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "i8mm")
"""Of the processor's features, those that decide how fast a product can be."""


def describe_machine() -> dict[str, str | float | list[str]]:
    """Processor, cores, memory, system, versions, and how busy the machine was when asked."""
    name, flags = processor()
    return {
        "processor": name or platform.processor() or platform.machine(),
        "features": [flag for flag in FLAGS if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "unset"),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0,
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Its name and features as Linux lists them, of Arm the features alone; empty elsewhere."""
    name, flags = "", set[str]()
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip().lower() in ("flags", "features"):
                flags = set(value.split())
    return name, flags
