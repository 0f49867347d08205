"""RAM and what limits it: control groups, ulimits, pinning, huge pages. Torch-free; readers take the root of /proc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from offload_engine.config import format_bytes
from offload_engine.doctor.finding import Finding, Level
from offload_engine.memory.machine import MemoryCap, control_groups

LITTLE = 2 * 10**9
"""RAM below which no published model of this kind runs: the weights outside the experts alone take most of it."""


def check_ram(total: int, available: int) -> Finding:
    """RAM of the machine, control groups left aside."""
    found = f"{format_bytes(available)} available of {format_bytes(total)}"
    if available < LITTLE:
        return Finding("RAM", found, Level.WARNING, "hardly any model but the built-in one fits: free some memory")
    return Finding("RAM", found)


def check_caps(caps: Sequence[MemoryCap], throttles: Sequence[int]) -> Finding:
    """Limits of control groups. `throttles`: those past which v2 slows a process down (memory.high) instead of ending
    it; plans don't go by them.
    """
    if throttles and (not caps or min(throttles) < min(cap.limit for cap in caps)):
        return Finding(
            "control groups",
            f"memory.high throttles this process from {format_bytes(min(throttles))} on",
            Level.WARNING,
            f"keep --gpu-mem below {format_bytes(min(throttles))}, or raise memory.high (systemd: MemoryHigh=)",
        )
    if not caps:
        return Finding("control groups", "no limit on memory")
    tightest = min(caps, key=lambda cap: cap.left)
    found = f"{format_bytes(tightest.left)} left of {format_bytes(tightest.limit)}"
    if tightest.left < LITTLE:
        way_out = "raise the limit (systemd: MemoryMax=, docker: --memory)"
        return Finding("control groups", found, Level.WARNING, way_out)
    return Finding("control groups", f"{found}; --gpu-mem auto goes by it")


def check_address_space(limits: Mapping[str, int | None], total: int) -> Finding:
    """Limits of the shell, by the letter `ulimit` knows them under; None: unlimited. `total`: bytes of RAM."""
    tight = [f"ulimit -{letter} is {format_bytes(limit)}" for letter, limit in limits.items() if limit is not None]
    if not limits:
        return Finding("ulimits", "this system has none")
    if not tight:
        return Finding("ulimits", f"no limit on memory (ulimit {' '.join(f'-{letter}' for letter in limits)})")
    reserved = any(limit is not None and limit < 2 * total for limit in limits.values())
    if not reserved:
        return Finding("ulimits", f"{', '.join(tight)}, beyond the RAM there is")
    return Finding(
        "ulimits",
        ", ".join(tight),
        Level.WARNING,
        "libraries reserve far more addresses than they use, and threads fail to start: "
        f"{'; '.join(f'ulimit -{letter} unlimited' for letter in limits)}",
    )


def check_locked(limit: int | None, wanted: int | None, windows_kernel: bool) -> Finding:
    """How much memory may be pinned for copies to a GPU. `limit` None: any; `wanted` None: there is no GPU;
    `windows_kernel`: this Linux runs under WSL.
    """
    found = "unlimited" if limit is None else f"{format_bytes(limit)} (ulimit -l)"
    if wanted is None:
        return Finding("pinned memory", f"{found}; no GPU that would need it")
    if windows_kernel:
        return Finding(
            "pinned memory",
            f"{found}; WSL lets at most half of its memory be pinned",
            Level.WARNING,
            "give WSL more in .wslconfig (memory=), or lower --host-mem; what can't be pinned is copied more slowly",
        )
    if limit is not None and limit < wanted:
        return Finding(
            "pinned memory",
            f"{found}, but the plan pins {format_bytes(wanted)}",
            Level.WARNING,
            "ulimit -l unlimited (limits.conf: memlock, systemd: LimitMEMLOCK=, docker: --ulimit memlock=-1); "
            "where pinning is refused copies are slower",
        )
    return Finding("pinned memory", found)


def check_huge_pages(setting: str | None) -> Finding:
    """`setting`: what /sys/kernel/mm/transparent_hugepage/enabled says, the choice in brackets; None: absent."""
    if setting is None:
        return Finding("huge pages", "this system doesn't say")
    chosen = setting.partition("[")[2].partition("]")[0] or setting.strip()
    if chosen in ("always", "madvise"):
        return Finding("huge pages", f"{chosen}: expert slots get them")
    return Finding(
        "huge pages",
        f"{chosen}: expert slots do without, which costs some speed",
        Level.WARNING,
        "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled",
    )


def read_throttles(root: Path = Path("/")) -> list[int]:
    """`memory.high` of the control groups of this process, where set."""
    found = []
    for version, group in control_groups(root, "memory"):
        text = read_setting(group / "memory.high") if version == 2 else None
        if text is not None and text.strip().isdigit():
            found.append(int(text))
    return found


def read_ulimits() -> dict[str, int | None]:
    """Limits on this process: v(irtual memory), d(ata), l(ocked memory), in bytes; empty where there are none."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    kinds = {"v": resource.RLIMIT_AS, "d": resource.RLIMIT_DATA, "l": resource.RLIMIT_MEMLOCK}
    soft = {letter: resource.getrlimit(kind)[0] for letter, kind in kinds.items()}
    return {letter: None if limit in (resource.RLIM_INFINITY, -1) else limit for letter, limit in soft.items()}


def read_setting(path: Path) -> str | None:
    """A small file of the kernel; None where it isn't there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
