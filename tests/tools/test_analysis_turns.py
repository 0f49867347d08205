"""Models take turns: one engine at a time, equal caches, every setting once a round."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offload_engine.errors import OffloadError
from tools.analysis.study import QUICK, Role, Study
from tools.analysis.turns import take_turns

SLAB = 100
ALL = 50
SETTINGS = ("base-1", "base-2", "distilled-1")


class Machine:
    """Engines whose caches hold what `room` says; notes who is open."""

    def __init__(self, room: dict[str, list[int]]) -> None:
        self.room = room
        self.open: list[str] = []
        self.opened: list[str] = []
        self.answered: list[str] = []

    def works(self) -> None:
        """Whenever something is measured."""

    @contextmanager
    def engine(self, _study: Study, role: Role, **options: Any) -> Iterator[Any]:
        assert self.open == [], "two engines at once"
        room = self.room[role]
        slots = min(room.pop(0) if len(room) > 1 else room[0], options.get("expert_mem", ALL * SLAB) // SLAB)
        self.open.append(role)
        self.opened.append(role)
        plan = SimpleNamespace(slots=slots, slab_bytes=SLAB, all_experts=ALL)
        generate = lambda *_: self.answered.append(role)  # noqa: E731
        yield SimpleNamespace(plan=plan, generate=generate, config=SimpleNamespace(model=role))
        self.open.pop()


def turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, room: dict[str, list[int]], **study: Any
) -> tuple[Any, Machine, list[tuple[str, str]]]:
    machine, measured = Machine(room), []

    def measure(engine: Any, setting: str) -> int:
        machine.works()
        measured.append((engine.config.model, setting))
        return len(measured)

    monkeypatch.setattr(Study, "open", lambda self, role, **options: machine.engine(self, role, **options))
    made = Study(**{"model": None, "base": "base", "out": tmp_path, "quick": True, **study})
    empty: dict[Role, dict[str, Any]] = {"base": {}, "distilled": {}}
    roles: dict[str, Role] = {"base": "base", "distilled": "distilled"}
    taken = take_turns(made, "test", empty, SETTINGS, lambda setting: roles[setting.split("-")[0]], measure)
    return taken, machine, measured


def test_every_setting_once_a_round_on_its_own_model_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken, machine, measured = turns(monkeypatch, tmp_path, {"base": [ALL], "distilled": [ALL]})
    assert taken.slots == ALL
    assert {setting: len(found) for setting, found in taken.rounds.items()} == dict.fromkeys(SETTINGS, QUICK.rounds)
    assert all(setting.startswith(model) for model, setting in measured)
    for number in range(QUICK.rounds):
        assert sorted(setting for _, setting in measured[3 * number : 3 * number + 3]) == sorted(SETTINGS)
    assert len(machine.answered) == 2 * QUICK.rounds * QUICK.prompts, "not warmed up"
    assert f"test: 6 of 6, round {QUICK.rounds} of {QUICK.rounds}" in capsys.readouterr().err


def test_how_long_the_rest_takes_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Machine, "works", lambda _machine: now.__setitem__(0, now[0] + 4.0))
    turns(monkeypatch, tmp_path, {"base": [ALL], "distilled": [ALL]})
    assert capsys.readouterr().err.splitlines() == [
        "  test: 2 of 6, round 1 of 2, 4 s each, 16 s left",
        "  test: 4 of 6, round 2 of 2, 4 s each, 8 s left",
        "  test: 6 of 6, round 2 of 2, 4 s each, 0 s left",
    ]


def test_one_engine_serves_both_where_there_is_no_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken, machine, measured = turns(monkeypatch, tmp_path, {"distilled": [ALL]}, base=None)
    assert set(machine.opened) == {"distilled"}
    assert len(measured) == 3 * QUICK.rounds
    assert all(taken.rounds.values())


def test_both_models_get_the_smaller_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    room = {"base": [30], "distilled": [ALL]}
    taken, _, _ = turns(monkeypatch, tmp_path, room, engine={"gpu_mem": 10**9})
    assert taken.slots == 30
    taken, _, _ = turns(monkeypatch, tmp_path, room)
    assert taken.slots == 27, "free memory comes and goes"


def test_memory_that_became_scarce_stops_the_measurement(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="distilled: its expert cache holds 20 experts, but 50 at the start"):
        turns(monkeypatch, tmp_path, {"base": [ALL], "distilled": [ALL, 20]})
