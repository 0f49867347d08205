"""Processors, kernels and threads of machines other than this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_engine.bench.machine import processor
from offload_engine.doctor.finding import Level
from offload_engine.doctor.processor import Threads, check_kernels, check_processor, check_threads, cpu_quota, spins

X86 = "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu avx avx2 amx_bf16 avx512f\npower management:\n"
ARM = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd bf16 i8mm\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("cpuinfo", "shown", "level"),
    [
        (X86, "Some CPU @ 3 GHz: avx2 avx512f amx_bf16", Level.OK),
        (ARM, "unnamed: asimd bf16 i8mm", Level.OK),
        ("model name : Old\nflags : fpu sse2\n", "Old: no vector features known to us", Level.WARNING),
        ("", "unnamed: this system doesn't list its features", Level.OK),
    ],
)
def test_features(tmp_path: Path, cpuinfo: str, shown: str, level: Level) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(cpuinfo)
    found = check_processor(*processor(file))
    assert (found.found, found.level) == (shown, level)
    assert bool(found.way_out) is (level is not Level.OK)


def test_a_system_without_proc(tmp_path: Path) -> None:
    assert processor(tmp_path / "cpuinfo") == ("", set())
    assert cpu_quota(tmp_path) is None


def test_kernels() -> None:
    assert check_kernels("avx2", "the fastest this CPU can run").level is Level.OK
    absent = check_kernels(None, "lib.so is not built: run `x`")
    assert (absent.level, absent.way_out) == (Level.WARNING, "it needs a C compiler, such as gcc")
    assert "run `x`" in absent.found
    assert check_kernels(None, "OFFLOAD_ENGINE_KERNEL is off").way_out == "unset OFFLOAD_ENGINE_KERNEL"


@pytest.mark.parametrize(
    ("threads", "advice"),
    [
        (Threads(4, 4, None, 0.2, True), ""),
        (Threads(2, 2, None, 1.0, True), "--threads 1,"),
        (Threads(4, 8, None, 6.0, True), "--threads 2,"),
        (Threads(2, 2, None, 1.0, False), ""),  # passive threads give way
        (Threads(1, 2, None, 9.0, True), ""),  # nobody to wait for
        (Threads(8, 4, None, 0.0, True), "--threads 4"),
        (Threads(4, 8, 1.5, 0.0, False), "--threads 1"),
        (Threads(2, 8, 0.5, 0.0, True), "--threads 1"),
    ],
)
def test_threads_that_will_wait_for_each_other(threads: Threads, advice: str) -> None:
    found = check_threads(threads)
    assert found.level is (Level.WARNING if advice else Level.OK)
    assert advice in found.way_out
    assert bool(found.way_out) is bool(advice)


@pytest.mark.parametrize(
    ("environment", "spinning"),
    [
        ({}, True),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, False),
        ({"OMP_WAIT_POLICY": "active"}, True),
        ({"GOMP_SPINCOUNT": "0"}, False),
        ({"GOMP_SPINCOUNT": "1000"}, True),
    ],
)
def test_what_makes_threads_spin(environment: dict[str, str], spinning: bool) -> None:
    assert spins(environment) is spinning


def belongs_to(root: Path, line: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(f"{line}\n")


def test_quota_of_v2_is_the_tightest_above(tmp_path: Path) -> None:
    belongs_to(tmp_path, "0::/a/b")
    group = tmp_path / "sys/fs/cgroup/a/b"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (group.parent / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5


@pytest.mark.parametrize(("quota", "found"), [("200000", 2.0), ("-1", None), ("rubbish", None)])
def test_quota_of_v1(tmp_path: Path, quota: str, found: float | None) -> None:
    belongs_to(tmp_path, "3:cpu,cpuacct:/docker/x")
    group = tmp_path / "sys/fs/cgroup/cpu/docker/x"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text(f"{quota}\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path) == found
