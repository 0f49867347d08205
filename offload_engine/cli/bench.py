"""`dmoe bench`: contenders against each other in one run, and what they come to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from offload_engine.bench.lineup import Request, line_up
from offload_engine.bench.machine import describe_machine
from offload_engine.bench.report import Conditions, Findings, save
from offload_engine.bench.rounds import refusal, run_rounds
from offload_engine.bench.spec import Run
from offload_engine.cli.errors import FAILED, INTERRUPTED
from offload_engine.cli.terminal import Output, note
from offload_engine.errors import CheckpointError, UsageError

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
    output, lineup = Output(), line_up(request)
    if wanted.out is not None and wanted.out.exists() and not wanted.out.is_dir():
        raise UsageError(f"--out {wanted.out}: is a file; wanted a folder, new or not")
    refused = None if request.limit is None else refusal(request.limit)
    limit = None if refused is not None else request.limit
    if refused is not None:
        note(f"note: contenders run without a memory limit: {refused}")
    for name, reason in lineup.absent.items():
        note(f"note: {name} left out: {reason}")
    machine, runs, interrupted = describe_machine(), list[Run](), False
    try:
        for run in run_rounds(lineup.tasks, request.rounds, limit, _weight_files(request), note):
            runs.append(run)
    except KeyboardInterrupt:
        interrupted = True
    conditions = Conditions(
        model=request.config.model or "built-in",
        machine=machine,
        workload=request.workload,
        limit=limit,
        unlimited_because=refused,
        absent=lineup.absent,
        interrupted=interrupted,
    )
    findings = Findings(conditions, runs)
    if wanted.out is not None:
        for line in save(findings, wanted.out):
            note(line)
    output.line(json.dumps(findings.as_dict()) if wanted.as_json else findings.markdown())
    if interrupted:
        return INTERRUPTED
    broken = any(bar.holds is False for bar in findings.bars) or any(run.report.error for run in runs)
    return FAILED if wanted.check and broken else 0


def _weight_files(request: Request) -> list[Path]:
    """What must not be left in the page cache by one contender for the next."""
    folders = [Path(request.config.model)] if request.config.model is not None else []
    return [file for folder in (*folders, *request.packed) for file in sorted(folder.glob("*")) if file.is_file()]
