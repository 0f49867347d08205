"""`dmoe eval`: run a task, say how it goes, sum it up."""

from __future__ import annotations

import json
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_engine.cli.errors import INTERRUPTED
from offload_engine.cli.evaluation_progress import evaluation_progress
from offload_engine.cli.interrupt import interruptible
from offload_engine.cli.loading import load_engine
from offload_engine.cli.report import announce
from offload_engine.cli.terminal import Output, note
from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.errors import UsageError
from offload_engine.evaluate.records import Memory, RunFolder
from offload_engine.evaluate.runner import about, evaluate, run_folder_settings
from offload_engine.evaluate.summary import summarise, table
from offload_engine.evaluate.tasks import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be evaluated, and how the outcome is wanted."""

    task: Task
    params: SamplingParams
    out: Path | None = None
    as_json: bool = False


def run_task(config: EngineConfig, request: Request) -> int:
    """Answer the task's samples and print what they come to; returns the exit code. Raises `OffloadError`s."""
    output = Output()
    with load_engine(config) as engine, interruptible() as interrupted:
        if engine.tokenizer is None:
            raise UsageError(f"{config.model}: has no tokenizer.json, and tasks are text")
        announce(engine, whole_plan=False)
        for notice in request.task.notices:
            note(notice)
        settings, facts = run_folder_settings(engine, request.task, request.params), about(engine)
        with _recorder(request.out, settings, facts) as recorder:
            samples = request.task.samples
            with evaluation_progress(len(samples), recorder.done) as show:
                for record in evaluate(engine, request.task, request.params, recorder, cancelled=interrupted):
                    show(record)
            if len(recorder.done) < len(samples):
                note(_interruption(request, len(recorder.done)))
                return INTERRUPTED
            summary = summarise(settings, facts, recorder.records())
            if isinstance(recorder, RunFolder):
                recorder.summarise(summary)
    output.line(json.dumps(summary) if request.as_json else table(summary))
    return 0


def _recorder(
    out: Path | None, settings: dict[str, Any], facts: dict[str, Any]
) -> AbstractContextManager[RunFolder | Memory]:
    return nullcontext(Memory()) if out is None else RunFolder(out, settings, facts)


def _interruption(request: Request, answered: int) -> str:
    """What a user who stopped a run should know."""
    so_far = f"interrupted after {answered} of {len(request.task.samples)} answers"
    if request.out is None:
        return f"{so_far}; without --out none of them is kept"
    command = shlex.join(["dmoe", *sys.argv[1:]])
    return f"{so_far}, which are in {request.out}; to go on: {command}"
