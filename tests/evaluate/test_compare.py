"""Paired comparison of two runs, and what can't be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from offload_engine.errors import UsageError
from offload_engine.evaluate.compare import compare, comparison_table
from offload_engine.evaluate.records import SavedRun
from offload_engine.evaluate.statistics import Paired, accuracy_ratio, mcnemar


def run(name: str, outcomes: str, unique: float | None = 100.0, **settings: Any) -> SavedRun:
    """A run whose sample i is right where letter i of `outcomes` is x."""
    records = [
        {
            "id": str(i),
            "prompt": f"question {i}",
            "gold": "1",
            "strict": letter == "x",
            "soft": True,
            "unique_experts": unique and unique + i % 3,
            "steps": 4,
            "tokens": 20,
            "seconds": 0.5,
            "bytes_moved": 1000 if unique == 100.0 else 250,
        }
        for i, letter in enumerate(outcomes)
    ]
    return SavedRun(Path(name), {"task": "sums", "routing": {"name": name}, **settings}, {}, records)


A, B = run("original", "xxxxxxxx..xx" * 20), run("dmoe", "xxxxxxx.x.xx" * 20, unique=25.0)


def test_a_comparison_is_paired():
    result = compare(A, B)
    strict = result["strict"]
    pairs = Paired(both=180, only_a=20, only_b=20, neither=20)
    assert {name: strict[name] for name in pairs._fields} == pairs._asdict()
    assert strict["mcnemar_p"] == mcnemar(20, 20) == 1.0
    assert strict["kept"]["ratio"] == 1.0
    interval = accuracy_ratio(pairs)
    assert interval is not None
    assert (strict["kept"]["low"], strict["kept"]["high"]) == interval
    assert interval.low < strict["kept"]["lower_bound"] < 1
    assert strict["difference"]["low"] < strict["difference"]["value"] == 0 < strict["difference"]["high"]
    assert result["soft"]["both"] == 240
    assert result["unique_experts"]["reduction"] == pytest.approx(1 - 26 / 101)
    assert result["unique_experts"]["low"] < 1 - 26 / 101 < result["unique_experts"]["high"]
    assert result["ratios"] == {"steps": 1.0, "tokens": 1.0, "seconds": 1.0, "bytes_moved": 0.25}
    assert result["settings"] == {"routing.name": ["original", "dmoe"]}
    assert json.loads(json.dumps(result)) == result
    shown = comparison_table(result)
    assert "right in A alone 20, in B alone 20; McNemar p 1" in shown
    assert "101.00 -> 26.00, 74.26 % fewer" in shown
    assert "original -> dmoe" in shown


def test_the_order_of_answering_does_not_matter():
    shuffled = SavedRun(B.directory, B.settings, {}, B.records[::-1])
    assert compare(A, shuffled)["strict"] == compare(A, B)["strict"]


def test_runs_without_counts_or_right_answers_are_compared_as_far_as_they_go():
    result = compare(run("a", "...", unique=None), run("b", "x..", unique=None))
    assert result["unique_experts"] is None
    assert result["strict"]["kept"] is None
    assert "strict" in comparison_table(result)


def test_of_a_run_with_nothing_right_nothing_is_kept():
    kept = compare(run("a", "xx.." * 10), run("b", "...." * 10))["strict"]["kept"]
    assert kept["ratio"] == kept["low"] == kept["lower_bound"] == 0
    assert 0 < kept["high"] < 0.5


def test_kept_comes_with_the_bound_of_95_percent_above():
    strict = compare(A, B)["strict"]
    bound = accuracy_ratio(Paired(both=180, only_a=20, only_b=20, neither=20), 1.6448536269514722)
    assert bound is not None
    assert strict["kept"]["lower_bound"] == bound.low


def test_incomplete_runs_are_said_to_be():
    result = compare(run("a", "xxx", n=3), run("b", "xx.", n=9))
    assert result["wanted"] == [3, 9]
    assert "samples         3 (B is not complete: 3 of 9)\n" in comparison_table(result)
    assert "complete" not in comparison_table(compare(A, B))


def test_the_same_sample_must_have_the_same_gold_answer():
    other = run("b", "xx")
    other.records[1]["gold"] = "2"
    with pytest.raises(UsageError, match="sample '1' has another gold in a than in b"):
        compare(run("a", "xx"), other)


def test_runs_of_other_samples_are_refused_naming_the_first():
    with pytest.raises(UsageError, match="sample '2' is in a but not in b; they have 3 and 2 answers; finish both"):
        compare(run("a", "xxx"), run("b", "xx"))
    with pytest.raises(UsageError, match="sample '2' is in b but not in a"):
        compare(run("a", "xx"), run("b", "xxx"))
    other = run("b", "xx")
    other.records[1]["prompt"] = "another question"
    with pytest.raises(UsageError, match="sample '1' has another prompt in a than in b"):
        compare(run("a", "xx"), other)
    with pytest.raises(UsageError, match="a: holds no answers"):
        compare(run("a", ""), run("b", ""))
