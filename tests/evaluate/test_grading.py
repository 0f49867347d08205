"""Graders: what counts as right, and the scores the paper's authors published for their own answers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.errors import UsageError
from offload_engine.evaluate import maths, maths_worker
from offload_engine.evaluate.grading import (
    Grade,
    grade_answer_line,
    grade_boxed_letter,
    grade_maths,
    grade_number,
    last_box,
)
from offload_engine.evaluate.saved import grade_saved

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "dmoe_gsm8k_generations.jsonl"
WRONG, SOFT, RIGHT = Grade(False, False), Grade(False, True), Grade(True, True)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published answers are not beside this checkout")
def test_the_published_scores_are_reproduced():
    scores = grade_saved(PUBLISHED, grade_number)
    assert (scores["strict"]["right"], scores["soft"]["right"], scores["n"]) == (1147, 1155, 1319)
    assert scores["strict"]["accuracy"] == pytest.approx(0.869598, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "gold", "grade"),
    [
        (r"so \boxed{18}", "#### 18", RIGHT),
        (r"so \boxed{18}", "18", RIGHT),
        (r"\boxed{18.00}", "#### 18", RIGHT),
        (r"\boxed{40\%} of them", "#### 40", RIGHT),
        (r"\boxed{\$2500}", "2 * 1250 = 2500\n#### 2,500", RIGHT),
        (r"\boxed{17,500}", "#### 17,500", WRONG),
        (r"\boxed{25 years}", "#### 25", RIGHT),
        (r"\boxed{12} and then \boxed{7}", "#### 7", RIGHT),
        (r"\boxed{7} and then \boxed{12}", "#### 7", WRONG),
        (r"\boxed{7} and then \boxed{12}, so 7", "#### 7", SOFT),
        (r"\boxed{8}, or rather 7", "#### 7", WRONG),
        ("the answer is 7", "#### 7", SOFT),
        ("7 of them, not 8", "#### 7", WRONG),
        (r"\boxed{..} 7", "#### 7", WRONG),
        (r"\boxed{} and \boxed{} make 7.", "#### 7", SOFT),
        (r"\boxed{", "#### 7", WRONG),
        ("", "#### 7", WRONG),
    ],
)
def test_numbers(text: str, gold: str, grade: Grade):
    assert grade_number(text, gold) == grade


def test_a_gold_answer_without_a_number_is_the_datasets_fault():
    with pytest.raises(UsageError, match="'#### many' holds no number"):
        grade_number(r"\boxed{7}", "#### many")


@pytest.mark.parametrize(
    ("text", "gold", "grade"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac12", RIGHT),
        (r"\boxed{0.5}", r"\frac{1}{2}", RIGHT),
        (r"first \boxed{3}, then \boxed{\frac{1}{2}}", "0.5", RIGHT),
        (r"first \boxed{\frac{1}{2}}, then \boxed{3}", "0.5", WRONG),
        (r"\boxed{2\sqrt{3} + 1}", r"1 + 2\sqrt3", RIGHT),
        (r"\boxed{(3, \frac{\pi}{2})}", r"\left( 3, \frac{\pi}{2} \right)", RIGHT),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", RIGHT),
        (r"\boxed{\text{Bob}}", r"\text{Evelyn}", WRONG),
        (r"\boxed{p - q}", "p-q", RIGHT),
        (r"\boxed{q - p}", "p-q", WRONG),
        ("the answer is $12$", "12", SOFT),
        (r"\boxed{\frac{1", "1", WRONG),
        ("", "12", WRONG),
    ],
)
def test_maths(text: str, gold: str, grade: Grade):
    pytest.importorskip("math_verify")
    assert grade_maths(text, gold) == grade


@pytest.fixture
def worker() -> Iterator[maths._Worker]:
    pytest.importorskip("math_verify")
    made = maths._Worker()
    yield made
    made.close()


def test_maths_is_judged_in_another_process_of_limited_memory(worker: maths._Worker):
    assert worker.judge(r"\boxed{0.5}", r"\boxed{\frac12}")
    assert worker._process is not None
    process = psutil.Process(worker._process.pid)
    assert process.pid != os.getpid()
    if hasattr(process, "rlimit"):
        assert process.rlimit(psutil.RLIMIT_AS)[0] == maths_worker.MEMORY
    assert worker.judge(r"\boxed{0.5}", r"\boxed{\frac12}")
    assert worker._process.pid == process.pid, "one process for all answers"
    worker.close()
    assert not process.is_running()


def test_a_grader_that_dies_is_replaced(worker: maths._Worker):
    assert worker.judge(r"\boxed{0.5}", r"\boxed{\frac12}")
    first = worker._process
    assert first is not None
    first.kill()
    assert worker.judge(r"\boxed{0.5}", r"\boxed{\frac12}") is False, "as an answer that kills it would be"
    assert worker.judge(r"\boxed{0.5}", r"\boxed{\frac12}")
    assert worker._process is not first


def test_a_grader_that_is_busy_too_long_is_killed(
    worker: maths._Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    slow = Path(maths_worker.__file__).read_text().replace("HARD_SECONDS = 20", "HARD_SECONDS = 0.2")
    slow = slow.replace("import parse, verify", "import verify\n        parse = lambda *_, **__: pow(7, 10**8)")
    (tmp_path / "slow.py").write_text(slow)
    monkeypatch.setattr(maths, "_PROGRAM", tmp_path / "slow.py")
    assert worker.judge(r"\boxed{0.5}", r"\boxed{\frac12}") is False
    assert worker._process is None


def test_an_enormous_number_takes_none_of_this_processs_memory():
    pytest.importorskip("math_verify")
    before = psutil.Process().memory_info().rss
    assert grade_maths(r"\boxed{2^{10^{12}}}", "5") == WRONG
    assert psutil.Process().memory_info().rss - before < 10 * 2**20
    assert grade_maths(r"\boxed{5.0}", "5") == RIGHT


def test_a_grader_that_cannot_start_says_why(worker: maths._Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(maths, "_PROGRAM", tmp_path / "worker.py")
    for text, complaint in (("print('\"no sympy\"')", r"can't be used \(no sympy\)"), ("1/0", "died as it started")):
        (tmp_path / "worker.py").write_text(text)
        with pytest.raises(UsageError, match=complaint):
            worker.judge("1", "1")


def test_maths_without_math_verify_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UsageError, match=r"pip install 'offload-engine\[eval\]'"):
        grade_maths(r"\boxed{1}", "1")


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        (r"\boxed{B}", RIGHT),
        (r"\boxed{ B }", RIGHT),
        (r"\boxed{\text{B}}", RIGHT),
        (r"\boxed{C}, no: \boxed{B}", RIGHT),
        (r"\boxed{B) iron}", SOFT),
        (r"\boxed{(B)}", SOFT),
        ("Answer: B", SOFT),
        (r"\boxed{C} Answer: B", WRONG),
        (r"\boxed{A or B}", WRONG),
        (r"\boxed{b}", WRONG),
        ("B", WRONG),
        ("", WRONG),
    ],
)
def test_boxed_letters(text: str, grade: Grade):
    assert grade_boxed_letter(text, "B") == grade


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("Since 2 + 2 = 4.\nAnswer: B", RIGHT),
        ("Answer: C\nNo.\n**Answer: B**", RIGHT),
        ("answer : $B$", RIGHT),
        ("Answer: (B)", RIGHT),
        ("Answer: B\nAnswer: C", WRONG),
        ("Answer: Because", WRONG),
        ("Answer: a number.\nAnswer:\n\nB is not it", WRONG),
        ("Answer: B) the second", RIGHT),
        ("Answer: B. It is 4", RIGHT),
        ("**Answer:** b", RIGHT),
        ("Answer: B\nAnswer: a better one", RIGHT),
        ("Answer:\nB", WRONG),
        (r"Answer: \boxed{B}", SOFT),
        (r"Answer: $\boxed{\text{B}}$", SOFT),
        (r"Answer: \text{B}", SOFT),
        ("Final Answer: B", SOFT),
        ("Answer: C\nFinal answer: B", SOFT),
        ("Final Answer: C", WRONG),
        (r"\boxed{B}", SOFT),
        (r"Answer: C \boxed{B}", WRONG),
        ("The answer is B.", WRONG),
        ("", WRONG),
    ],
)
def test_answer_lines(text: str, grade: Grade):
    assert grade_answer_line(text, "B") == grade


def test_only_the_rows_own_labels_are_labels():
    text = "Answer: B\nAnswer: E"
    assert grade_answer_line(text, "B", "ABCD") == RIGHT
    assert grade_answer_line(text, "B", "ABCDE") == grade_answer_line(text, "B") == WRONG
    assert grade_boxed_letter("Answer: 3", "3", ("1", "2", "3")) == grade_boxed_letter("Answer: 3", "3") == SOFT
    assert grade_boxed_letter("Answer: 3", "B", ("1", "2", "3")) == WRONG


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{a{b}c} d}", "a{b}c"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed 3", None),
    ],
)
def test_the_last_box_is_the_last_balanced_one(text: str, box: str | None):
    assert last_box(text) == box


@given(st.lists(st.sampled_from([*"ab{}\\ 0129.,#:B\n", "\\boxed{", "Answer: "])).map("".join))
def test_no_text_is_an_error_and_soft_is_never_stricter(text: str):
    for grader, gold in ((grade_number, "#### 12"), (grade_boxed_letter, "B"), (grade_answer_line, "B")):
        grade = grader(text, gold)
        assert grade.soft or not grade.strict


def test_saved_answers_that_cannot_be_graded_are_named_by_line(tmp_path: Path):
    path = tmp_path / "answers.jsonl"
    cases = {
        '{"generation": "7"}': r"answers.jsonl:2: no field 'gold'; found 'generation'",
        '{"generation": 7, "gold": "7"}': r"answers.jsonl:2: field 'generation' is 7; wanted a text",
        '{"generation": "7", "gold": "seven"}': r":2: the gold answer 'seven' holds no number .*; name .*--task",
        '{"generation": "7", "gold": "nan"}': r"answers.jsonl:2: the gold answer 'nan' holds no number",
        '{"generation": null, "gold": "7"}': r"answers.jsonl:2: field 'generation' is null; wanted a text",
        '["7"]': r"answers.jsonl:2: found \['7'\]; wanted a JSON object",
        "{": r"answers.jsonl:2: not JSON \(.*\); wanted one JSON object per line",
    }
    for line, complaint in cases.items():
        path.write_text('{"generation": "", "gold": "1"}\n' + line)
        with pytest.raises(UsageError, match=complaint):
            grade_saved(path, grade_number)
    path.write_text("\n")
    with pytest.raises(UsageError, match="holds no answers"):
        grade_saved(path, grade_number)
