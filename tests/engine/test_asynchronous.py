"""An engine in a program that runs on asyncio."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeVar

import pytest

from offload_engine import AsyncEngine, Engine, EngineClosedError, PromptError, SamplingParams, StepEvent, UsageError
from tests.checkpoints import tiny_config, write_checkpoint

Result = TypeVar("Result")
PARAMS = SamplingParams(max_new_tokens=40, threshold=0.2)
LONG = SamplingParams(max_new_tokens=900, threshold=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tiny_config(), seed=1)


@pytest.fixture(scope="module")
def wanted(checkpoint: Path) -> dict[int, list[int]]:
    """What an engine of the ordinary kind answers."""
    with Engine.from_pretrained(checkpoint, gpu_mem="3GB") as engine:
        return {first: engine.generate([first, 2, 3], PARAMS).token_ids for first in range(4)}


def run(work: Coroutine[Any, Any, Result]) -> Result:
    return asyncio.run(asyncio.wait_for(work, 60))


def opened(checkpoint: Path) -> Coroutine[Any, Any, AsyncEngine]:
    return AsyncEngine.from_pretrained(checkpoint, gpu_mem="3GB")


def test_overlapping_calls_are_answered_in_turn_while_the_loop_runs(checkpoint: Path, wanted: Any) -> None:
    async def program() -> tuple[list[list[int]], int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.001)  # a loop that never sleeps takes the interpreter from the answer
                ticks += 1

        async with await opened(checkpoint) as engine:
            clock = asyncio.create_task(tick())
            done = await asyncio.gather(*(engine.generate([first, 2, 3], PARAMS) for first in range(4)))
            clock.cancel()
        return [one.token_ids for one in done], ticks

    answers, ticks = run(program())
    assert answers == list(wanted.values())
    assert ticks > 3


def test_overlapping_calls_share_what_is_fetched(checkpoint: Path, wanted: Any) -> None:
    async def program(lanes: int) -> tuple[list[list[int]], int]:
        options: dict[str, Any] = {
            "batch_size": lanes,
            "lanes_together": lanes,
            "expert_mem": "100KB",
            "predictor": "none",
        }
        async with await AsyncEngine.from_pretrained(checkpoint, gpu_mem="3GB", **options) as engine:
            done = await asyncio.gather(*(engine.generate([first, 2, 3], PARAMS) for first in range(4)))
            return [one.token_ids for one in done], engine.engine.stats.loads

    (alone, read), (together, less) = run(program(1)), run(program(4))
    assert alone == together == list(wanted.values())
    assert less < read


def test_routing_may_be_the_answers_own(checkpoint: Path, wanted: Any) -> None:
    async def program() -> list[list[int]]:
        async with await opened(checkpoint) as engine:
            own = await engine.generate([1, 2, 3], PARAMS, routing="dmoe", top_p=0.1)
            return [own.token_ids, (await engine.generate([1, 2, 3], PARAMS)).token_ids]

    own, plain = run(program())
    assert plain == wanted[1]
    with Engine.from_pretrained(checkpoint, gpu_mem="3GB", routing="dmoe", top_p=0.1) as engine:
        assert engine.generate([1, 2, 3], PARAMS).token_ids == own


def test_a_stream_brings_every_event_in_order(checkpoint: Path) -> None:
    async def program() -> tuple[list[StepEvent], list[StepEvent]]:
        async with await opened(checkpoint) as engine:
            events = [event async for event in engine.stream([1, 2, 3], PARAMS)]
            return events, await engine.run(lambda alone: list(alone.stream([1, 2, 3], PARAMS)))

    events, plain = run(program())
    assert [(one.kind, one.block, one.step, one.accepted, one.text) for one in events] == [
        (one.kind, one.block, one.step, one.accepted, one.text) for one in plain
    ]
    assert events[-1].completion is not None


def test_a_cancelled_task_has_given_the_engine_free(checkpoint: Path, wanted: Any) -> None:
    async def program() -> list[int]:
        async with await opened(checkpoint) as engine:
            for delay in (0.0, 0.01, 0.1):
                task = asyncio.create_task(engine.generate([1, 2, 3], LONG))
                await asyncio.sleep(delay)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert engine.active == 0
            assert engine.engine.stats.denoise_steps < 900 // 32 * 32, "none of these answers was finished"
            return (await engine.generate([1, 2, 3], PARAMS)).token_ids

    assert run(program()) == wanted[1]


def test_who_waits_for_a_turn_can_be_cancelled_without_having_begun(checkpoint: Path) -> None:
    async def program() -> int:
        async with await opened(checkpoint) as engine:
            first = asyncio.create_task(engine.generate([1, 2, 3], PARAMS))
            second = asyncio.create_task(engine.generate([2, 2, 3], PARAMS))
            await asyncio.sleep(0)
            second.cancel()
            await asyncio.wait([first, second])
            return engine.engine.stats.prompts

    assert run(program()) == 1


def test_leaving_a_stream_early_frees_the_engine(checkpoint: Path) -> None:
    async def program() -> int:
        async with await opened(checkpoint) as engine:
            async with aclosing(engine.stream([1, 2, 3], LONG)) as events:
                async for _event in events:
                    break
            assert engine.active == 0
            assert engine.engine.stats.denoise_steps < 100
            return len((await engine.generate([1], PARAMS)).token_ids)

    assert run(program()) > 0


def test_errors_reach_the_caller_and_the_engine_lives_on(checkpoint: Path, wanted: Any) -> None:
    async def program() -> list[int]:
        async with await opened(checkpoint) as engine:
            with pytest.raises(PromptError, match="prompt token 1 is 96"):
                await engine.generate([1, 96], PARAMS)
            with pytest.raises(UsageError, match="resize needs a new size"):
                await engine.run(lambda engine: engine.resize())
            return (await engine.generate([1, 2, 3], PARAMS)).token_ids

    assert run(program()) == wanted[1]


def test_what_isnt_an_answer_waits_for_its_turn(checkpoint: Path) -> None:
    async def program() -> tuple[int, int]:
        async with await opened(checkpoint) as engine:
            answer = asyncio.create_task(engine.generate([1, 2, 3], PARAMS))
            await asyncio.sleep(0)
            resized = asyncio.create_task(engine.run(lambda engine: engine.resize(expert_mem=16 * 2**12 * 4)))
            await asyncio.sleep(0.001)
            late = asyncio.create_task(engine.generate([1, 2, 3], PARAMS))
            plan = await resized
            assert answer.done(), "what was under way goes first"
            assert (await late).token_ids == (await answer).token_ids
            return plan.slots, engine.engine.occupancy().free + engine.engine.occupancy().resident

    slots, there = run(program())
    assert slots == there < 32


def test_closing_ends_what_is_under_way_and_waiting_and_leaves_no_thread(checkpoint: Path) -> None:
    async def program() -> list[BaseException | Any]:
        engine = await opened(checkpoint)
        tasks = [asyncio.create_task(engine.generate([number], LONG)) for number in range(3)]
        await asyncio.sleep(0.05)
        await engine.aclose()
        await engine.aclose()
        with pytest.raises(EngineClosedError):
            await engine.generate([1])
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = threading.active_count()
    assert [type(one) for one in run(program())] == [EngineClosedError] * 3
    assert threading.active_count() <= before


def test_an_engine_whose_loading_was_cancelled_is_closed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()
    close = Engine.close
    monkeypatch.setattr(Engine, "close", lambda engine: (close(engine), closed.set()))

    async def program() -> None:
        task = asyncio.create_task(opened(checkpoint))
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(program())
    assert closed.wait(30)


def test_a_loop_that_ends_meanwhile_takes_the_answer_with_it(checkpoint: Path) -> None:
    async def begin(events: AsyncGenerator[StepEvent, None]) -> None:
        await anext(events)
        asyncio.get_running_loop().stop()
        await asyncio.sleep(60)

    with Engine.from_pretrained(checkpoint, gpu_mem="3GB") as engine:
        loop = asyncio.new_event_loop()
        held = AsyncEngine(engine)
        events = held.stream([1, 2, 3], LONG)
        with pytest.raises(RuntimeError, match="stopped"):
            loop.run_until_complete(begin(events))
        loop.close()
        deadline = time.monotonic() + 30
        while held.active and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not held.active, "the answer goes on though nobody listens"
        asyncio.run(held.aclose())
