"""`dmoe bench`: contenders against each other in one run, and what they come to."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from offload_engine.bench.lineup import Request, line_up
from offload_engine.bench.machine import describe_machine
from offload_engine.bench.report import Conditions, Findings, prepare, save
from offload_engine.bench.rounds import planned, refusal, run_rounds
from offload_engine.bench.spec import Run
from offload_engine.cli.errors import FAILED, INTERRUPTED
from offload_engine.cli.loading import loading_progress
from offload_engine.cli.progress import RUNS, Progress
from offload_engine.cli.terminal import Output, note
from offload_engine.engine.assembly import BUILT_IN
from offload_engine.errors import CheckpointError, OffloadError
from offload_engine.experts.storage.packed_header import PACKED_FILE
from offload_engine.model.hub import resolve_model

CHECKPOINTS = Path("checkpoints")
"""Where `--preset` looks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """How the outcome is wanted."""

    out: Path | None
    as_json: bool
    check: bool


def preset_directory(preset: str, layers: int | None) -> Path:
    """Where the checkpoint of a preset of tools/make_checkpoint lies. Raises `CheckpointError` with the command that
    makes it.
    """
    shallower = "" if layers is None else f"-{layers}-layers"
    directory = CHECKPOINTS / f"{preset}{shallower}"
    if not (directory / "config.json").is_file():
        option = "" if layers is None else f" --layers {layers}"
        raise CheckpointError(
            f"{directory}: no checkpoint there for --preset {preset}; "
            f"make it with: python -m tools.make_checkpoint --preset {preset}{option} --out {directory}"
        )
    return directory


def run_benchmark(request: Request, wanted: Wanted) -> int:
    """Measure, print, save; returns the exit code. Raises `OffloadError`s."""
    folders = _model_folders(request)
    output, lineup = Output(), line_up(request, packed=(folders[0] / PACKED_FILE).exists())
    if wanted.out is not None:
        prepare(wanted.out)
    refused = None if request.limit is None else refusal(request.limit)
    limit = None if refused is not None else request.limit
    if refused is not None:
        note(f"note: contenders run without a memory limit: {refused}")
    for name, reason in lineup.absent.items():
        note(f"note: {name} left out: {reason}")
    machine, runs, ended = describe_machine(), list[Run](), None
    try:
        total = planned(lineup.tasks, request.rounds, runs)
        with _ended_as_by_ctrl_c(), Progress("runs", total, RUNS, every=0, still=True) as progress:
            progress.show(0)
            for run in run_rounds(lineup.tasks, request.rounds, limit, _weight_files(folders), note):
                runs.append(run)
                progress.show_of(len(runs), planned(lineup.tasks, request.rounds, runs))
    except (KeyboardInterrupt, OffloadError) as error:
        ended = error
    if isinstance(ended, OffloadError) and not runs:
        raise ended
    conditions = Conditions(
        model=request.config.model or "built-in",
        machine=machine,
        workload=request.workload,
        limit=limit,
        unlimited_because=refused,
        absent=lineup.absent,
        interrupted=ended is not None,
    )
    findings = Findings(conditions, runs)
    try:
        output.line(json.dumps(findings.as_dict()) if wanted.as_json else findings.markdown())
    finally:  # a terminal that went away is no reason to lose hours of measuring
        for line in [] if wanted.out is None else save(findings, wanted.out):
            note(line)
    if isinstance(ended, OffloadError):
        raise ended
    if ended is not None:
        return INTERRUPTED
    broken = any(bar.holds is False for bar in findings.bars) or any(run.report.error for run in runs)
    return FAILED if wanted.check and broken else 0


def _model_folders(request: Request) -> list[Path]:
    """The model's directory, then those of its other weight formats. Raises `ModelError`s."""
    model = request.config.model
    with loading_progress() as progress:
        own = BUILT_IN if model is None else resolve_model(model, progress=progress)
        return [own, *(resolve_model(str(one), progress=progress) for one in request.packed)]


def _weight_files(folders: Sequence[Path]) -> list[Path]:
    """What must not be left in the page cache by one contender for the next."""
    return [file for folder in folders for file in sorted(folder.glob("*")) if file.is_file()]


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """While open, SIGTERM and SIGHUP are `KeyboardInterrupt`s: contenders, in sessions of their own, hear of neither.

    A signal that this process was started to ignore stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) != signal.SIG_IGN]
    before = {one: signal.signal(one, signal.default_int_handler) for one in heard}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
