"""What a section of the report is made of, and what it may draw on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from offload_engine.evaluate.compare import compare
from tools.analysis import measurements
from tools.analysis.evaluations import Evaluated, load
from tools.analysis.figures import Drawn
from tools.analysis.runs import Run, original
from tools.analysis.study import Role, Study
from tools.analysis.tables import Table


class MissingError(Exception):
    """Something a section needs hasn't been run; the message says what."""


@dataclass(frozen=True)
class Content:
    """One section: paragraphs (text, with `code` in backticks), tables and figures in reading order."""

    parts: Sequence[str | Table | Drawn]
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the section says, for the report's JSON."""
    missing: Sequence[str] = ()
    """What would make it complete."""


class Data:
    """The evaluations and measurements there are; each is read once."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self._runs: dict[tuple[str, str], Evaluated | None] = {}
        self._compared: dict[tuple[str, str, str], dict[str, Any]] = {}

    def find(self, task: str, run: Run) -> Evaluated | None:
        """The finished evaluation, or None."""
        key = (task, run.name)
        if key not in self._runs:
            self._runs[key] = load(self.study, task, run)
        return self._runs[key]

    def need(self, task: str, run: Run) -> Evaluated:
        """The finished evaluation. Raises `MissingError`."""
        found = self.find(task, run)
        if found is None:
            raise MissingError(lacking(task, run))
        return found

    def measured(self, name: str) -> dict[str, Any]:
        """The result of a measurement. Raises `MissingError`."""
        saved = measurements.load(self.study, name)
        if saved is None:
            raise MissingError(f"the measurement {name}")
        result: dict[str, Any] = saved["result"]
        return result

    def facts(self, role: Role) -> dict[str, Any]:
        """What is known of the model that plays `role`. Raises `MissingError`."""
        found: dict[str, Any] = self.measured("model")[role]
        return found

    def against_original(self, task: str, evaluated: Evaluated, reference: Run | None = None) -> dict[str, Any]:
        """The paired comparison with `reference`: by default the base model under original routing.

        Raises `MissingError` where that hasn't been evaluated.
        """
        reference = reference or original()
        key = (task, reference.name, evaluated.run.name)
        if key not in self._compared:
            self._compared[key] = compare(self.need(task, reference).saved, evaluated.saved)
        return self._compared[key]


def lacking(task: str, run: Run) -> str:
    """How a missing evaluation is called."""
    return f"the evaluation {run.name} on {task}"


def run_numbers(data: Data, task: str, evaluated: Evaluated, reference: Run | None = None) -> dict[str, Any]:
    """What tables say of one evaluation, unrounded."""
    summary, paired = evaluated.summary, data.against_original(task, evaluated, reference)
    return {
        "run": evaluated.run.name,
        "model": evaluated.run.role,
        "routing": evaluated.run.routing,
        "block_length": evaluated.run.block_length,
        "n": summary["n"],
        "strict": summary["strict"],
        "soft": summary["soft"],
        "unique_experts": evaluated.unique,
        "unique_experts_cv": summary["unique_experts_cv"],
        "unique_experts_reduction": paired["unique_experts"],
        "tokens_per_step": summary["tokens_per_step"],
        "steps_per_answer": summary["steps_per_answer"],
        "tokens_per_answer": summary["tokens_per_answer"],
        "against_original": paired["strict"],
    }
