"""Grading answers that somebody else generated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from offload_engine.errors import UsageError
from offload_engine.evaluate.grading import Grade
from offload_engine.evaluate.rows import read_rows
from offload_engine.evaluate.summary import accuracy


def grade_saved(path: Path, grade: Callable[..., Grade]) -> dict[str, Any]:
    """Grade every row of `path`, whose fields `generation` and `gold` are texts: `n`, and strict and soft accuracy.

    Raises `UsageError` that names the file and line of a row that can't be graded.
    """
    grades: list[dict[str, Any]] = []
    for row in read_rows(path):
        generation = row.value("generation", "a text")
        if not isinstance(generation, str):
            raise row.error(f"field 'generation' is {generation!r:.60}; wanted a text")
        gold = row.text("gold")
        try:
            grades.append(grade(generation, gold)._asdict())
        except UsageError as error:
            raise row.error(f"{error}; name the task that these answer (--task) if it is another") from None
    if not grades:
        raise UsageError(f"{path}: holds no answers")
    return {"n": len(grades), "strict": accuracy(grades, "strict"), "soft": accuracy(grades, "soft")}
