"""Runs of contenders, made up."""

from __future__ import annotations

from typing import Any

from offload_engine.bench.report import Conditions
from offload_engine.bench.spec import Bandwidth, Measured, Report, Run, Workload

MACHINE = {
    "processor": "Abacus 9",
    "features": ["avx2"],
    "cores": 2,
    "memory": 24 * 10**9,
    "system": "Linux 6",
    "torch": "2.13.0",
    "omp_num_threads": "1",
    "load_average": 0.1,
}
BANDWIDTH = Bandwidth(slab_bytes=4096, disk={1: 1e6, 2: 2e6}, direct=True, dram=1e9, gemm=1e9)


def measured(step: float = 1.0, **changes: Any) -> Measured:
    """Four steps around `step` seconds of a contender without our executor, half of them attention."""
    values: dict[str, Any] = {
        "step_seconds": [step * share for share in (0.8, 1.0, 1.0, 1.2)],
        "seconds": {"attention": 2 * step, "dense": 0.4 * step, "experts": 0.8 * step, "head": 0.2 * step},
        "window_seconds": 5 * step,
        "tokens": 32,
        "requests": 40,
        "unique_experts": 10.0,
        "expert_bytes": 1000,
        "disk_bytes": 40_400,
        "peak_bytes": 950,
        "answer": "same",
        "startup_seconds": 1.5,
        "step_bytes": 1e8,
        "step_flops": 2e8,
    }
    return Measured(**values | changes)


def ours(step: float = 1.0, **changes: Any) -> Measured:
    """The same of our executor: 40 loads where Belady needs 20, and 10 % of the time waited."""
    values: dict[str, Any] = {
        "seconds": {"attention": 2 * step, "dense": 0.4 * step, "experts": 0.8 * step, "head": 0.2 * step}
        | {"stall": 0.4 * step},
        "loads": 40,
        "bytes_moved": 40_000,
        "belady_misses": 20,
        "missed_bytes": 40_000,
        "early_bytes": 10_000,
        "hidden_bytes": 30_000.0,
        "slots": 12,
        "planned_bytes": 1000,
        "resident_weights": 4_000_000,
        "stats": {},
    }
    return measured(step, **values | changes)


def run(name: str, found: Measured | Bandwidth | str, number: int = 1, **changes: Any) -> Run:
    if isinstance(found, str):
        report = Report(error=found)
    else:
        report = Report(measured=found) if isinstance(found, Measured) else Report(bandwidth=found)
    return Run(task=name, round=number, report=report, seconds=9.0, **changes)


def conditions(**changes: Any) -> Conditions:
    values: dict[str, Any] = {
        "model": "abacus",
        "machine": MACHINE,
        "workload": Workload(),
        "limit": 10**9,
        "absent": {},
    }
    return Conditions(**values | changes)
