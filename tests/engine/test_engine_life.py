"""Engines beside each other, from several threads, and at their end."""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offload_engine import Engine, EngineClosedError, SamplingParams, UsageError
from tests.checkpoints import tiny_config, write_checkpoint

PARAMS = SamplingParams(max_new_tokens=40, threshold=0.2)
PROMPT = list(range(5, 50))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tiny_config(), seed=1)


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, gpu_mem="4GB", max_context=256, **options)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> list[int]:
    with open_engine(checkpoint) as engine:
        return engine.generate(PROMPT, PARAMS).token_ids


@pytest.fixture
def ours() -> Callable[[], list[str]]:
    """The threads that engines have begun since; those of other files may live as long as the tests do."""
    before = set(threading.enumerate())
    names = ("expert-reader", "page-toucher", "engine-closer")
    return lambda: [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith(names)]


def test_of_many_threads_one_is_answered_and_the_others_are_refused(checkpoint: Path, wanted: list[int]) -> None:
    """Whoever comes while another is answered hears so; nobody gets an answer mixed with another's."""
    answers: list[list[int]] = []
    refusals: list[str] = []
    other: list[BaseException] = []

    def ask() -> None:
        for _ in range(12):
            try:
                answers.append(engine.generate(PROMPT, PARAMS).token_ids)
            except UsageError as error:
                refusals.append(str(error))
            except BaseException as error:
                other.append(error)
                raise

    with open_engine(checkpoint, expert_mem="100KB") as engine:
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert engine.generate(PROMPT, PARAMS).token_ids == wanted
    assert not other
    assert refusals
    assert all("busy with another call" in one for one in refusals)
    assert answers
    assert all(one == wanted for one in answers)


def test_facts_may_be_asked_while_an_answer_is_under_way(checkpoint: Path) -> None:
    done = threading.Event()
    seen: list[int] = []

    def ask() -> None:
        while not done.wait(0.001):  # one that never waits takes the interpreter from the answer
            seen.append(sum(engine.occupancy()[:3]) - engine.plan.slots)
            assert engine.stats.snapshot().as_dict()["slots"] == engine.plan.slots

    with open_engine(checkpoint, expert_mem="100KB") as engine:
        asker = threading.Thread(target=ask)
        asker.start()
        try:
            for _ in range(10):
                engine.generate(PROMPT, PARAMS)
        finally:
            done.set()
            asker.join(60)
    assert seen
    assert not any(seen)


def test_several_engines_answer_at_the_same_time(checkpoint: Path, wanted: list[int]) -> None:
    answers: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        with open_engine(
            checkpoint, expert_mem=f"{50 * (number + 1)}KB", eviction=("lru", "lfu", "next-use")[number]
        ) as one:
            for _ in range(5):
                answers[number] = one.generate(PROMPT, PARAMS).token_ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert answers == dict.fromkeys(range(3), wanted)


def test_close_joins_every_thread_and_frees_what_was_large(checkpoint: Path, ours: Callable[[], list[str]]) -> None:
    engine = open_engine(checkpoint)
    engine.generate(PROMPT, PARAMS)
    arena = weakref.ref(engine._parts.experts.arena._bytes)
    assert ours()
    engine.close()
    assert not ours()
    gc.collect()
    assert arena() is None, "the slots' memory is the system's again"
    with pytest.raises(EngineClosedError):
        engine.set_routing("dmoe")


def test_an_engine_that_was_dropped_warns_and_is_freed_all_the_same(
    checkpoint: Path, ours: Callable[[], list[str]]
) -> None:
    engine = open_engine(checkpoint)
    engine.generate(PROMPT, PARAMS)
    arena = weakref.ref(engine._parts.experts.arena._bytes)
    del engine
    with pytest.warns(ResourceWarning, match=r"the engine of .* was dropped without close\(\)"):
        gc.collect()
    deadline = time.monotonic() + 30
    while ours() and time.monotonic() < deadline:
        time.sleep(0.01)
    gc.collect()
    assert not ours()
    assert arena() is None


def test_an_engine_that_was_closed_is_dropped_in_silence(checkpoint: Path) -> None:
    engine = open_engine(checkpoint)
    engine.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        del engine
        gc.collect()


def test_routing_changes_between_answers(checkpoint: Path, wanted: list[int], tmp_path: Path) -> None:
    with open_engine(checkpoint, routing="dmoe", min_experts=4, top_p=0.3) as fresh:
        confined = fresh.generate(PROMPT, PARAMS).token_ids
    with open_engine(checkpoint) as engine:
        told = engine.set_routing("dmoe", top_p=0.3, min_experts=4)
        assert any("not distilled" in one for one in told)
        assert (engine.routing_name, engine.config.top_p) == ("dmoe", 0.3)
        assert engine.generate(PROMPT, PARAMS).token_ids == confined != wanted
        engine.set_routing("original")
        assert engine.generate(PROMPT, PARAMS).token_ids == wanted
        with pytest.raises(UsageError, match="routing is 'best'"):
            engine.set_routing("best")
        engine.record_trace(tmp_path / "trace")
        with pytest.raises(UsageError, match="while a trace is recorded"):
            engine.set_routing("dmoe")
        engine.close_trace()
        stream = engine.stream(PROMPT, PARAMS)
        next(stream)
        with pytest.raises(UsageError, match="busy"):
            engine.set_routing("dmoe")


def test_top_k_beyond_what_was_planned_for_is_refused(checkpoint: Path) -> None:
    with (
        open_engine(checkpoint, top_k_experts=9) as engine,
        pytest.raises(UsageError, match="memory plan allows for 4"),
    ):
        engine.set_routing("top-k")


def test_a_prefill_tells_how_far_it_is(checkpoint: Path) -> None:
    told: list[tuple[int, int]] = []
    with open_engine(checkpoint) as engine:
        engine.on_prefill = lambda done, total: told.append((done, total))
        engine.generate(list(range(70)), PARAMS)
        layers = engine.model_config.num_hidden_layers
        reached = [layer for layer in engine.model_config.moe_layers if layer < layers - 1]
        assert told == [*((64 * layer // layers, 64) for layer in reached), (64, 64)]
        told.clear()
        engine.generate([1, 2, 3], PARAMS)
        assert not told, "a prompt shorter than a block has no prefill"
