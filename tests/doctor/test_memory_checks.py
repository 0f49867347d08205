"""Memory and what limits it, on machines other than this one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from offload_engine.doctor.finding import Level
from offload_engine.doctor.memory import (
    check_address_space,
    check_caps,
    check_huge_pages,
    check_locked,
    check_ram,
    read_setting,
    read_throttles,
    read_ulimits,
)
from offload_engine.doctor.plan import check_plan
from offload_engine.memory import MemoryPlan, Setup, plan_memory
from offload_engine.memory.machine import MemoryCap
from tests.mini_config import mini

GB = 10**9


def cap(limit: int, left: int) -> MemoryCap:
    return MemoryCap(Path("group"), limit, left)


def test_ram() -> None:
    assert check_ram(16 * GB, 12 * GB).level is Level.OK
    assert check_ram(16 * GB, GB).level is Level.WARNING


def test_caps_tell_the_tightest() -> None:
    assert check_caps([], []).found == "no limit on memory"
    roomy = check_caps([cap(8 * GB, 7 * GB), cap(16 * GB, 5 * GB)], [])
    assert roomy.level is Level.OK
    assert roomy.found.startswith("5.00 GB left of 16.0 GB")
    assert check_caps([cap(8 * GB, GB)], []).level is Level.WARNING


def test_a_throttle_below_the_limit_is_told() -> None:
    throttled = check_caps([cap(8 * GB, 7 * GB)], [6 * GB])
    assert throttled.level is Level.WARNING
    assert "below 6.00 GB" in throttled.way_out
    assert check_caps([], [6 * GB]).level is Level.WARNING
    assert check_caps([cap(4 * GB, 3 * GB)], [6 * GB]).level is Level.OK, "the limit comes first"


def test_throttles_are_those_of_v2(tmp_path: Path) -> None:
    assert read_throttles(tmp_path) == []
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/a\n0::/a\n")
    group = tmp_path / "sys/fs/cgroup/a"
    group.mkdir(parents=True)
    (group / "memory.high").write_text("max\n")
    (group.parent / "memory.high").write_text("5000\n")
    assert read_throttles(tmp_path) == [5000]


def test_ulimits() -> None:
    assert check_address_space({}, 16 * GB).found == "this system has none"
    assert check_address_space({"v": None, "d": None}, 16 * GB).level is Level.OK
    assert check_address_space({"v": 64 * GB, "d": None}, 16 * GB).level is Level.OK
    tight = check_address_space({"v": 8 * GB, "d": None}, 16 * GB)
    assert tight.level is Level.WARNING
    assert "ulimit -v is 8.00 GB" in tight.found
    assert "ulimit -v unlimited" in tight.way_out


def test_pinned_memory_matters_beside_a_gpu() -> None:
    assert check_locked(8 * 10**6, None, windows_kernel=False).level is Level.OK
    assert check_locked(None, 20 * GB, windows_kernel=False).level is Level.OK
    assert check_locked(30 * GB, 20 * GB, windows_kernel=False).level is Level.OK
    small = check_locked(8 * 10**6, 20 * GB, windows_kernel=False)
    assert small.level is Level.WARNING
    assert "memlock" in small.way_out
    assert ".wslconfig" in check_locked(None, 20 * GB, windows_kernel=True).way_out


@pytest.mark.parametrize(
    ("setting", "level"),
    [
        ("always [madvise] never\n", Level.OK),
        ("[always] madvise never\n", Level.OK),
        ("always madvise [never]\n", Level.WARNING),
        (None, Level.OK),
    ],
)
def test_huge_pages(setting: str | None, level: Level) -> None:
    assert check_huge_pages(setting).level is level


def test_a_setting_that_is_absent(tmp_path: Path) -> None:
    assert read_setting(tmp_path / "none") is None
    assert read_setting(tmp_path) is None


def test_limits_of_this_process_are_bytes() -> None:
    assert all(limit is None or limit >= 0 for limit in read_ulimits().values())


@pytest.fixture(scope="module")
def plan() -> MemoryPlan:
    return plan_memory(mini(), Setup(device="cuda"), 8 * GB, host_mem=20 * GB)


def test_a_plan_that_fits(plan: MemoryPlan) -> None:
    assert check_plan(plan, 8 * GB, 30 * GB).level is Level.OK


def test_a_plan_beyond_fast_memory(plan: MemoryPlan) -> None:
    found = check_plan(plan, 6 * GB, 30 * GB)
    assert (found.level, found.way_out) == (Level.PROBLEM, "free memory, or set --gpu-mem to at most 6000000000 bytes")


def test_a_host_tier_beyond_ram(plan: MemoryPlan) -> None:
    found = check_plan(plan, 8 * GB, 10 * GB)
    assert found.level is Level.WARNING
    assert "--host-mem to at most 10000000000" in found.way_out


def test_a_plan_with_the_fewest_slots_or_a_warning(plan: MemoryPlan) -> None:
    assert check_plan(replace(plan, slots=2), 8 * GB, 30 * GB).way_out == "give --gpu-mem more"
    assert check_plan(replace(plan, slots=2, all_experts=2), 8 * GB, 30 * GB).level is Level.OK
    assert "context cut" in check_plan(replace(plan, warnings=("context cut",)), 8 * GB, 30 * GB).found
