"""Whatever is raised while the expert cache changes its size: plan, config, books and memory name the same number of
slots, and answers are those of an engine whose experts are all resident.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from offload_engine import Engine, SamplingParams
from offload_engine.engine import adjusting
from offload_engine.experts import arena
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from tests.checkpoints import tiny_config, write_checkpoint
from tests.interrupts import Interrupt

SLAB = 4096 * 3
FEW, ALL = 6, 32
PARAMS = SamplingParams(max_new_tokens=12, steps=4, threshold=0.2)
PROMPT = list(range(5, 25))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tiny_config(), seed=1)


def open_engine(directory: Path, slots: int) -> Engine:
    return Engine.from_pretrained(directory, gpu_mem="4GB", expert_mem=slots * SLAB, max_context=128)


@pytest.fixture(scope="module")
def resident(checkpoint: Path) -> tuple[list[int], torch.Tensor]:
    """What an engine answers that has a slot for every expert."""
    with open_engine(checkpoint, ALL) as engine:
        assert engine.plan.slots == engine.plan.all_experts == ALL
        return engine.generate(PROMPT, PARAMS).token_ids, engine.logits(PROMPT)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with open_engine(checkpoint, FEW) as engine:
        engine.generate(PROMPT, PARAMS)
        yield engine


def slots_of(engine: Engine) -> int:
    """How many the memory has room for, and everybody says there are."""
    memory = engine._parts.experts.arena
    slots = memory.whole().numel() // SLAB
    assert slots == memory.slots == engine.plan.slots == sum(engine.occupancy()[:3])
    assert engine.config.expert_mem == slots * SLAB
    assert (engine.stats.slots, engine.stats.planned_peak_bytes) == (slots, engine.plan.total)
    assert engine.stats.slots_per_layer == engine.plan.slots_per_layer
    return slots


def assert_exact(engine: Engine, resident: tuple[list[int], torch.Tensor]) -> None:
    assert engine.generate(PROMPT, PARAMS).token_ids == resident[0]
    assert torch.equal(engine.logits(PROMPT), resident[1])
    engine._parts.experts.idle()


def resizes(path: str) -> bool:
    """Code that has a part in it, but for the books, which begin anew from wherever they were stopped."""
    if path.endswith(("offload_engine/engine/adjusting.py", "offload_engine/engine/engine.py")):
        return True
    return "offload_engine/experts/" in path and "/scheduling/" not in path


@pytest.mark.parametrize("grows", [True, False])
def test_an_interrupt_anywhere(engine: Engine, resident: tuple[list[int], torch.Tensor], grows: bool) -> None:
    first, second = (FEW, ALL) if grows else (ALL, FEW)
    places, found, at = set(), set(), 0
    while True:
        engine.resize(expert_mem=first * SLAB)
        assert_exact(engine, resident)  # and its slots are taken, so that the way is as long as before
        interrupt = Interrupt(resizes, at)
        try:
            with interrupt.armed():
                engine.resize(expert_mem=second * SLAB)
        except KeyboardInterrupt:
            places.add(interrupt.place.partition(":")[0])
        else:
            break
        found.add(slots_of(engine))
        at += 1
    assert slots_of(engine) == second
    assert found == {FEW, ALL}, "before the change and behind it"
    assert places >= {"SlotArena._remap", "HostSlots._hand_out", "resize"}
    assert len(places) > 12
    assert_exact(engine, resident)


def before(_function: Callable[..., Any], error: BaseException) -> Callable[..., NoReturn]:
    def raising(*_arguments: Any, **_named: Any) -> NoReturn:
        raise error

    return raising


def behind(function: Callable[..., Any], error: BaseException) -> Callable[..., NoReturn]:
    def raising(*arguments: Any, **named: Any) -> NoReturn:
        function(*arguments, **named)
        raise error

    return raising


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no more threads")])
@pytest.mark.parametrize(
    ("owner", "name", "planted", "grown", "shrunk"),
    [
        (OffloadedExperts, "_quieten", behind, FEW, ALL),
        (arena, "_resize", before, FEW, ALL),
        (arena, "_resize", behind, ALL, FEW),
        (arena.HostSlots, "_hand_out", before, ALL, FEW),
        (arena, "Toucher", before, ALL, FEW),
        (arena.SlotArena, "resize", behind, ALL, FEW),
        (ExpertScheduler, "resize", before, ALL, ALL),
        (ExpertScheduler, "resize", behind, ALL, ALL),
        (OffloadedExperts, "resize", behind, ALL, FEW),
        (adjusting, "_reset_peak", before, ALL, FEW),
        (adjusting, "tell_plan", before, ALL, FEW),
    ],
)
def test_what_was_done_until_then_is_what_the_plan_says(
    engine: Engine,
    resident: tuple[list[int], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    planted: Callable[[Callable[..., Any], BaseException], Callable[..., NoReturn]],
    grown: int,
    shrunk: int,
    error: BaseException,
) -> None:
    """`grown`, `shrunk`: how many slots there are after growing and shrinking was stopped there, once."""
    for first, second, then in ((FEW, ALL, grown), (ALL, FEW, shrunk)):
        engine.resize(expert_mem=first * SLAB)
        original = getattr(owner, name)

        def once(*arguments: Any, original: Any = original, **named: Any) -> Any:
            monkeypatch.setattr(owner, name, original)
            return planted(original, error)(*arguments, **named)

        monkeypatch.setattr(owner, name, once)
        with pytest.raises(type(error)):
            engine.resize(expert_mem=second * SLAB)
        error.__traceback__ = None  # the cases' errors outlive them, and frames hold what was to be touched
        assert slots_of(engine) == then
        assert_exact(engine, resident)
        assert engine.resize(expert_mem=second * SLAB).slots == slots_of(engine) == second
        assert_exact(engine, resident)
