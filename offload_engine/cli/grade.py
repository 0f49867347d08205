"""`dmoe eval --grade-only` and `--compare`: what can be said without a model."""

from __future__ import annotations

import json
from pathlib import Path

from offload_engine.cli.terminal import Output
from offload_engine.evaluate.compare import compare, comparison_table
from offload_engine.evaluate.records import read_run
from offload_engine.evaluate.saved import grade_saved
from offload_engine.evaluate.summary import accuracy_line
from offload_engine.evaluate.tasks import grader_of


def show_grades(task: str, path: Path, *, as_json: bool) -> None:
    """Grade saved answers as those of `task`, and print the scores. Raises `UsageError`."""
    scores = {"task": task, "file": str(path), **grade_saved(path, grader_of(task))}
    lines = [f"{kind:<6} {accuracy_line(scores[kind], scores['n'])}" for kind in ("strict", "soft")]
    Output().line(json.dumps(scores) if as_json else "\n".join(lines))


def show_comparison(a: Path, b: Path, *, as_json: bool) -> None:
    """Hold the run in `b` against the one in `a`, and print what comes of it. Raises `UsageError`."""
    result = compare(read_run(a), read_run(b))
    Output().line(json.dumps(result) if as_json else comparison_table(result))
