"""The processor, the kernels it runs, and the threads that share it. Torch-free; readers take the root of /proc."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from offload_engine.bench.machine import FLAGS
from offload_engine.doctor.finding import Finding, Level
from offload_engine.memory.machine import control_groups

ARM_BASELINE = "asimd"
X86_BASELINE = "avx2"


def check_processor(name: str, features: Collection[str]) -> Finding:
    """What the processor can do for products of 16-bit numbers; `features` as /proc/cpuinfo names them."""
    known = [flag for flag in FLAGS if flag in features]
    found = f"{name or 'unnamed'}: {' '.join(known) or 'no vector features known to us'}"
    if not features:
        return Finding("processor", f"{name or 'unnamed'}: this system doesn't list its features")
    if X86_BASELINE in features or ARM_BASELINE in features:
        return Finding("processor", found)
    return Finding(
        "processor",
        found,
        Level.WARNING,
        "without avx2 (x86) or asimd (Arm) products are several times slower; if this is a virtual machine, have it "
        "pass the host's processor through",
    )


def check_kernels(variant: str | None, reason: str) -> Finding:
    """What computes experts on the CPU, as `kernels.status()` says."""
    if variant is not None:
        return Finding("CPU kernels", f"{variant}: {reason}")
    way_out = "unset OFFLOAD_ENGINE_KERNEL" if "is off" in reason else "it needs a C compiler, such as gcc"
    return Finding("CPU kernels", f"torch computes experts, more slowly: {reason}", Level.WARNING, way_out)


@dataclass(frozen=True, slots=True)
class Threads:
    """Who wants the processors."""

    compute: int
    """Threads of a run."""
    allowed: int
    """Processors this process may run on."""
    quota: float | None
    """Processors' worth of time its control groups allow; None where they don't limit it."""
    load: float
    """Tasks that ran or waited to, averaged over the last minute."""
    spinning: bool
    """Whether a compute thread that waits keeps its processor."""

    @property
    def processors(self) -> float:
        """What there is to share."""
        return self.allowed if self.quota is None else min(self.allowed, self.quota)


def check_threads(threads: Threads) -> Finding:
    """Whether compute threads will get a processor each.

    libgomp's threads spin at the end of every parallel section. Where one of them has lost its processor to other work
    all others wait for it, which on two busy cores has made a step 25 times as long.
    """
    quota = "" if threads.quota is None else f", {threads.quota:g} by control group"
    found = f"{threads.compute} for compute; {threads.allowed} processors allowed{quota}; load {threads.load:.1f}"
    fitting = max(1, int(threads.processors))
    if threads.compute > fitting:
        return Finding(
            "threads", found, Level.WARNING, f"more threads than processors wait for each other: --threads {fitting}"
        )
    if threads.compute > 1 and threads.spinning and threads.load + threads.compute > threads.processors + 0.5:
        fewer = max(1, int(threads.processors - threads.load))
        return Finding(
            "threads",
            found,
            Level.WARNING,
            f"other work keeps processors busy, and waiting threads spin: end it, use --threads {fewer}, or set "
            "OMP_WAIT_POLICY=passive (libgomp: GOMP_SPINCOUNT=0)",
        )
    return Finding("threads", found)


def spins(environment: Mapping[str, str]) -> bool:
    """Whether waiting OpenMP threads keep their processors, as libgomp reads its variables."""
    passive = environment.get("OMP_WAIT_POLICY", "").strip().lower() == "passive"
    return not passive and environment.get("GOMP_SPINCOUNT", "").strip() != "0"


def read_threads(compute: int, root: Path = Path("/")) -> Threads:
    """Who wants the processors now, beside a run of `compute` threads."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return Threads(compute, allowed, cpu_quota(root), load, spins(os.environ))


def cpu_quota(root: Path) -> float | None:
    """Processors' worth of time that the control groups of this process allow, by v2 or v1; None without a limit."""
    quotas = [_quota(version, group) for version, group in control_groups(root, "cpu")]
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota(version: int, group: Path) -> float | None:
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((group / name).read_text() for name in names).split()
        share = int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # v2 says "max 100000" where there is no limit
        return None
    return share if share > 0 else None  # v1 says -1
