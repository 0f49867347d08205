"""An expert cache that grows and shrinks between answers."""

from __future__ import annotations

import errno
import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from offload_engine import (
    Engine,
    EngineClosedError,
    MemoryBudgetError,
    SamplingParams,
    TransferError,
    UsageError,
    pages,
)
from offload_engine.experts import arena
from offload_engine.experts.storage.conversion import convert
from offload_engine.experts.storage.store import SafetensorsStore
from tests.checkpoints import tiny_config, write_checkpoint

SLAB = 4096 * 3
PARAMS = SamplingParams(max_new_tokens=40, threshold=0.2)
PROMPT = list(range(5, 50))
MIB = 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tiny_config(), seed=1)


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(checkpoint, tmp_path_factory.mktemp("packed") / "int8", "int8", identity="one").directory


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose 32 experts take 3 MiB each."""
    config = tiny_config(hidden_size=256, num_attention_heads=4, head_dim=64, moe_intermediate_size=1024)
    return write_checkpoint(tmp_path_factory.mktemp("large"), config, seed=1)


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, **{"gpu_mem": "4GB", "max_context": 256, **options})


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with open_engine(checkpoint) as engine:
        yield engine


@pytest.mark.parametrize("eviction", ["lru", "lfu", "score-aware", "next-use"])
@pytest.mark.parametrize("store", ["checkpoint", "packed"])
def test_answers_are_the_same_at_every_size(eviction: str, store: str, request: pytest.FixtureRequest) -> None:
    directory: Path = request.getfixturevalue(store)
    with open_engine(directory, eviction=eviction) as engine:
        slab = engine.plan.slab_bytes
        wanted = engine.generate(PROMPT, PARAMS).token_ids
        logits = engine.logits(PROMPT)
        for slots in (5, 32, 2, 3, 17, 16, 31, 2, 32):
            plan = engine.resize(expert_mem=slots * slab)
            assert plan.slots == slots == sum(engine.occupancy()[:3])
            assert engine.generate(PROMPT, PARAMS).token_ids == wanted
            assert torch.equal(engine.logits(PROMPT), logits)
            engine._parts.experts.idle()


def test_experts_that_fit_stay(engine: Engine) -> None:
    engine.generate(PROMPT, PARAMS)
    cache = engine._parts.experts.scheduler.cache
    before = set(cache.resident_keys())
    engine.resize(expert_mem=20 * SLAB)
    kept = set(cache.resident_keys())
    assert len(kept) == 20
    assert kept < before
    engine.resize(expert_mem=32 * SLAB)
    assert set(cache.resident_keys()) == kept
    loads = engine.stats.loads
    engine.generate(PROMPT, PARAMS)
    assert engine.stats.loads - loads <= 12, "only what was given up is read again"


def test_plan_config_and_stats_follow(engine: Engine) -> None:
    first = engine.plan
    plan = engine.resize(expert_mem=6 * SLAB, gpu_mem="3GB")
    assert plan is engine.plan
    assert (plan.slots, plan.budget, plan.fixed, plan.context) == (6, 3 * 10**9, first.fixed, first.context)
    assert (engine.stats.slots, engine.stats.limit_bytes) == (6, 3 * 10**9)
    assert engine.stats.planned_peak_bytes == plan.total < first.total
    assert (engine.config.gpu_mem, engine.config.expert_mem) == (3 * 10**9, 6 * SLAB)
    assert engine.resize(expert_mem="none").slots == first.slots


def test_memory_goes_back_to_the_system_and_comes_again(large: Path) -> None:
    def resident() -> int:
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    with open_engine(large) as engine:
        slab = engine.plan.slab_bytes
        assert slab >= 3 * MIB
        done = engine.generate(PROMPT, PARAMS)
        full = resident()
        engine.resize(expert_mem=8 * slab)
        small = resident()
        assert full - small == pytest.approx(24 * slab, abs=2 * MIB)
        shrunk = engine.generate(PROMPT, PARAMS)
        assert shrunk.token_ids == done.token_ids
        assert shrunk.stats.measured_peak_bytes < full, "the peak is that of the smaller cache"
        small = resident()  # an answer may have given other memory of the process back, 32 MiB of it once
        engine.resize(expert_mem=32 * slab)
        assert resident() - small == pytest.approx(24 * slab, abs=6 * MIB), "all pages are there at once"


def test_a_size_that_no_plan_allows_changes_nothing(engine: Engine) -> None:
    before = engine.plan, engine.config, engine.occupancy()
    with pytest.raises(MemoryBudgetError, match=r"2 expert slots take .*set expert_mem to at least that"):
        engine.resize(expert_mem=SLAB)
    with pytest.raises(MemoryBudgetError, match="smallest budget"):
        engine.resize(gpu_mem="1MB")
    with pytest.raises(UsageError, match="pass gpu_mem, expert_mem or both"):
        engine.resize()
    assert engine.occupancy() == before[2]
    assert engine.generate(PROMPT, PARAMS).token_ids


def test_memory_that_the_system_refuses_changes_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.resize(expert_mem=6 * SLAB)
    wanted = engine.generate(PROMPT, PARAMS).token_ids
    plan = engine.plan

    def refuses_mapping(*_arguments: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    calls = itertools.count()
    populate: Callable[[torch.Tensor], bool] = pages._populate
    for room, name, fake in (
        (arena, "_resize", refuses_mapping),
        (pages, "_populate", lambda memory: populate(memory) if next(calls) < 1 else False),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(room, name, fake)
            with pytest.raises(MemoryBudgetError, match="refused"):
                engine.resize(expert_mem=20 * SLAB)
        assert engine.plan is plan
        assert sum(engine.occupancy()[:3]) == 6 == engine._parts.experts.arena.slots
        assert engine.generate(PROMPT, PARAMS).token_ids == wanted


def test_a_busy_or_closed_engine_refuses(checkpoint: Path) -> None:
    engine = open_engine(checkpoint)
    stream = engine.stream(PROMPT, PARAMS)
    next(stream)
    with pytest.raises(UsageError, match="busy with another call"):
        engine.resize(expert_mem=4 * SLAB)
    stream.close()  # type: ignore[attr-defined]
    assert engine.resize(expert_mem=4 * SLAB).slots == 4
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.resize(expert_mem=6 * SLAB)


def test_after_an_answer_that_failed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(checkpoint, expert_mem=6 * SLAB) as engine:
        wanted = engine.generate(PROMPT, PARAMS).token_ids
        read, calls = SafetensorsStore.read, itertools.count()

        def fails(store: SafetensorsStore, *arguments: Any) -> int:
            if next(calls) > 5:
                raise TransferError("the disk is gone")
            return read(store, *arguments)

        with monkeypatch.context() as patched:
            patched.setattr(SafetensorsStore, "read", fails)
            with pytest.raises(TransferError) as caught:
                engine.generate(PROMPT, PARAMS)
        engine.resize(expert_mem=3 * SLAB)
        engine.resize(expert_mem=9 * SLAB)
        assert caught.value is not None, "its traceback is kept, and with it what its frames know"
        assert engine.generate(PROMPT, PARAMS).token_ids == wanted


def test_a_view_of_a_slot_that_somebody_holds_is_never_pulled_away(engine: Engine) -> None:
    engine.generate(PROMPT, PARAMS)
    slots = engine._parts.experts.arena
    held = slots.slab(3)
    for size in (4, 20):
        with pytest.raises(UsageError, match=r"something outside the engine still holds .* let go of it"):
            engine.resize(expert_mem=size * SLAB)
        held.fill_(size)  # its memory is still there, whatever the slot holds now
        assert int(held.sum()) == size * SLAB
        assert slots.slots == engine.plan.slots == sum(engine.occupancy()[:3]) == 32
    del held
    assert engine.resize(expert_mem=4 * SLAB).slots == slots.slots == 4


def test_new_slots_are_filled_with_what_was_used_most(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(checkpoint, expert_mem=8 * SLAB) as engine:
        engine.generate(PROMPT, PARAMS)
        monkeypatch.setattr("offload_engine.engine.assembly.keeps_hot_set", lambda _config: True)
        engine.resize(expert_mem=16 * SLAB)
        monkeypatch.undo()
        engine._parts.experts.wait_warm()
        assert engine.occupancy().resident == 16
        assert engine.stats.warmed == 8
