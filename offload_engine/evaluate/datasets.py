"""The public benchmarks: where they live, the names of their fields, and how a row becomes a sample (REFERENCE §5)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from offload_engine.config import brief
from offload_engine.errors import UsageError
from offload_engine.evaluate.grading import (
    LETTERS,
    Grade,
    gold_number,
    grade_answer_line,
    grade_boxed_letter,
    grade_maths,
    grade_number,
)
from offload_engine.evaluate.maths import require_math_verify
from offload_engine.evaluate.rows import Row, download, read_rows
from offload_engine.evaluate.sample import Sample

BOXED = "Please answer the question step by step and put the answer in \\boxed{}."
BOXED_LETTER = "Please answer the question step by step and put the letter of the right choice in \\boxed{}."
ANSWER_LINE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'Answer: $LETTER' (without quotes) where LETTER is one of {letters}. Think step by step before answering."
)
"""The prompt of simple-evals, which the paper's MMLU column follows."""
DEFAULT_SUBJECT = "high_school_mathematics"
"""The subject of the paper's MMLU column."""
EVERY_SUBJECT = "all"


@dataclass(frozen=True, slots=True)
class Dataset:
    """A published test set."""

    name: str
    repository: str
    """On the Hugging Face hub."""
    file: str
    """In the repository; ``{subject}`` stands for the subject."""
    sample: Callable[[Row], Sample]
    """Raises `UsageError` that says where the row is from."""
    grade: Callable[..., Grade]
    has_subjects: bool = False
    ready: Callable[[], None] = lambda: None
    """Raises `UsageError` where answers can't be graded."""


class Found(NamedTuple):
    """Samples of a dataset."""

    samples: list[Sample]
    origin: dict[str, Any]
    """Where they are from: `data` and its `sha256`, and the `subject`, None where none was chosen or could be."""
    notices: tuple[str, ...] = ()


def dataset_samples(dataset: Dataset, *, data: Path | None, subject: str | None, n: int | None) -> Found:
    """The first `n` samples (None: all) of `subject`.

    Raises `UsageError` for a file that can't be read, names what it should not, or has too few rows.
    """
    chosen = (subject or DEFAULT_SUBJECT) if dataset.has_subjects else None
    path = data or download(dataset.repository, dataset.file.format(subject=chosen))
    rows: Iterable[Row] = read_rows(path)
    notices: tuple[str, ...] = ()
    if chosen is not None:
        every = list(rows)
        if any(row.values.get("subject") is not None for row in every):
            rows = every if chosen == EVERY_SUBJECT else _of_subject(every, path, chosen)
        else:
            rows = every
            if data is not None:
                chosen = subject
                notices = (f"note: {path}: no row has a field 'subject', so all of them are taken",)
    samples = _samples(dataset, rows, path, n)
    where = str(data) if data else f"hub:{dataset.repository}"
    return Found(samples, {"subject": chosen, "data": where, "sha256": _sha256(path)}, notices)


def _samples(dataset: Dataset, rows: Iterable[Row], path: Path, n: int | None) -> list[Sample]:
    samples: list[Sample] = []
    seen: dict[str, str] = {}
    for row in rows:
        if n is not None and len(samples) == n:
            break
        sample = replace(dataset.sample(row), where=row.where)
        if sample.id in seen:
            raise UsageError(f"{row.where}: id {sample.id!r} occurs already in {seen[sample.id]}; wanted unique ids")
        seen[sample.id] = row.where
        samples.append(sample)
    if not samples:
        raise UsageError(f"{path}: holds no samples")
    if n is not None and len(samples) < n:
        raise UsageError(f"n is {n}, but {path} holds {len(samples)} samples; lower n or leave it out")
    return samples


def _of_subject(rows: list[Row], path: Path, subject: str) -> list[Row]:
    chosen = [row for row in rows if row.values.get("subject") == subject]
    if not chosen:
        subjects = sorted({str(found) for row in rows if (found := row.values.get("subject")) is not None})
        raise UsageError(
            f"{path}: no rows of subject {subject!r}; there are {', '.join(subjects)}; name one of them, or "
            f"{EVERY_SUBJECT!r}"
        )
    return chosen


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _gsm8k(row: Row) -> Sample:
    question, gold = row.text("question"), row.text("answer")
    try:
        if "####" not in gold:
            raise ValueError
        gold_number(gold)
    except ValueError:
        raise row.error(f"field 'answer' has no number after '####'; found {_end(gold)}") from None
    return Sample(row.id(), question, f"{BOXED} {question}", gold)


def _math500(row: Row) -> Sample:
    question = row.text("problem")
    tags = {name: value for name in ("subject", "level") if isinstance(value := row.values.get(name), str | int)}
    return Sample(row.id("unique_id"), question, f"{BOXED} {question}", row.text("answer"), tags)


def _arc(row: Row) -> Sample:
    question, gold = row.text("question"), row.text("answerKey").strip()
    choices = row.value("choices")
    texts = choices.get("text") if isinstance(choices, Mapping) else None
    labels = choices.get("label") if isinstance(choices, Mapping) else None
    if not isinstance(texts, list) or not isinstance(labels, list) or not texts or len(texts) != len(labels):
        raise row.error(f"field 'choices' is {brief(choices)}; wanted lists 'text' and 'label' of equal length")
    if gold not in labels:
        raise row.error(f"field 'answerKey' is {gold!r}, which is none of the labels {', '.join(map(str, labels))}")
    listed = "\n".join(f"{label}) {text}" for label, text in zip(labels, texts, strict=True))
    return Sample(
        row.id("id"), question, f"{BOXED_LETTER} {question}\n\n{listed}", gold, labels=tuple(map(str, labels))
    )


def _mmlu(row: Row) -> Sample:
    question, choices, answer = row.text("question"), row.value("choices"), row.value("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise row.error(f"field 'choices' is {brief(choices)}; wanted a list of 2 to {len(LETTERS)} texts")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        gold = answer
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        gold = letters[answer]
    else:
        raise row.error(f"field 'answer' is {answer!r}; wanted 0 to {len(choices) - 1} or one of {letters}")
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(letters, choices, strict=True))
    prompt = f"{ANSWER_LINE.format(letters=letters)}\n\n{question}\n\n{listed}"
    subject = row.values.get("subject")
    tags: dict[str, str | int] = {"subject": subject} if isinstance(subject, str) else {}
    return Sample(row.id(), question, prompt, gold, tags, tuple(letters))


def _end(text: str) -> str:
    return repr(text if len(text) <= 40 else f"...{text[-37:]}")


DATASETS: dict[str, Dataset] = {
    made.name: made
    for made in (
        Dataset("gsm8k", "openai/gsm8k", "main/test-00000-of-00001.parquet", _gsm8k, grade_number),
        Dataset("math500", "HuggingFaceH4/MATH-500", "test.jsonl", _math500, grade_maths, ready=require_math_verify),
        Dataset("arc-c", "allenai/ai2_arc", "ARC-Challenge/test-00000-of-00001.parquet", _arc, grade_boxed_letter),
        Dataset("mmlu", "cais/mmlu", "{subject}/test-00000-of-00001.parquet", _mmlu, grade_answer_line, True),
    )
}
