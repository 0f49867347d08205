"""Runs the contenders in turn, each in a process of its own, within the limit where that is allowed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from offload_engine.bench.cgroup import CgroupUnavailableError, MemoryGroup, memory_group
from offload_engine.bench.spec import Report, Run, Task, write_document

GRACE_SECONDS = 600.0
"""What a contender gets beside its patience, for loading, warming up and summing up, before it is killed."""

Tell = Callable[[str], None]


def refusal(limit: int) -> str | None:
    """Why no memory limit can be set here; None where it can."""
    try:
        with memory_group(limit):
            return None
    except CgroupUnavailableError as error:
        return str(error)


def run_rounds(
    tasks: Sequence[Task], rounds: int, limit: int | None, files: Sequence[Path], tell: Tell
) -> Iterator[Run]:
    """Yield each contender's run as it ends: all of them once, then all of them again, so that none has the machine at
    its best alone. A contender that fails is not run again.

    Before each run `files` leave the page cache, where the system lets them: none profits from what the last one read.
    Before its clock starts, each touches as much memory as they are large: none pays for what a host has taken back.
    """
    failed: set[str] = set()
    tasks = [task.model_copy(update={"touched": sum(file.stat().st_size for file in files)}) for task in tasks]
    for number in range(1, rounds + 1):
        for task in tasks:
            if task.name in failed or (task.kind == "bandwidth" and number > 1):
                continue
            tell(f"round {number} of {rounds}: {task.name} ...")
            drop_from_cache(files)
            run = run_task(task, number, limit if task.limited else None)
            if run.report.error is not None:
                failed.add(task.name)
            tell(f"round {number} of {rounds}: {outcome(run)}")
            yield run


def planned(tasks: Sequence[Task], rounds: int, runs: Sequence[Run]) -> int:
    """How many runs `run_rounds` makes in all, by what it has made so far: who fails is not run again."""
    once = {task.name for task in tasks if task.kind == "bandwidth"}
    spared = sum(rounds - run.round for run in runs if run.report.error is not None and run.task not in once)
    return sum(1 if task.name in once else rounds for task in tasks) - spared


def outcome(run: Run) -> str:
    """A run in one line."""
    if run.report.measured is not None:
        steps = sorted(run.report.measured.step_seconds)
        return f"{run.task}: {steps[len(steps) // 2]:.3f} s per step ({len(steps)} steps, {run.seconds:.0f} s in all)"
    if run.report.bandwidth is not None:
        found = run.report.bandwidth
        return f"{run.task}: disk {max(found.disk.values()) / 1e9:.2f} GB/s, DRAM {found.dram / 1e9:.1f} GB/s"
    return f"{run.task} failed: {run.report.error}"


def run_task(task: Task, number: int, limit: int | None) -> Run:
    """Run one contender to its end, whatever that is. An interrupt kills it and is passed on."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dmoe-bench-") as folder:
        task_file, report_file = Path(folder) / "task.json", Path(folder) / "report.json"
        write_document(task_file, task)
        command = [sys.executable, "-m", "offload_engine.bench.contender"]
        command += [str(task_file), str(report_file), str(os.getpid())]
        patience = 2 * task.patience + GRACE_SECONDS  # a contender that has to run twice may use its patience twice
        with _maybe_limited(limit) as group:
            inside = command if group is None else group.command(command)
            code, complaint = _run(inside, patience)
            kills = 0 if group is None else group.oom_kills
            report = _report(report_file, code, complaint, kills, patience)
            return Run(
                task=task.name,
                round=number,
                report=report,
                seconds=time.monotonic() - began,
                limit=None if group is None else group.limit,
                group_peak=None if group is None else group.peak,
                oom_kills=kills,
            )


@contextmanager
def _maybe_limited(limit: int | None) -> Iterator[MemoryGroup | None]:
    if limit is None:
        yield None
        return
    with memory_group(limit) as group:
        yield group


def _run(command: Sequence[str], patience: float) -> tuple[int | None, str]:
    """Exit code (None: killed for taking too long) and the last line on stderr.

    In a session of its own: a Ctrl-C is this process's to deal with. Whatever ends this one has to end it too.
    """
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
    ) as process:
        try:
            _out, complaint = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            _kill(process)
            return None, ""
        except BaseException:
            _kill(process)
            raise
    lines = complaint.strip().splitlines()
    return process.returncode, lines[-1] if lines else ""


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _report(path: Path, code: int | None, complaint: str, kills: int, patience: float) -> Report:
    if path.exists():
        return Report.model_validate_json(path.read_bytes())
    if code is None:
        return Report(error=f"killed after {patience:.0f} s without a result")
    if kills:
        return Report(error="killed by the kernel: it needed more memory than its limit")
    if code < 0:
        return Report(error=f"killed by {signal.Signals(-code).name}")
    return Report(error=f"ended with exit code {code} and no report: {complaint or 'nothing on stderr'}")


def drop_from_cache(files: Sequence[Path]) -> None:
    """Have the system forget what it holds of `files`; what it won't forget stays."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in files:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # only clean pages can go
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
