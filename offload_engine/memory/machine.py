"""What the machine has to give: memory available to this process, control groups included."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil

SHARE = {"cpu": (8, 10), "cuda": (9, 10), "host": (6, 10)}
"""Share of the available memory a budget of "auto" takes, as a fraction: of RAM used as fast memory, of VRAM, and of
RAM used as the host tier, where pinned pages can't be swapped and the rest of the machine has to live with them."""


def auto_budget(available: int, kind: str) -> int:
    """Bytes a budget of "auto" stands for, of `available` bytes; `kind` is a key of `SHARE`."""
    numerator, denominator = SHARE[kind]
    return max(available, 0) * numerator // denominator


class MemoryCap(NamedTuple):
    """A control group that limits this process's memory."""

    group: Path
    limit: int
    left: int
    """What may still be allocated; the page cache of the group counts as free."""


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of RAM that could still be allocated: what the system has, or what this process's control groups leave.

    Page cache counts as available, in the system's reckoning as in that of the control groups. `root` is where `/proc`
    and `/sys` are looked up.
    """
    return min([psutil.virtual_memory().available, *(cap.left for cap in memory_caps(root))])


def memory_caps(root: Path = Path("/")) -> list[MemoryCap]:
    """The limits of the control groups above this process, by cgroup v2 or v1; groups without a limit left out."""
    found = [_cap(group, _V2 if version == 2 else _V1) for version, group in control_groups(root, "memory")]
    return [cap for cap in found if cap is not None]


def control_groups(root: Path, controller: str) -> list[tuple[int, Path]]:
    """Where the groups that hold this process would be: (version, folder), the innermost first.

    Not all of these folders exist: a container may see its own group only at the mount's root.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    mounts = root / "sys/fs/cgroup"
    found: list[tuple[int, Path]] = []
    for line in lines:
        if line.count(":") < 2:
            continue
        controllers, path = line.split(":", 2)[1:]
        own = PurePosixPath(path.lstrip("/"))
        for group in (own, *own.parents):
            if not controllers:
                found += [(2, mount / group) for mount in (mounts, mounts / "unified")]
            elif controller in controllers.split(","):
                found.append((1, mounts / controller / group))
    return found


_V2 = ("memory.max", "memory.current", ("inactive_file", "active_file"))
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


_UNLIMITED = 2**60
"""A limit of v1 from here on, such as 2^63 less a page, is none."""


def _cap(group: Path, names: tuple[str, str, tuple[str, str]]) -> MemoryCap | None:
    """The limit of one control group; None where it has none or isn't there."""
    limit_file, usage_file, cache_keys = names
    try:
        limit, usage = int((group / limit_file).read_text()), int((group / usage_file).read_text())
    except (OSError, ValueError):  # an unlimited group of v2 says "max"
        return None
    if limit >= _UNLIMITED:
        return None
    return MemoryCap(group, limit, max(0, limit - max(0, usage - _file_cache(group, cache_keys))))


def _file_cache(group: Path, keys: tuple[str, str]) -> int:
    try:
        pairs = [line.split() for line in (group / "memory.stat").read_text().splitlines()]
        return sum(int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] in keys)
    except (OSError, ValueError):
        return 0
