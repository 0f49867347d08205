"""Whether an answer is right. Strict is what the paper reports; soft also takes answers that aren't boxed as asked.

Each grader takes the generated text and the gold answer of its dataset as published (REFERENCE §5). Text that no
answer can be read from is wrong, never an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from offload_engine.errors import UsageError
from offload_engine.evaluate.maths import BOX, boxed, equal_maths

_FLAT_BOX = re.compile(r"\\boxed\{([^}]*)\}")
_BOXED_NUMBER = re.compile(r"[0-9.]+")
_LAST_NUMBER = re.compile(r"\b[0-9]+\.?[0-9]*\b", re.ASCII)
_BOXED_LETTER = re.compile(r"\b([A-Z0-9])\b", re.ASCII)
_STRICT_LINE = r"^[^\w\n]*answer[^\w\n]*:[^\w\n]*({labels})(?!(?:[ \t]+|['-])?\w)"
"""The letter stands alone: "Answer: a number" names none."""
_SOFT_LINE = r"\banswer[^\w\n]*:(?:[^\w\n]|\\(?:boxed|text\w*|math\w+)\{{)*({labels})(?!(?:[ \t]+|['-])?\w)"
"""Also "Final answer: B" and ``Answer: \\boxed{B}``."""
LETTERS, DIGITS = "ABCDEFGHIJ", "123456789"
"""What choices are called where nobody says so."""


class Grade(NamedTuple):
    """What one answer is worth."""

    strict: bool
    soft: bool
    """True wherever `strict` is."""


def gold_number(gold: str) -> float:
    """The number after the last ``####``, or of the whole text without one; commas removed. Raises `ValueError`."""
    number = float(gold.rpartition("####")[2].strip().replace(",", ""))
    if not math.isfinite(number):
        raise ValueError(f"{number} is no answer")
    return number


def grade_number(generation: str, gold: str) -> Grade:
    r"""GSM8K: the first number inside the last ``\boxed{}`` equals the gold one; a sign is not read, a comma ends a
    number. Soft also accepts the last number of the text where there is not exactly one box.

    Boxes end at the first ``}``, as in the published grader, whose scores this reproduces. Raises `UsageError` for a
    gold answer without a number.
    """
    try:
        wanted = gold_number(gold)
    except ValueError:
        raise UsageError(f"the gold answer {gold[-40:]!r} holds no number after '####'") from None
    boxes = _FLAT_BOX.findall(generation)
    boxed = _BOXED_NUMBER.findall(boxes[-1]) if boxes else []
    if boxed and _is_number(boxed[0], wanted):
        return Grade(True, True)
    numbers = _LAST_NUMBER.findall(generation) if len(boxes) != 1 else []
    return Grade(False, bool(numbers) and _is_number(numbers[-1], wanted))


def grade_maths(generation: str, gold: str) -> Grade:
    r"""MATH500: the last balanced ``\boxed{}`` is mathematically equal to the gold answer, as math-verify judges.

    Soft also accepts whatever math-verify finds in a text without a box. Raises `UsageError` where math-verify isn't
    installed.
    """
    box = last_box(generation)
    if box is not None:
        right = equal_maths(boxed(box), gold)
        return Grade(right, right)
    return Grade(False, equal_maths(generation, gold))


def grade_boxed_letter(generation: str, gold: str, labels: Sequence[str] = ()) -> Grade:
    r"""ARC-C: the last ``\boxed{}`` holds the letter of the right choice and nothing else (``\text{B}`` is B).

    Soft also accepts a box that holds that letter as a word of its own, and no other (``B) iron``, ``(B)``), and,
    without a box, a line "Answer: B". `labels` are what the choices are called; letters or digits unless given.
    """
    box = last_box(generation)
    if box is None:
        return Grade(False, _last_label(_SOFT_LINE, generation, gold, labels) == gold)
    return _boxed_grade(box, gold)


def grade_answer_line(generation: str, gold: str, labels: Sequence[str] = ()) -> Grade:
    r"""MMLU: the last line "Answer: X" names the right letter.

    Soft also accepts, in the last line that has one, "Final answer: X" and ``Answer: \boxed{X}`` (``\text{X}``), and
    a boxed letter where no line names one. `labels` as in `grade_boxed_letter`.
    """
    strict = _last_label(_STRICT_LINE, generation, gold, labels) == gold
    named, box = _last_label(_SOFT_LINE, generation, gold, labels), last_box(generation)
    boxed_right = named is None and box is not None and _boxed_grade(box, gold).soft
    return Grade(strict, strict or named == gold or boxed_right)


def last_box(text: str) -> str | None:
    r"""What the last ``\boxed{}`` with balanced braces holds; None without one. ``\{`` and ``\}`` are no braces."""
    start = text.rfind(BOX)
    while start >= 0:
        content = _balanced(text, start + len(BOX))
        if content is not None:
            return content
        start = text.rfind(BOX, 0, start)
    return None


def _balanced(text: str, start: int) -> str | None:
    depth, escaped = 1, False
    for place in range(start, len(text)):
        letter = text[place]
        if escaped:
            escaped = False
        elif letter == "\\":
            escaped = True
        elif letter in "{}":
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return text[start:place]
    return None


def _unwrapped(box: str) -> str:
    r"""The content of ``\text{..}``, ``\textbf{..}`` and ``\mathrm{..}``, however nested."""
    found = re.fullmatch(r"\s*\\(?:text\w*|math\w+)\{(.*)\}\s*", box, re.DOTALL)
    return _unwrapped(found[1]) if found else box.strip()


def _boxed_grade(box: str, gold: str) -> Grade:
    content = _unwrapped(box)
    strict = content == gold
    return Grade(strict, strict or _BOXED_LETTER.findall(content) == [gold])


def _last_label(line: str, text: str, gold: str, labels: Sequence[str]) -> str | None:
    """Which of the choices the last `line` of that pattern names, in capitals."""
    of_a_choice = labels or (DIGITS if gold.isdigit() else LETTERS)
    pattern = line.format(labels="|".join(map(re.escape, of_a_choice)))
    found = re.findall(pattern, text, re.IGNORECASE | re.MULTILINE)
    return found[-1].upper() if found else None


def _is_number(text: str, wanted: float) -> bool:
    try:
        return float(text) == wanted
    except ValueError:
        return False
