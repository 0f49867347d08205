"""The launcher that limits a command's memory: against the kernel where that is allowed, else against a made-up one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from offload_engine.bench.cgroup import CgroupUnavailableError, memory_group, run_limited
from tools.memory_cgroup import main

MB = 10**6
TOUCH = "import sys; block = bytearray(int(sys.argv[1])); print(len(block))"


def touching(nbytes: int) -> list[str]:
    return [sys.executable, "-S", "-c", TOUCH, str(nbytes)]


@pytest.fixture
def allowed() -> Iterator[None]:
    """Skips where no group can be made, and sees to it that none stays."""
    try:
        with memory_group(100 * MB) as group:
            parent = group.path.parent
    except CgroupUnavailableError as error:
        pytest.skip(str(error))
    yield
    assert not list(parent.glob(f"memory-cgroup-{os.getpid()}-*"))


@pytest.mark.usefixtures("allowed")
def test_a_command_within_the_limit_runs_and_its_peak_is_told() -> None:
    ended = run_limited(touching(60 * MB), 200 * MB, capture=True)
    assert ended.returncode == 0
    assert ended.output.strip() == str(60 * MB)
    assert 0.99 * 200 * MB < ended.limit <= 200 * MB
    assert ended.oom_kills == 0
    assert ended.peak is None or 60 * MB < ended.peak < 150 * MB


@pytest.mark.usefixtures("allowed")
def test_a_command_beyond_the_limit_is_killed_and_that_is_told() -> None:
    ended = run_limited(touching(300 * MB), 100 * MB)
    assert ended.returncode == -signal.SIGKILL
    assert ended.oom_kills == 1
    assert ended.peak is None or ended.peak <= 100 * MB


@pytest.mark.usefixtures("allowed")
def test_a_command_that_takes_too_long_is_killed_with_its_children() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_limited(["/bin/sh", "-c", "sleep 60 & sleep 60"], 100 * MB, timeout=0.5)


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(("command", "code"), [("exit 7", 7), ("kill -9 $$", 137)])
def test_the_exit_code_is_the_commands(command: str, code: int) -> None:
    ended = CliRunner().invoke(main, ["--limit", "100MB", "--", "/bin/sh", "-c", command])
    assert ended.exit_code == code
    assert "of 100 MB allowed, 0 OOM kills" in ended.output


def test_a_limit_that_is_no_size_is_refused_by_name() -> None:
    ended = CliRunner().invoke(main, ["--limit", "lots", "--", "true"])
    assert ended.exit_code == 2
    assert "--limit is 'lots'" in ended.output


def make_tree(root: Path, own: str, files: dict[str, str]) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_groups_of_version_1_lie_below_ones_own(tmp_path: Path) -> None:
    files = {
        f"memory/{group}{file}": "0" for group in ("", "job/") for file in ("memory.limit_in_bytes", "cgroup.procs")
    }
    root = make_tree(tmp_path, "4:memory:/job\n0::/\n", files)
    assert parent_in(root) == root / "sys/fs/cgroup/memory/job"


def test_groups_of_version_2_lie_where_the_controller_is_delegated(tmp_path: Path) -> None:
    files = {
        "user/cgroup.subtree_control": "cpu memory",
        "user/cgroup.procs": "",
        "user/shell/cgroup.subtree_control": "",
        "user/shell/cgroup.procs": "1",
    }
    root = make_tree(tmp_path, "0::/user/shell\n", files)
    assert parent_in(root) == root / "sys/fs/cgroup/user"


def parent_in(root: Path) -> Path:
    from offload_engine.bench.cgroup import _parent

    return _parent(root)[0]


@pytest.mark.parametrize("own", ["0::/user\n", "4:memory:/job\n0::/\n", ""])
def test_where_nothing_is_delegated_the_error_says_what_is_wanted(tmp_path: Path, own: str) -> None:
    root = make_tree(tmp_path, own, {"user/cgroup.subtree_control": "cpu", "user/cgroup.procs": ""})
    with pytest.raises(CgroupUnavailableError, match="not delegated"), memory_group(MB, root):
        pass


def test_without_control_groups_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(CgroupUnavailableError, match="control groups are Linux's"), memory_group(MB, tmp_path):
        pass
