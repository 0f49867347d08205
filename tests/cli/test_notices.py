"""What the engine wants known, told once each."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from offload_engine.cli import report


def test_what_came_up_since_is_told_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(report, "note", told.append)
    monkeypatch.setattr(report, "plan_line", lambda _plan: "plan: short")
    engine: Any = SimpleNamespace(notices=("one",), plan=SimpleNamespace(warnings=("two",), table=lambda: "a table"))
    announced = report.announce(engine, whole_plan=False)
    assert told == ["plan: short", "note: one"]
    engine.notices = ("one", "three")
    report.announce_later(engine, announced)
    assert told == ["plan: short", "note: one", "note: three"]


def test_the_plans_own_warnings_are_in_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(report, "note", told.append)
    engine: Any = SimpleNamespace(notices=("one", "two"), plan=SimpleNamespace(warnings=("two",), table=lambda: "it"))
    announced = report.announce(engine, whole_plan=True)
    assert told == ["it", "note: one"]
    report.announce_later(engine, announced)
    assert len(told) == 2
