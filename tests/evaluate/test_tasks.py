"""Tasks: which samples there are, what is asked, and what a dataset file may not look like."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from offload_engine.errors import UsageError
from offload_engine.evaluate.arithmetic import generate
from offload_engine.evaluate.grading import Grade
from offload_engine.evaluate.tasks import grader_of, make_task

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k_test.jsonl"
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "gsm8k": (
        {"question": "Two and two?", "answer": "2+2=4\n#### 4"},
        "Please answer the question step by step and put the answer in \\boxed{}. Two and two?",
        "\\boxed{4}",
    ),
    "math500": (
        {"problem": "Half?", "answer": "\\frac12", "solution": "...", "unique_id": "test/a/1.json", "level": 2},
        "Please answer the question step by step and put the answer in \\boxed{}. Half?",
        "\\boxed{0.5}",
    ),
    "arc-c": (
        {
            "id": "Mercury_1",
            "question": "Which metal?",
            "choices": {"text": ["wood", "iron"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "Please answer the question step by step and put the letter of the right choice in \\boxed{}. Which metal?\n\n"
        "A) wood\nB) iron",
        "\\boxed{B}",
    ),
    "mmlu": (
        {"question": "1 + 1?", "subject": "sums", "choices": ["1", "2", "3", "4"], "answer": 1},
        "Answer the following multiple choice question. The last line of your response should be of the following "
        "format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step before "
        "answering.\n\n1 + 1?\n\nA) 1\nB) 2\nC) 3\nD) 4",
        "Answer: B",
    ),
}


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_published_fields_become_prompts_and_right_answers_are_right(tmp_path: Path, name: str, write: Any):
    row, prompt, right = CASES[name]
    subject = "sums" if name == "mmlu" else None
    task = make_task(name, data=write(tmp_path / "data", row), subject=subject)
    [sample] = task.samples
    assert sample.prompt == prompt
    assert task.grade(right, sample.gold) == Grade(True, True)
    assert task.grade("no idea", sample.gold) == Grade(False, False)
    assert task.settings["task"] == name
    assert task.settings["n"] == 1
    assert len(task.settings["sha256"]) == 64


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K's test set is not beside this checkout")
def test_gsm8k_as_published():
    task = make_task("gsm8k", data=GSM8K)
    assert len(task.samples) == 1319
    assert len({sample.id for sample in task.samples}) == 1319
    assert task.samples[0].prompt.startswith(
        "Please answer the question step by step and put the answer in \\boxed{}. J"
    )
    assert all(task.grade(sample.gold, sample.gold).soft for sample in task.samples[:50]), "a number after ####"
    assert [sample.id for sample in make_task("gsm8k", data=GSM8K, n=3).samples] == ["0", "1", "2"]


def test_generated_problems_are_those_of_their_seed():
    task = make_task("tiny-arithmetic", n=5)
    problems = list(generate(2, 5))
    assert [sample.prompt for sample in task.samples] == [problem.question for problem in problems]
    assert [sample.tags["kind"] for sample in task.samples] == [problem.kind for problem in problems]
    for sample, problem in zip(task.samples, problems, strict=True):
        assert task.grade(problem.answer, sample.gold) == Grade(True, True)
    other = make_task("tiny-arithmetic", n=5, seed=3)
    assert {sample.id for sample in other.samples}.isdisjoint(sample.id for sample in task.samples)
    assert len(make_task("tiny-arithmetic").samples) == 1000


def test_subjects(tmp_path: Path):
    row = CASES["mmlu"][0]
    path = write_lines(tmp_path / "all.jsonl", row, row | {"subject": "logic"}, row | {"subject": "sums"})
    assert len(make_task("mmlu:all", data=path).samples) == 3
    for named in (make_task("mmlu:sums", data=path), make_task("mmlu", subject="sums", data=path)):
        assert [sample.id for sample in named.samples] == ["0", "2"]
        assert named.settings["subject"] == "sums"
        assert named.notices == ()
    with pytest.raises(UsageError, match=r"all.jsonl: no rows of subject 'cooking'; there are logic, sums; name one"):
        make_task("mmlu:cooking", data=path)
    with pytest.raises(UsageError, match=r"no rows of subject 'high_school_mathematics'; there are logic, sums"):
        make_task("mmlu", data=path)
    path = write_lines(path, row, row | {"subject": "high_school_mathematics", "answer": "C"})
    task = make_task("mmlu", data=path)
    assert [(sample.id, sample.gold, sample.labels) for sample in task.samples] == [("1", "C", tuple("ABCD"))]
    assert task.settings["subject"] == "high_school_mathematics"


def test_a_file_that_tells_no_subject_is_taken_whole_and_said_so(tmp_path: Path):
    untold = {key: value for key, value in CASES["mmlu"][0].items() if key != "subject"}
    path = write_lines(tmp_path / "one.jsonl", untold)
    for name, subject in (("mmlu", None), ("mmlu:sums", "sums")):
        task = make_task(name, data=path)
        assert len(task.samples) == 1
        assert task.settings["subject"] == subject
        [notice] = task.notices
        assert "one.jsonl: no row has a field 'subject', so all of them are taken" in notice


def test_samples_know_their_place_and_their_choices(tmp_path: Path):
    arc = CASES["arc-c"][0]
    path = write_lines(tmp_path / "data.jsonl", "", arc)
    task = make_task("arc-c", data=path)
    [sample] = task.samples
    assert sample.where == f"{path}:2"
    assert sample.labels == ("A", "B")
    assert str(path) not in json.dumps(task.settings | {"data": None})
    assert task.grade("Answer: B\nAnswer: C", sample.gold, sample.labels).soft, "C is none of the choices"
    assert not task.grade("Answer: B\nAnswer: A", sample.gold, sample.labels).soft


def test_math500_needs_its_grader_when_the_task_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_lines(tmp_path / "data.jsonl", CASES["math500"][0])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for attempt in (lambda: make_task("math500", data=path), lambda: grader_of("math500")):
        with pytest.raises(
            UsageError, match=r"math-verify, which isn't installed; pip install 'offload-engine\[eval\]'"
        ):
            attempt()


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("gsm8k", {"question": None}, "field 'question' is null; wanted a text"),
        ("gsm8k", {"question": " "}, "field 'question' is ' '; wanted a text"),
        ("gsm8k", {"answer": 4}, "field 'answer' is 4; wanted a text"),
        ("gsm8k", {"answer": "four"}, "field 'answer' has no number after '####'; found 'four'"),
        ("gsm8k", {"answer": "x" * 50 + "#### four"}, "has no number after '####'; found '...xxxxx"),
        ("gsm8k", {"answer": "#### nan"}, "field 'answer' has no number after '####'; found '#### nan'"),
        ("math500", {"answer": None}, "field 'answer' is null; wanted a text"),
        ("arc-c", {"choices": ["wood"]}, "'choices' is ['wood']; wanted lists 'text' and 'label' of equal length"),
        (
            "arc-c",
            {"choices": {"text": ["a", "b"], "label": ["A"]}},
            "'label': ['A']}; wanted lists 'text' and 'label'",
        ),
        ("arc-c", {"answerKey": "E"}, "field 'answerKey' is 'E', which is none of the labels A, B"),
        ("mmlu", {"choices": "ab"}, "field 'choices' is 'ab'; wanted a list of 2 to 10 texts"),
        ("mmlu", {"answer": 4}, "field 'answer' is 4; wanted 0 to 3 or one of ABCD"),
        ("mmlu", {"answer": True}, "field 'answer' is True; wanted 0 to 3 or one of ABCD"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, name: str, change: dict[str, Any], complaint: str):
    good = CASES[name][0] | ({"id": "Mercury_0"} if name == "arc-c" else {"unique_id": "0"})
    path = write_lines(tmp_path / "data.jsonl", good, "", CASES[name][0] | change)
    with pytest.raises(UsageError) as refused:
        make_task(name, data=path, subject="all" if name == "mmlu" else None)
    assert str(refused.value).startswith(f"{path}:3: ")
    assert complaint in str(refused.value)


def test_files_that_are_no_dataset(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    row = CASES["gsm8k"][0]
    for content, complaint in (
        (f"{json.dumps(row)}\n{{'question'", "data.jsonl:2: not JSON"),
        ("[" * 100_000, "data.jsonl:1: not JSON"),
        ("7\n", "data.jsonl:1: found 7; wanted a JSON object"),
        ("\n\n", "data.jsonl: holds no samples"),
        ("PAR1 not really", "data.jsonl: can't be read as parquet"),
    ):
        path.write_text(content)
        with pytest.raises(UsageError, match=complaint):
            make_task("gsm8k", data=path)
    with pytest.raises(UsageError, match=r"absent.jsonl: can't be read \(No such file or directory\)"):
        make_task("gsm8k", data=tmp_path / "absent.jsonl")
    with pytest.raises(UsageError, match=r"can't be read \(Is a directory\)"):
        make_task("gsm8k", data=tmp_path)
    arc = CASES["arc-c"][0]
    with pytest.raises(UsageError, match=r"data.jsonl:2: id 'Mercury_1' occurs already in .*data.jsonl:1"):
        make_task("arc-c", data=write_lines(path, arc, arc))
    with pytest.raises(UsageError, match=r"n is 3, but .*data.jsonl holds 1 samples"):
        make_task("gsm8k", data=write_lines(path, row), n=3)


def test_a_bad_row_of_parquet_is_named_by_its_number(tmp_path: Path):
    row = CASES["gsm8k"][0]
    path = write_parquet(tmp_path / "data.parquet", row, row | {"answer": "four"})
    with pytest.raises(UsageError, match=r"data.parquet, row 2: field 'answer'"):
        make_task("gsm8k", data=path)
    assert len(make_task("gsm8k", data=path, n=1).samples) == 1, "rows are read as they are needed"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "gsm8"}, r"task 'gsm8' doesn't exist; did you mean 'gsm8k'\? there are tiny-arithmetic, gsm8k, "),
        ({"name": "Tiny_Arithmetic"}, "did you mean 'tiny-arithmetic'"),
        ({"name": "xyzzy"}, "task 'xyzzy' doesn't exist; there are tiny-arithmetic, gsm8k, math500, arc-c, mmlu"),
        ({"name": "tiny-arithmetic", "n": 0}, "n is 0; wanted at least 1 sample"),
        ({"name": "tiny-arithmetic", "data": Path("x")}, "data is 'x', but the problems of tiny-arithmetic are gener"),
        ({"name": "tiny-arithmetic:hard"}, "subject is 'hard', but task tiny-arithmetic has none"),
        ({"name": "gsm8k", "seed": 2}, "seed is 2, but the samples of gsm8k come from a file"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: dict[str, Any], complaint: str):
    with pytest.raises(UsageError, match=complaint):
        make_task(**arguments)


def test_graders_by_name():
    assert grader_of("tiny-arithmetic") is grader_of("gsm8k")
    assert grader_of("mmlu:logic") is grader_of("mmlu")
    with pytest.raises(UsageError, match="did you mean 'mmlu'"):
        grader_of("mmluu")


def test_without_a_file_the_hubs_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    asked: list[tuple[str, str, str]] = []

    def give(repository: str, file: str, *, repo_type: str) -> str:
        asked.append((repository, file, repo_type))
        name = {"openai/gsm8k": "gsm8k", "cais/mmlu": "mmlu"}.get(repository, "math500")
        return str(write_lines(tmp_path / "fetched", CASES[name][0]))

    monkeypatch.setattr(hub, "hf_hub_download", give)
    assert make_task("gsm8k").settings["data"] == "hub:openai/gsm8k"
    monkeypatch.setitem(CASES["mmlu"][0], "subject", "high_school_mathematics")
    assert make_task("mmlu").samples[0].tags == {"subject": "high_school_mathematics"}
    make_task("math500")
    assert asked == [
        ("openai/gsm8k", "main/test-00000-of-00001.parquet", "dataset"),
        ("cais/mmlu", "high_school_mathematics/test-00000-of-00001.parquet", "dataset"),
        ("HuggingFaceH4/MATH-500", "test.jsonl", "dataset"),
    ]


def test_a_hub_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*_args: Any, **_options: Any) -> str:
        raise LocalEntryNotFoundError("no network,\nno cache")

    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(UsageError, match=r"openai/gsm8k: .* \(no network, no cache\); give a file with --data"):
        make_task("gsm8k")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"pip install 'offload-engine\[hub\]'"):
        make_task("gsm8k")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_parquet(tmp_path / "data.parquet", CASES["gsm8k"][0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"pip install 'offload-engine\[eval\]'"):
        make_task("gsm8k", data=path)
