"""The programs of examples/ run as their first lines say, on the built-in model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted((ROOT / "examples").glob("*.py"))


def run(name: str | Path, *arguments: object, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", ROOT / "examples" / name, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_chat_knows_what_was_said_before() -> None:
    question = "Tom has 3 apples and buys 4 more. How many apples does Tom have?\n"
    once = run("chat_loop.py", stdin=question)
    twice = run("chat_loop.py", stdin=question + "And how many are 2 and 2?\n")
    assert "7" in once
    assert twice.startswith(once)
    assert len(twice) > len(once)


def test_a_file_of_prompts_is_answered_line_by_line(tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("".join(f"How much is {number} + 5?\n" for number in range(6)), encoding="utf-8")
    run("batch_file.py", prompts, answers)
    found = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    assert sorted(one["line"] for one in found) == [1, 2, 3, 4, 5, 6]
    assert all(one["answer"] and one["finish_reason"] == "eos" for one in found)


def test_an_async_program_goes_on_while_the_engine_answers() -> None:
    shown = run("async_app.py")
    assert "no answer within 10 ms" in shown
    slots = re.search(r"with (\d+) expert slots: (.*)", shown)
    assert slots is not None
    assert int(slots[1]) > 1
    assert "7" in slots[2]


def test_an_eviction_policy_of_ones_own_reads_other_experts_for_the_same_answer() -> None:
    shown = run("own_eviction.py")
    found = re.findall(r"^(.+): (\d+) experts read for \[", shown, re.MULTILINE)
    assert [name for name, _count in found] == ["next-use", "first-in"]
    assert int(found[0][1]) < int(found[1][1])


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.name)
def test_every_example_is_tested_and_short(program: Path) -> None:
    assert f'"{program.name}"' in Path(__file__).read_text(encoding="utf-8")
    assert len(program.read_text(encoding="utf-8").splitlines()) < 80


def test_the_programs_of_the_manual_run_as_they_stand(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    program = tmp_path / "manual.py"
    program.write_text("\n".join(blocks), encoding="utf-8")
    shown = run(program)
    assert "step" in shown
    assert "0 True\n1 True\n" in shown
    assert "predictor is a policy of one's own" in shown
