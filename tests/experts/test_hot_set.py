from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from offload_engine import Engine, SamplingParams
from offload_engine.config import EngineConfig
from offload_engine.core import ExpertKey
from offload_engine.engine import assembly
from offload_engine.engine import engine as engine_module
from offload_engine.engine.assembly import keeps_hot_set
from offload_engine.experts import hot_set
from offload_engine.experts.hot_set import FILE, HotSet, fingerprint, places, recall, remember
from tests.checkpoints import tiny_config, write_checkpoint

KNOWN = [ExpertKey(layer, expert) for layer in (1, 2) for expert in range(4)]


def used(*forwards: tuple[int, list[int]]) -> HotSet:
    hot = HotSet()
    for layer, experts in forwards:
        hot.begin()
        hot.use(layer, experts)
    return hot


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(100))
    return directory


def hottest(hot: HotSet, count: int = 9) -> list[ExpertKey]:
    return [key for key, _uses in hot.hottest(count)]


def test_the_most_used_come_first_and_ties_go_to_the_lower() -> None:
    hot = used((1, [0, 1]), (1, [1]))
    assert hottest(hot) == [ExpertKey(1, 1), ExpertKey(1, 0)]
    hot.use(2, [3, 2])
    assert hottest(hot, 3) == [ExpertKey(1, 1), ExpertKey(2, 2), ExpertKey(2, 3)]


def test_old_uses_fade() -> None:
    hot = used(*[(1, [0])] * 3)
    for _ in range(2 * hot_set.HALF_LIFE):
        hot.begin()
    hot.use(1, [1])
    assert hottest(hot, 1) == [ExpertKey(1, 1)]


def test_the_order_survives_any_number_of_forwards() -> None:
    hot = used((1, [0]), (1, [0]))
    for _ in range(300 * hot_set.HALF_LIFE):
        hot.begin()
    hot.use(1, [2, 3])
    hot.use(1, [3])
    assert hottest(hot) == [ExpertKey(1, 3), ExpertKey(1, 2), ExpertKey(1, 0)]


def test_what_is_remembered_is_recalled(directory: Path) -> None:
    assert remember(directory, used((1, [0, 1]), (2, [3]), (1, [1])), 2) == directory / FILE
    hot, notice = recall(directory, KNOWN)
    assert hottest(hot) == [ExpertKey(1, 1), ExpertKey(2, 3)]
    assert notice is None
    assert hot.forwards == 0
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == [FILE], "nothing is left aside"


def test_a_run_that_generated_nothing_leaves_the_memory_alone(directory: Path) -> None:
    remember(directory, used((1, [0])), 4)
    before = (directory / FILE).read_bytes()
    assert remember(directory, recall(directory, KNOWN).hot, 4) is None
    assert (directory / FILE).read_bytes() == before


def test_where_the_checkpoint_is_read_only_the_users_cache_serves(directory: Path) -> None:
    (directory / FILE).mkdir()  # root may write anywhere, but not replace a folder
    path = remember(directory, used((1, [0])), 4)
    assert path == places(directory)[1]
    assert path is not None
    assert path.parent.parent.parent.name == "cache"
    assert hottest(recall(directory, KNOWN).hot) == [ExpertKey(1, 0)]


def test_nowhere_to_write_is_no_error(directory: Path) -> None:
    (directory / FILE).mkdir()
    (directory.parent / "cache").write_text("a file where a folder should be")
    assert remember(directory, used((1, [0])), 4) is None
    assert hottest(recall(directory, KNOWN).hot) == []


def test_a_user_without_a_home_has_the_place_beside_the_checkpoint(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def homeless() -> Path:
        raise RuntimeError("could not determine home directory")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert remember(directory, used((1, [0])), 4) == directory / FILE
    assert hottest(recall(directory, KNOWN).hot) == [ExpertKey(1, 0)]


def test_a_checkpoint_that_is_gone_is_not_brought_back(directory: Path) -> None:
    directory.rename(directory.parent / "elsewhere")
    assert remember(directory, used((1, [0])), 4) != directory / FILE
    assert not directory.exists()


def test_another_checkpoint_is_another_memory(directory: Path) -> None:
    remember(directory, used((1, [0])), 4)
    before = fingerprint(directory)
    (directory / "model.safetensors").write_bytes(bytes(101))
    assert fingerprint(directory) != before
    hot, notice = recall(directory, KNOWN)
    assert hottest(hot) == []
    assert notice is None


def test_experts_that_the_checkpoint_lacks_are_left_out(directory: Path) -> None:
    remember(directory, used((1, [0, 9]), (7, [0])), 4)
    assert hottest(recall(directory, KNOWN).hot) == [ExpertKey(1, 0)]


@pytest.mark.parametrize(
    "damage",
    [b"", b"\xff\x00", b"[]", b'{"format":"offload_engine.hot_experts","version":2,"checkpoint":"","experts":[]}'],
)
def test_a_damaged_memory_is_ignored_with_a_notice(directory: Path, damage: bytes) -> None:
    (directory / FILE).write_bytes(damage)
    hot, notice = recall(directory, KNOWN)
    assert hottest(hot) == []
    assert notice == f"{directory / FILE}: no memory of hot experts; ignored, and written anew at the end"
    remember(directory, used((1, [0])), 4)
    assert recall(directory, KNOWN).notice is None


@pytest.mark.parametrize("entry", [[1, 0], [1, 0, -1.0], [-1, 0, 1.0], [1, "0", 1.0], [1, 0, 1.0, 1]])
def test_an_entry_that_makes_no_sense_is_damage(directory: Path, entry: list[Any]) -> None:
    remember(directory, used((1, [0])), 4)
    saved = json.loads((directory / FILE).read_bytes())
    (directory / FILE).write_text(json.dumps(saved | {"experts": [entry]}))
    assert recall(directory, KNOWN).notice is not None


class TestEngine:
    @pytest.fixture(autouse=True)
    def warm_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(assembly, "keeps_hot_set", keeps_hot_set)

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        return write_checkpoint(tmp_path, tiny_config(), seed=1)

    def answer(self, checkpoint: Path, **options: Any) -> tuple[list[int], Engine]:
        settings = {"gpu_mem": "3GB", "predictor": "none", **options}
        with Engine.from_pretrained(checkpoint, **settings) as engine:
            engine._parts.experts.wait_warm()
            done = engine.generate(list(range(5, 50)), SamplingParams(max_new_tokens=24, threshold=0.2))
            return done.token_ids, engine

    def test_the_next_start_finds_what_this_one_used(self, checkpoint: Path) -> None:
        expected, cold = self.answer(checkpoint)
        ids, warm = self.answer(checkpoint)
        assert ids == expected
        assert cold.stats.warmed == 0
        assert warm.stats.warmed > 0
        assert warm.stats.misses < cold.stats.misses
        assert warm.stats.prefetches_issued == warm.stats.prefetches_wasted == 0

    def test_it_can_be_turned_off(self, checkpoint: Path) -> None:
        self.answer(checkpoint, hot_set="off")
        assert not (checkpoint / FILE).exists()
        self.answer(checkpoint)
        assert self.answer(checkpoint, hot_set="off")[1].stats.warmed == 0

    def test_a_damaged_memory_costs_a_notice(self, checkpoint: Path) -> None:
        (checkpoint / FILE).write_text("nonsense")
        _ids, engine = self.answer(checkpoint)
        assert sum("no memory of hot experts" in notice for notice in engine.notices) == 1
        assert self.answer(checkpoint)[1].stats.warmed > 0

    def test_closing_while_it_warms_up_leaves_no_thread(self, checkpoint: Path) -> None:
        self.answer(checkpoint)
        before = set(threading.enumerate())
        engine = Engine.from_pretrained(checkpoint, gpu_mem="3GB")
        assert set(threading.enumerate()) > before
        engine.close()
        assert set(threading.enumerate()) <= before

    def test_closing_releases_everything_whatever_remembering_does(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(*_arguments: object) -> None:
            raise RuntimeError("no memory today")

        before = set(threading.enumerate())
        engine = Engine.from_pretrained(checkpoint, gpu_mem="3GB")
        monkeypatch.setattr(assembly, "remember", failing)
        with pytest.raises(RuntimeError, match="no memory today"):
            engine.close()
        assert set(threading.enumerate()) <= before
        assert all(parameter.is_meta for parameter in engine._parts.model.parameters())
        assert not any(cache.keys.numel() for cache in engine._decoder.caches)

    @pytest.mark.parametrize("late", ["compute_threads", "PrefixCache"])
    def test_a_start_that_fails_late_leaves_no_thread(
        self, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, late: str
    ) -> None:
        def failing(*_arguments: object) -> None:
            raise RuntimeError("a late failure")

        self.answer(checkpoint)
        before = set(threading.enumerate())
        monkeypatch.setattr(assembly if late == "compute_threads" else engine_module, late, failing)
        with pytest.raises(RuntimeError, match="a late failure"):
            Engine.from_pretrained(checkpoint, gpu_mem="3GB")
        assert set(threading.enumerate()) <= before

    def test_answers_that_depend_on_the_cache_start_cold(self) -> None:
        assert keeps_hot_set(EngineConfig(model="somewhere"))
        assert not keeps_hot_set(EngineConfig(model="somewhere", residency_bonus=1.0))
        assert not keeps_hot_set(EngineConfig())
