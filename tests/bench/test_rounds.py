"""Contenders in processes of their own: that they take turns, fail alone, and are limited where that is allowed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from offload_engine.bench import rounds
from offload_engine.bench.cgroup import CgroupUnavailableError
from offload_engine.bench.rounds import drop_from_cache, outcome, planned, refusal, run_rounds, run_task
from offload_engine.bench.spec import Report, Run, Task, Workload
from tests.bench.bench_data import BANDWIDTH, measured, run
from tests.page_cache import cached_bytes

MB = 10**6


def task(name: str, **changes: object) -> Task:
    return Task(name=name, kind="engine", workload=Workload(), **changes)  # type: ignore[arg-type]


def stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Contenders run `program` instead, with the files of task and report as arguments."""
    run = rounds._run

    def started(command: list[str], patience: float) -> tuple[int | None, str]:
        place = command.index(sys.executable)
        return run([*command[: place + 1], "-S", "-c", program, *command[place + 3 :]], patience)

    monkeypatch.setattr(rounds, "_run", started)


def test_contenders_take_turns_and_one_that_failed_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = {"bandwidth": BANDWIDTH, "a": measured(), "b": "out of memory", "c": measured()}
    monkeypatch.setattr(
        rounds, "run_task", lambda one, number, limit: run(one.name, ended[one.name], number, limit=limit)
    )
    tasks = [
        Task(name="bandwidth", kind="bandwidth", workload=Workload()),
        task("a"),
        task("b"),
        task("c", limited=False),
    ]
    told: list[str] = []
    runs = list(run_rounds(tasks, 2, 100, [], told.append))
    assert [(one.task, one.round) for one in runs] == [
        ("bandwidth", 1),
        ("a", 1),
        ("b", 1),
        ("c", 1),
        ("a", 2),
        ("c", 2),
    ]
    assert [one.limit for one in runs] == [100, 100, 100, None, 100, None]
    assert "round 1 of 2: b failed: out of memory" in told
    assert "round 2 of 2: a: 1.000 s per step (4 steps, 9 s in all)" in told


def test_before_its_clock_starts_each_touches_as_much_memory_as_the_model_is_large(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes, files = [], [tmp_path / "a", tmp_path / "b"]
    for file, nbytes in zip(files, (3000, 500), strict=True):
        file.write_bytes(bytes(nbytes))

    def noted(one: Task, number: int, limit: int | None) -> Run:
        sizes.append(one.touched)
        return run(one.name, measured(), number, limit=limit)

    monkeypatch.setattr(rounds, "run_task", noted)
    assert len(list(run_rounds([task("a"), task("b")], 1, None, files, lambda _line: None))) == 2
    assert sizes == [3500, 3500]


def test_a_report_reaches_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(
        monkeypatch, f"import sys; open(sys.argv[2], 'w').write({Report(measured=measured()).model_dump_json()!r})"
    )
    assert run_task(task("a"), 1, None).report == Report(measured=measured())


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("raise SystemExit('the roof is on fire')", "exit code 1 and no report: the roof is on fire"),
        ("raise SystemExit(0)", "exit code 0 and no report: nothing on stderr"),
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
    ],
)
def test_a_contender_that_crashes_is_reported_as_such(
    monkeypatch: pytest.MonkeyPatch, program: str, error: str
) -> None:
    stand_in(monkeypatch, program)
    ended = run_task(task("a"), 1, None)
    assert ended.report.measured is None
    assert error in (ended.report.error or "")
    assert error in outcome(ended)


def test_a_contender_that_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "GRACE_SECONDS", 0.0)
    stand_in(monkeypatch, "import time; time.sleep(60)")
    ended = run_task(task("a", patience=0.25), 1, None)
    assert "without a result" in (ended.report.error or "")
    assert ended.seconds < 30


def test_a_contender_beyond_its_limit_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    if refusal(100 * MB) is not None:
        pytest.skip("no control groups here")
    stand_in(monkeypatch, f"bytearray({300 * MB})")
    ended = run_task(task("a"), 1, 100 * MB)
    assert ended.oom_kills == 1
    assert "more memory than its limit" in (ended.report.error or "")
    assert ended.limit == pytest.approx(100 * MB, rel=0.01)


def test_why_there_is_no_limit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(limit: int) -> None:
        raise CgroupUnavailableError("not for you")

    monkeypatch.setattr(rounds, "memory_group", refuse)
    assert refusal(MB) == "not for you"


def test_an_interrupt_kills_the_contender_and_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    stand_in(
        monkeypatch,
        f"import os, time; open({str(tmp_path / 'new')!r}, 'w').write(str(os.getpid()))\n"
        f"os.rename({str(tmp_path / 'new')!r}, {str(pid_file)!r}); time.sleep(60)",
    )

    def interrupt() -> None:
        while not pid_file.exists():
            threading.Event().wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_task(task("a"), 1, None)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel has to be told of the parent, as only Linux can be")
def test_a_contender_ends_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    child = "import sys, time; from offload_engine.bench.contender import die_with; die_with(int(sys.argv[1]))"
    child += "; print('ready', flush=True); time.sleep(60)"
    parent = f"import os, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        began = time.monotonic()
        assert process.stdout.read() == b""  # the pipe closes when both are gone
    assert time.monotonic() - began < 30


def test_the_outcome_of_a_bandwidth_run_in_one_line() -> None:
    done = Run(task="bandwidth", round=1, report=Report(bandwidth=BANDWIDTH), seconds=1.0)
    assert outcome(done) == "bandwidth: disk 0.00 GB/s, DRAM 1.0 GB/s"


def test_files_leave_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(2 * MB))
    path.read_bytes()
    if not cached_bytes(path):
        pytest.skip("this file system caches nothing")
    drop_from_cache([path, tmp_path / "absent"])
    if cached_bytes(path):
        pytest.skip("this file system keeps what it is told to forget")
    assert path.read_bytes() == bytes(2 * MB)


def test_who_failed_is_not_planned_again() -> None:
    tasks = [Task(name="bandwidth", kind="bandwidth", workload=Workload()), task("a"), task("b")]
    assert planned(tasks, 3, []) == 7
    assert planned(tasks, 3, [run("bandwidth", "broken")]) == 7
    assert planned(tasks, 3, [run("bandwidth", BANDWIDTH), run("a", "broken"), run("b", measured())]) == 5
