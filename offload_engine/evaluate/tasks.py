"""What a model can be asked: a task's samples, and how its answers are graded. Zero-shot, one user turn each."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from offload_engine.errors import UsageError
from offload_engine.evaluate.arithmetic import generate
from offload_engine.evaluate.datasets import DATASETS, dataset_samples
from offload_engine.evaluate.grading import Grade, grade_number
from offload_engine.evaluate.sample import Sample

ARITHMETIC = "tiny-arithmetic"
EVALUATION_SEED = 2
"""The built-in model was trained on problems of seed 1, and looked at with others while it was made."""
GENERATED = 1000
"""Problems generated when nobody says how many."""

NAMES = (ARITHMETIC, *DATASETS)


class Task(Protocol):
    """Questions with known answers."""

    @property
    def name(self) -> str:
        """What the task is called on the command line."""

    @property
    def samples(self) -> Sequence[Sample]:
        """All that are to be answered, with different ids, in a fixed order."""

    @property
    def settings(self) -> dict[str, Any]:
        """What decides which samples there are, ready for `json.dumps`."""

    @property
    def notices(self) -> Sequence[str]:
        """What the user should know of the samples."""

    def grade(self, generation: str, gold: str, labels: Sequence[str] = ()) -> Grade:
        """Judge one answer; `labels` are the sample's."""


@dataclass(frozen=True, slots=True)
class GradedSamples:
    """A `Task` of given samples."""

    name: str
    samples: Sequence[Sample]
    grader: Callable[..., Grade]
    """Takes an answer and the gold one, and the labels of a sample that has some."""
    settings: dict[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()

    def grade(self, generation: str, gold: str, labels: Sequence[str] = ()) -> Grade:
        """See `Task`."""
        return self.grader(generation, gold, labels) if labels else self.grader(generation, gold)


def make_task(
    name: str, *, n: int | None = None, seed: int | None = None, subject: str | None = None, data: Path | None = None
) -> Task:
    """The task called `name` (``mmlu:SUBJECT`` is ``mmlu`` of that subject) with its first `n` samples.

    `n` None: all of a dataset, 1000 generated problems. `seed` is for generated tasks, `data` (a JSONL or parquet
    file; None: the hub's copy) for datasets, `subject` for mmlu (None: high_school_mathematics; "all": every one).
    Raises `UsageError` for what doesn't exist or doesn't fit together, for a dataset that can't be read, naming file
    and line, and where a package is missing that grades the answers.
    """
    name, _, inline = name.partition(":")
    subject = inline or subject
    if name not in NAMES:
        raise unknown_task(name)
    if n is not None and n < 1:
        raise UsageError(f"n is {n}; wanted at least 1 sample")
    if subject is not None and name != "mmlu":
        raise UsageError(f"subject is {subject!r}, but task {name} has none; only mmlu does")
    if name == ARITHMETIC:
        if data is not None:
            raise UsageError(f"data is {str(data)!r}, but the problems of {name} are generated; leave data out")
        return arithmetic_task(GENERATED if n is None else n, EVALUATION_SEED if seed is None else seed)
    if seed is not None:
        raise UsageError(f"seed is {seed}, but the samples of {name} come from a file in its order; leave seed out")
    dataset = DATASETS[name]
    dataset.ready()
    found = dataset_samples(dataset, data=data, subject=subject, n=n)
    settings = {"task": name, **found.origin, "n": len(found.samples), "seed": None}
    return GradedSamples(name, found.samples, dataset.grade, settings, found.notices)


def arithmetic_task(n: int, seed: int) -> GradedSamples:
    """The first `n` generated word problems of a seed (docs/problem-grammar.md), graded as GSM8K's answers are."""
    samples = [
        Sample(
            id=f"{seed}-{index}",
            question=made.question,
            prompt=made.question,
            gold=made.gold,
            tags={"kind": made.kind, "steps": made.steps},
        )
        for index, made in enumerate(generate(seed, n))
    ]
    settings = {"task": ARITHMETIC, "subject": None, "data": None, "n": n, "seed": seed}
    return GradedSamples(ARITHMETIC, samples, grade_number, settings)


def grader_of(name: str) -> Callable[[str, str], Grade]:
    """How answers of the task called `name` are graded. Raises `UsageError` where they can't be."""
    name = name.partition(":")[0]
    if name not in NAMES:
        raise unknown_task(name)
    if name == ARITHMETIC:
        return grade_number
    DATASETS[name].ready()
    return DATASETS[name].grade


def unknown_task(name: str) -> UsageError:
    """Says which tasks there are, and which of them was probably meant."""
    near = difflib.get_close_matches(name.lower().replace("_", "-"), NAMES, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"task {name!r} doesn't exist; {hint}there are {', '.join(NAMES)} (and mmlu:SUBJECT)")
