"""Requests of many threads on one engine: the answers each would get alone, whatever becomes of the others."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from offload_engine.core import Completion, SamplingParams, StepEvent
from offload_engine.decode.answers import Answer
from offload_engine.decode.block_diffusion import BlockDiffusionDecoder
from offload_engine.decode.lane import Lane
from offload_engine.engine.batching import TURN_BLOCKS, Batcher, Ticket
from offload_engine.engine.engine import Engine
from offload_engine.errors import (
    ConfigError,
    EngineClosedError,
    InternalError,
    ModelError,
    PromptError,
    QueueFullError,
    TransferError,
    UsageError,
)
from tests.checkpoints import tiny_config, write_checkpoint

LANES = 3
ROUTINGS: list[tuple[str | None, float | None]] = [(None, None), ("dmoe", 0.5), ("dmoe", 0.9), ("top-k", None)]
SHORT = SamplingParams(max_new_tokens=40, steps=4, threshold=0.5)
LONG = SamplingParams(max_new_tokens=900, steps=32, threshold=1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("shared"), tiny_config(), seed=1)


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, **{"gpu_mem": "3GB", "min_experts": 4, "batch_size": LANES, **options})


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with open_engine(checkpoint, expert_mem=12 * 4096 * 4, lanes_together=LANES) as engine:
        yield engine


@pytest.fixture
def batcher(engine: Engine) -> Iterator[Batcher]:
    """What is left at the end is no thread, and an engine that is free."""
    batcher = Batcher(engine, max_waiting=30)
    yield batcher
    batcher.close(drain=False)
    assert not [thread for thread in threading.enumerate() if thread.name == "batcher"]
    assert engine.generate([1, 2], SamplingParams(max_new_tokens=2, steps=1)).token_ids


def until(happened: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(scope="module")
def alone(checkpoint: Path) -> dict[tuple[int, int], Completion]:
    """Each request's answer from an engine that has nothing else to do, by routing and request."""
    answers = {}
    for place, (routing, top_p) in enumerate(ROUTINGS):
        with open_engine(checkpoint, batch_size=1, routing=routing, top_p=top_p) as engine:
            for number, (prompt, params) in enumerate(requests()):
                answers[place, number] = engine.generate(prompt, params)
    return answers


def requests() -> list[tuple[list[int], SamplingParams]]:
    drawn = random.Random(5)
    lengths = (0, 3, 40, 70)
    return [
        (
            [drawn.randrange(94) for _ in range(lengths[number % 4])],
            SamplingParams(
                max_new_tokens=drawn.randrange(1, 80),
                block_length=(32, 32, 16)[number % 3],
                steps=drawn.randrange(1, 6),
                threshold=0.3,
                temperature=(0.0, 0.8)[number % 2],
                seed=number,
            ),
        )
        for number in range(6)
    ]


@pytest.mark.parametrize("seed", range(2))
def test_whoever_joins_and_leaves_everyone_gets_the_answer_they_would_get_alone(
    batcher: Batcher, alone: dict[tuple[int, int], Completion], seed: int
) -> None:
    asked = [(place, number) for place in range(len(ROUTINGS)) for number in range(len(requests()))]
    random.Random(seed).shuffle(asked)

    def ask(which: tuple[int, int]) -> tuple[Ticket, bool, int]:
        drawn = random.Random(hash((seed, which)))
        (routing, top_p), (prompt, params) = ROUTINGS[which[0]], requests()[which[1]]
        ticket = batcher.submit(prompt, params, routing=routing, top_p=top_p)
        leaves = drawn.random() < 0.3
        if leaves:
            time.sleep(drawn.random() * 0.05)
            ticket.cancel()
        return ticket, leaves, len(list(ticket.events()))

    with ThreadPoolExecutor(8) as threads:
        answers = dict(zip(asked, threads.map(ask, asked), strict=True))
    for which, (ticket, left, events) in answers.items():
        done, expected = ticket.result(timeout=0), alone[which]
        if done.finish_reason == "cancelled":
            assert left
            assert done.token_ids == expected.token_ids[: len(done.token_ids)], "what is decided stays"
            continue
        assert (done.token_ids, done.finish_reason) == (expected.token_ids, expected.finish_reason)
        assert events == done.stats.denoise_steps + done.stats.blocks
        for name in ("prompts", "prompt_tokens", "new_tokens", "blocks", "denoise_steps"):
            assert getattr(done.stats, name) == getattr(expected.stats, name), name
    assert (batcher.active, batcher.waiting) == (0, 0)


def test_a_ticket_tells_the_whole_story_to_all_who_ask(batcher: Batcher, engine: Engine) -> None:
    told: list[StepEvent] = []
    ended: list[Ticket] = []
    ticket = batcher.submit([1, 2, 3], SHORT, on_event=told.append)
    ticket.add_done_callback(ended.append)
    first = list(ticket.events())
    done = ticket.result()
    assert first == list(ticket.events()) == told
    assert [event.completion for event in first[:-1]] == [None] * (len(first) - 1)
    assert first[-1].completion is done
    until(lambda: ended == [ticket])
    ticket.add_done_callback(ended.append)
    assert ended == [ticket, ticket]
    assert ticket.done
    batcher.close()
    assert engine.generate([1, 2, 3], SHORT).token_ids == done.token_ids


def test_cancelling_ends_an_answer_with_what_is_decided_and_frees_its_lane(batcher: Batcher) -> None:
    tickets = [batcher.submit([number], LONG) for number in range(LANES)]
    waiting = batcher.submit([9], LONG)
    until(lambda: batcher.active == LANES)
    assert batcher.waiting == 1
    waiting.cancel()
    assert waiting.result(60).token_ids == []
    assert waiting.result().stats.prompt_tokens == 1
    steps = next(tickets[0].events())
    assert steps.completion is None
    tickets[0].cancel()
    assert tickets[0].result(60).finish_reason == "cancelled"
    assert batcher.submit([5], SHORT).result(60).finish_reason != "cancelled"
    for ticket in tickets[1:]:
        assert not ticket.done
        ticket.cancel()
        assert 0 < ticket.result(60).stats.denoise_steps < 900


def test_what_comes_too_late_is_not_begun_and_what_takes_too_long_is_cut(batcher: Batcher) -> None:
    now = time.monotonic()
    late = batcher.submit([1], LONG, deadline=now)
    assert late.result(60).finish_reason == "cancelled"
    assert late.result().token_ids == []
    cut = batcher.submit([1], LONG, deadline=time.monotonic() + 0.3)
    assert cut.result(60).finish_reason == "cancelled"
    with pytest.raises(TimeoutError, match=r"not answered after 0\.01 s"):
        batcher.submit([1], LONG).result(timeout=0.01)


def test_a_full_queue_says_when_to_come_again(engine: Engine) -> None:
    with Batcher(engine, max_waiting=2) as batcher:
        tickets = [batcher.submit([1], LONG) for _ in range(LANES + 2)]
        with pytest.raises(QueueFullError, match=r"[0-9] requests wait already") as refused:
            batcher.submit([1], LONG)
        assert refused.value.retry_after >= 1
        tickets[0].cancel()
        until(lambda: batcher.waiting == 1)
        batcher.submit([1], SHORT)
        batcher.close(drain=False)
    assert {ticket.result(0).finish_reason for ticket in tickets} == {"cancelled"}


@pytest.mark.parametrize(
    ("prompt", "options", "error", "message"),
    [
        ([96], {}, PromptError, "prompt token 0 is 96"),
        ("text", {}, PromptError, "no tokenizer"),
        ([{"role": "user", "content": "text"}], {}, PromptError, "no tokenizer"),
        ([1], {"routing": "best"}, ConfigError, "routing is 'best'"),
        ([1], {"top_p": 1.5}, ConfigError, "top_p"),
        ([1], {"params": SamplingParams(block_length=4096)}, UsageError, "block_length is 4096"),
    ],
)
def test_bad_arguments_are_refused_at_once(
    batcher: Batcher, prompt: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        batcher.submit(prompt, **options)
    assert batcher.waiting == 0


def test_kinds_take_turns_by_block_and_equal_policies_are_one_kind(batcher: Batcher) -> None:
    order: list[str] = []
    params = SamplingParams(max_new_tokens=160, steps=2, threshold=1.0)

    def note(name: str) -> Callable[[StepEvent], None]:
        return lambda event: order.append(name) if event.kind == "step" else None

    begun, held = threading.Event(), threading.Event()

    def hold(_event: StepEvent) -> None:
        begun.set()
        held.wait(60)

    first = batcher.submit([7], SamplingParams(max_new_tokens=1, steps=1), on_event=hold)
    assert begun.wait(60)
    kinds = {"a": {"routing": "dmoe"}, "b": {"routing": "original"}, "c": {"routing": "dmoe", "top_p": 0.6}}
    tickets = [batcher.submit([1] * 32, params, on_event=note(name), **one) for name, one in kinds.items()]
    held.set()
    for ticket in (first, *tickets):
        ticket.result(60)
    assert "".join(order) == "acacbb" * 5


def test_one_of_a_kind_that_waits_gets_its_turn_after_some_blocks(checkpoint: Path) -> None:
    order: list[str] = []
    params = SamplingParams(max_new_tokens=(2 * TURN_BLOCKS) * 32, steps=1, threshold=1.0)
    with open_engine(checkpoint, lanes_together=1) as engine, Batcher(engine) as batcher:
        for name in "ab":
            batcher.submit([], params, on_event=lambda event, name=name: order.append(name * (event.kind == "step")))
    assert "".join(order) == ("a" * TURN_BLOCKS + "b" * TURN_BLOCKS) * 2


def test_where_a_forward_fails_only_who_makes_it_fail_has_the_error(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch, alone: dict[tuple[int, int], Completion]
) -> None:
    step, unmask = BlockDiffusionDecoder.step, Lane.unmask

    def failing_step(decoder: BlockDiffusionDecoder, lanes: list[Lane]) -> None:
        if any(lane.request.params.seed == 1000 for lane in lanes):
            raise TransferError("the disk is gone")
        if any(lane.request.params.seed == 1001 for lane in lanes):
            raise ZeroDivisionError("a defect")
        step(decoder, lanes)

    def failing_unmask(lane: Lane, *proposal: Any) -> None:
        if lane.request.params.seed == 1002:
            raise ModelError("not finite")
        unmask(lane, *proposal)

    monkeypatch.setattr(BlockDiffusionDecoder, "step", failing_step)
    monkeypatch.setattr(Lane, "unmask", failing_unmask)
    good = [(number, batcher.submit(*requests()[number])) for number in range(6)]
    bad = {seed: batcher.submit([1], SamplingParams(max_new_tokens=8, seed=seed)) for seed in (1000, 1001, 1002)}
    good += [(number, batcher.submit(*requests()[number])) for number in range(6)]
    for number, ticket in good:
        assert ticket.result(60).token_ids == alone[0, number].token_ids
    for seed, error, message in (
        (1000, TransferError, "disk"),
        (1001, InternalError, "ZeroDivisionError: a defect"),
        (1002, ModelError, "not finite"),
    ):
        with pytest.raises(error, match=message):
            list(bad[seed].events())


def test_a_callback_that_fails_ends_its_own_request_alone(
    batcher: Batcher, alone: dict[tuple[int, int], Completion], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_told: object) -> None:
        raise KeyError("mine")

    bad = batcher.submit([1], LONG, on_event=fail)
    good = batcher.submit(*requests()[2])
    good.add_done_callback(fail)
    with pytest.raises(UsageError, match="on_event raised KeyError"):
        bad.result(60)
    assert good.result(60).token_ids == alone[0, 2].token_ids
    until(lambda: "done callback" in caplog.text)


def test_after_a_defect_that_is_nobodys_the_next_request_is_answered(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Answer, "event", lambda *_args: 1 / 0)
        lost = [batcher.submit([1], SHORT) for _ in range(LANES)]
        for ticket in lost:
            with pytest.raises(InternalError, match="ZeroDivisionError"):
                ticket.result(60)
    assert batcher.submit([1], SHORT).result(60).token_ids


def test_closing_finishes_what_is_there_or_cancels_it(engine: Engine) -> None:
    batcher = Batcher(engine)
    tickets = [batcher.submit([number], SHORT) for number in range(2 * LANES)]
    batcher.close()
    assert all(ticket.done and ticket.result().finish_reason != "cancelled" for ticket in tickets)
    with pytest.raises(EngineClosedError, match="takes no more requests"):
        batcher.submit([1], SHORT)
    batcher.close(drain=False)
    for close in ({"drain": False}, {"drain": True, "timeout": 0.2}):
        batcher = Batcher(engine)
        tickets = [batcher.submit([number], LONG) for number in range(2 * LANES)]
        batcher.close(**close)  # type: ignore[arg-type]
        assert {ticket.result(0).finish_reason for ticket in tickets} == {"cancelled"}
    assert not [thread for thread in threading.enumerate() if thread.name == "batcher"]


def test_a_callback_may_close(engine: Engine) -> None:
    batcher = Batcher(engine)
    ticket = batcher.submit([1], SHORT)
    ticket.add_done_callback(lambda _ticket: batcher.close())
    assert ticket.result(60).token_ids
    batcher.close()
    assert engine.generate([1], SHORT).token_ids


def test_the_engine_is_the_batchers_until_it_is_closed(batcher: Batcher, engine: Engine) -> None:
    with pytest.raises(UsageError, match="busy"):
        engine.generate([1], SHORT)
    with pytest.raises(UsageError, match="busy"):
        Batcher(engine)
    batcher.close()
    stream = engine.stream([1], SHORT)
    next(stream)
    with pytest.raises(UsageError, match="busy"):
        Batcher(engine)
    stream.close()  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="max_waiting is -1"):
        Batcher(engine, max_waiting=-1)


def test_closing_the_engine_ends_every_request(checkpoint: Path) -> None:
    engine = open_engine(checkpoint)
    batcher = Batcher(engine)
    tickets = [batcher.submit([number], LONG) for number in range(2 * LANES)]
    next(tickets[0].events())
    engine.close()
    for ticket in tickets:
        with pytest.raises(EngineClosedError):
            ticket.result(60)
    batcher.close()
    assert (batcher.active, batcher.waiting) == (0, 0)
