"""What the machine has to give: memory available to this process, control groups included."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import psutil

SHARE = {"cpu": (8, 10), "cuda": (9, 10), "host": (6, 10)}
"""Share of the available memory a budget of "auto" takes, as a fraction: of RAM used as fast memory, of VRAM, and of
RAM used as the host tier, where pinned pages can't be swapped and the rest of the machine has to live with them."""


def auto_budget(available: int, kind: str) -> int:
    """Bytes a budget of "auto" stands for, of `available` bytes; `kind` is a key of `SHARE`."""
    numerator, denominator = SHARE[kind]
    return max(available, 0) * numerator // denominator


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that could still be allocated: what the system has, or what this process's control groups leave.

    Page cache counts as available, in the system's reckoning as in that of the control groups. `root` is where `/proc`
    and `/sys` are looked up.
    """
    return min([psutil.virtual_memory().available, *_cgroup_headrooms(root)])


def _cgroup_headrooms(root: Path) -> list[int]:
    """What each control group above this process leaves, by cgroup v2 or v1; groups without a limit left out."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    mounts = root / "sys/fs/cgroup"
    headrooms: list[int | None] = []
    for line in lines:
        if line.count(":") < 2:
            continue
        controllers, path = line.split(":", 2)[1:]
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):  # a container may see its own group only at the mount's root
            if not controllers:
                headrooms += [_headroom(mount / group, _V2) for mount in (mounts, mounts / "unified")]
            elif "memory" in controllers.split(","):
                headrooms.append(_headroom(mounts / "memory" / group, _V1))
    return [headroom for headroom in headrooms if headroom is not None]


_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def _headroom(group: Path, names: tuple[str, str, tuple[str, str]]) -> int | None:
    """Bytes left in one control group; None where it has no limit or isn't there."""
    limit_file, usage_file, cache_keys = names
    try:
        limit, usage = int((group / limit_file).read_text()), int((group / usage_file).read_text())
    except (OSError, ValueError):  # an unlimited group of v2 says "max"; v1 says a number larger than any memory
        return None
    return max(0, limit - max(0, usage - _file_cache(group, cache_keys)))


def _file_cache(group: Path, keys: tuple[str, str]) -> int:
    try:
        pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in keys)
    except (OSError, ValueError):
        return 0
