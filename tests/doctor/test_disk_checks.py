"""Reading a disk for a moment, and what is said of it; findings as they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_engine.doctor import disk
from offload_engine.doctor.disk import DiskSpeed, check_direct, check_space, check_speed, read_speed, sample_file
from offload_engine.doctor.finding import EXIT_CODES, Finding, Level, refused, table, worst
from offload_engine.errors import OffloadError

GB = 10**9


def test_space(tmp_path: Path) -> None:
    assert check_space(tmp_path, 100 * GB, 30 * GB).found == f"100 GB in {tmp_path}"
    assert "dmoe convert" in check_space(tmp_path, 20 * GB, 30 * GB).found
    assert check_space(tmp_path, 20 * GB, None).level is Level.OK
    assert check_space(tmp_path, GB // 2, None).level is Level.WARNING


def test_speed_and_direct_reads(tmp_path: Path) -> None:
    assert check_speed(DiskSpeed(tmp_path, True, 3e9)).level is Level.OK
    assert check_speed(DiskSpeed(tmp_path, True, 1e8)).level is Level.WARNING
    assert check_direct(True, tmp_path / "x").level is Level.OK
    assert str(tmp_path) in check_direct(False, tmp_path / "x").found


@pytest.mark.parametrize("size", [100, disk.PIECE, 2 * disk.PIECE + 12345])
def test_a_file_of_any_length_is_read_to_its_end(tmp_path: Path, size: int) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(size))
    speed = read_speed(file, seconds=60.0)
    assert speed.file == file
    assert speed.rate > 0


def test_the_largest_file_is_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LEAST_SAMPLE", 2**20)
    (tmp_path / "a.safetensors").write_bytes(bytes(2**20))
    (tmp_path / "b.packed").write_bytes(bytes(2**21))
    with sample_file(tmp_path) as file:
        assert file == tmp_path / "b.packed"


def test_small_files_are_replaced_by_a_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "LEAST_SAMPLE", 2**20)
    (tmp_path / "a.safetensors").write_bytes(b"small")
    with sample_file(tmp_path) as file:
        assert file.parent != tmp_path
        assert file.stat().st_size == 2**20
    assert not file.exists()


def test_findings_are_aligned_and_summed_up() -> None:
    findings = [
        Finding("disk", "fast"),
        Finding("GPU", "none", Level.PROBLEM, "buy one"),
        Finding("x", "y", Level.WARNING),
    ]
    assert table(findings).splitlines() == [
        "ok       disk  fast",
        "problem  GPU   none",
        "               -> buy one",
        "warning  x     y",
        "",
        "1 problem, 1 warning in 3 checks",
    ]
    assert worst(findings) is Level.PROBLEM
    assert table(findings[:1]).endswith("all 1 checks are ok")
    assert worst([]) is Level.OK
    assert len(set(EXIT_CODES.values())) == len(Level)
    assert not {EXIT_CODES[level] for level in (Level.WARNING, Level.PROBLEM)} & {0, 1, 2, 3, 4, 130}


def test_an_error_is_split_into_what_and_way_out() -> None:
    found = refused("plan", OffloadError("it is 3; wanted 4; make it 4\n\ntable"))
    assert (found.found, found.way_out, found.level) == ("it is 3; wanted 4", "make it 4", Level.PROBLEM)
    assert refused("plan", OffloadError("broken")).found == "broken"
