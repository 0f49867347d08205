"""Runs a command in a memory control group of its own.

The limit covers what the command and its children allocate and the page cache they fill, and there is no swap beside
it: past the limit the kernel drops page cache, and then kills. Linux only, cgroup v1 or v2, and only where this process
may create groups below its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from offload_engine.errors import OffloadError

JOIN_AND_RUN = 'echo $$ > "$0" && exec "$@"'
"""A shell that enters the group before it becomes the command, so that not one of the command's pages is left out."""
REMOVAL_SECONDS = 10.0
"""A group may be busy for a moment after its last process has gone."""


class CgroupUnavailableError(OffloadError):
    """Memory may not be limited by a control group here; the message says why."""


class Hierarchy(NamedTuple):
    """How a version of control groups names its files."""

    version: int
    limit: str
    swap: str
    peak: str
    kills: str
    """The file with a line `oom_kill N`."""


V1 = Hierarchy(
    1, "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"
)
V2 = Hierarchy(2, "memory.max", "memory.swap.max", "memory.peak", "memory.events")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group that holds a limited command."""

    path: Path
    hierarchy: Hierarchy

    @property
    def limit(self) -> int:
        """Bytes; the kernel rounds to whole pages."""
        return int((self.path / self.hierarchy.limit).read_text())

    @property
    def peak(self) -> int | None:
        """The most bytes in use at once, page cache included; None where the kernel doesn't tell."""
        try:
            return int((self.path / self.hierarchy.peak).read_text())
        except OSError:
            return None

    @property
    def oom_kills(self) -> int:
        """Processes of the group that the kernel killed for want of memory."""
        lines = (self.path / self.hierarchy.kills).read_text().splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)

    def command(self, command: Sequence[str]) -> list[str]:
        """What to start for `command` to run in here."""
        return ["/bin/sh", "-c", JOIN_AND_RUN, str(self.path / "cgroup.procs"), *command]


class Limited(NamedTuple):
    """How a limited command ended."""

    returncode: int
    """As of `subprocess`: minus the signal that killed it, if one did."""
    limit: int
    peak: int | None
    oom_kills: int
    output: str
    """What it wrote to stdout; empty unless captured."""


@contextlib.contextmanager
def memory_group(limit: int, root: Path = Path("/")) -> Iterator[MemoryGroup]:
    """A new control group of at most `limit` bytes, below this process's own; what runs in it at the end is killed.

    Raises `CgroupUnavailableError`. `root` is where `/proc` and `/sys` are looked up.
    """
    parent, hierarchy = _parent(root)
    path = parent / f"memory-cgroup-{os.getpid()}-{uuid.uuid4().hex[:12]}"
    try:
        path.mkdir()
    except OSError as error:
        raise CgroupUnavailableError(f"{path} can't be made ({error.strerror}): run as root, or unlimited") from None
    try:
        _set_limit(path, hierarchy, limit)
        yield MemoryGroup(path, hierarchy)
    finally:
        _remove(path)


def run_limited(
    command: Sequence[str], limit: int, *, capture: bool = False, cwd: Path | None = None, timeout: float | None = None
) -> Limited:
    """Run `command` to its end within `limit` bytes of memory.

    Raises `CgroupUnavailableError`, and `subprocess.TimeoutExpired` once it has been killed for taking `timeout`
    seconds.
    """
    with memory_group(limit) as group:
        stdout = subprocess.PIPE if capture else None
        ran = subprocess.run(group.command(command), stdout=stdout, cwd=cwd, timeout=timeout, text=True, check=False)
        return Limited(ran.returncode, group.limit, group.peak, group.oom_kills, ran.stdout or "")


def _parent(root: Path) -> tuple[Path, Hierarchy]:
    """The nearest group, from this process's own upwards, whose children may be given a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        raise CgroupUnavailableError("this system has no /proc/self/cgroup: control groups are Linux's") from None
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    mounts = root / "sys/fs/cgroup"
    for controllers, path in paths.items():
        if "memory" in controllers.split(","):
            group = _nearest(mounts / "memory", path, V1)
            if group is not None:
                return group, V1
    for mount in (mounts, mounts / "unified"):
        group = _nearest(mount, paths.get("", "/"), V2)
        if group is not None:
            return group, V2
    raise CgroupUnavailableError(
        f"no control group of this process (of {mounts}) lets it limit the memory of a child: the memory controller is "
        "absent, not delegated (cgroup.subtree_control), or read-only; run as root outside a container, or unlimited"
    )


def _nearest(mount: Path, path: str, hierarchy: Hierarchy) -> Path | None:
    own = PurePosixPath(path.lstrip("/"))
    for relative in (own, *own.parents):  # a container may see its own group only at the mount's root
        group = mount / relative
        if os.access(group, os.W_OK) and os.access(group / "cgroup.procs", os.W_OK) and _delegates(group, hierarchy):
            return group
    return None


def _delegates(group: Path, hierarchy: Hierarchy) -> bool:
    if hierarchy.version == 1:
        return (group / hierarchy.limit).exists()
    try:
        return "memory" in (group / "cgroup.subtree_control").read_text().split()
    except OSError:
        return False


def _set_limit(path: Path, hierarchy: Hierarchy, limit: int) -> None:
    try:
        (path / hierarchy.limit).write_text(str(limit))
    except OSError as error:
        raise CgroupUnavailableError(f"{path / hierarchy.limit} refuses {limit} bytes ({error.strerror})") from None
    if (path / hierarchy.swap).exists():  # absent where the kernel does not count swap
        with contextlib.suppress(OSError):
            (path / hierarchy.swap).write_text(str(limit) if hierarchy.version == 1 else "0")


def _remove(path: Path) -> None:
    """Kill what is left in the group and remove it. Raises `OffloadError` if it does not go."""
    patience = time.monotonic() + REMOVAL_SECONDS
    while True:
        for process in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        try:
            path.rmdir()
            return
        except OSError as error:
            if time.monotonic() > patience:
                raise OffloadError(f"{path} can't be removed ({error.strerror}); remove it with rmdir") from None
        time.sleep(0.05)
