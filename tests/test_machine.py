"""Memory that is available, as control groups of either version see it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from offload_engine.memory import available_memory
from offload_engine.memory.machine import MemoryCap, memory_caps

MB = 10**6


def group(folder: Path, *, v2: bool, limit: int | str, usage: int, cache: tuple[int, int] = (0, 0)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if v2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if v2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(
        f"anon 5\n{prefix}inactive_file {cache[0]}\n{prefix}active_file {cache[1]}\nmalformed\n"
    )


def belongs_to(root: Path, *lines: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))


def test_v2_takes_the_tightest_of_the_groups_above(tmp_path: Path) -> None:
    belongs_to(tmp_path, "0::/user/session")
    mount = tmp_path / "sys/fs/cgroup"
    group(mount / "user/session", v2=True, limit=900 * MB, usage=100 * MB)
    group(mount / "user", v2=True, limit=1000 * MB, usage=700 * MB, cache=(30 * MB, 20 * MB))
    group(mount, v2=True, limit="max", usage=999 * MB)
    assert available_memory(tmp_path) == 350 * MB, "1000 - 700 in use, of which 50 are page cache"
    assert memory_caps(tmp_path) == [
        MemoryCap(mount / "user/session", 900 * MB, 800 * MB),
        MemoryCap(mount / "user", 1000 * MB, 350 * MB),
    ]


def test_v1_finds_the_limit_at_the_mount_of_a_container(tmp_path: Path) -> None:
    belongs_to(tmp_path, "9:name=systemd:/", "4:cpu,memory:/docker/abc", "0::/")
    group(tmp_path / "sys/fs/cgroup/memory", v2=False, limit=512 * MB, usage=212 * MB, cache=(10 * MB, 2 * MB))
    assert available_memory(tmp_path) == 312 * MB


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    belongs_to(tmp_path, "0::/")
    group(tmp_path / "sys/fs/cgroup", v2=True, limit=100 * MB, usage=150 * MB)
    assert available_memory(tmp_path) == 0


def test_a_hybrid_mount(tmp_path: Path) -> None:
    belongs_to(tmp_path, "0::/x")
    group(tmp_path / "sys/fs/cgroup/unified/x", v2=True, limit=100 * MB, usage=1)
    assert available_memory(tmp_path) == 100 * MB - 1


@pytest.mark.parametrize("limit", ["max", 2**63 - 4096, "nonsense"])
def test_without_a_limit_it_is_what_the_system_has(
    tmp_path: Path, limit: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: frozen)
    belongs_to(tmp_path, "1:memory:/", "0::/../elsewhere", "rubbish")
    group(tmp_path / "sys/fs/cgroup", v2=True, limit=limit, usage=5)
    group(tmp_path / "sys/fs/cgroup/memory", v2=False, limit=limit, usage=5)
    assert available_memory(tmp_path) == frozen.available
    assert memory_caps(tmp_path) == []


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert memory_caps(tmp_path) == []
    assert available_memory(tmp_path) > 0


def test_this_machine() -> None:
    assert 0 < available_memory() <= psutil.virtual_memory().total
