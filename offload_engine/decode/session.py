"""Answers under way with one engine, as their callers are told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from offload_engine.core import SamplingParams, StepEvent
from offload_engine.decode.access import Access
from offload_engine.decode.answers import Answer, over
from offload_engine.decode.batch import Batch
from offload_engine.decode.state import DecodingState
from offload_engine.memory.refusal import refusals
from offload_engine.metrics import EngineStats
from offload_engine.routing.base import RoutingPolicy
from offload_engine.text import Tokenizer

Outcome = StepEvent | Exception
"""What a step did to an answer; an exception is what ended it."""


class Session:
    """Has a batch answer prompts, keeps the books of each answer, and turns its states into events.

    To be used within `Access.call`, by one thread.
    """

    def __init__(
        self,
        make_batch: Callable[[], Batch],
        access: Access,
        tokenizer: Tokenizer | None,
        stats: EngineStats,
        concluded: Callable[[DecodingState], None],
    ) -> None:
        """`concluded` is told of every answer that has ended, before its statistics are taken."""
        self._make_batch = make_batch
        self._batch = make_batch()
        self._access = access
        self._tokenizer = tokenizer
        self._stats = stats
        self._concluded = concluded
        self._answers: dict[int, Answer] = {}
        """Those under way, by number."""
        self._since = 0.0

    @property
    def has_room(self) -> bool:
        """Whether `enter` may be called."""
        return self._batch.has_room

    @property
    def empty(self) -> bool:
        """Whether no answer is under way."""
        return self._batch.empty

    def enter(
        self,
        number: int,
        prompt: Sequence[int],
        params: SamplingParams,
        cancelled: Callable[[], bool],
        policy: RoutingPolicy | None = None,
    ) -> None:
        """Begin to answer `prompt`, whose `number` no other answer under way has. Raises `EngineClosedError`."""
        with self._access.work():
            answer = Answer(prompt, params, self._tokenizer, self._stats)
            self._batch.enter(number, replace(answer.request(cancelled), policy=policy))
            self._answers[number] = answer

    def advance(self) -> list[tuple[int, Outcome]]:
        """Take one step, and tell what became of whom. Raises `EngineClosedError`."""
        told: list[tuple[int, Outcome]] = []
        self._since = time.perf_counter()  # what the caller does with an event is not the engine's time
        with self._access.work():
            for number, state in self._batch.advance():
                told.append((number, self._outcome(number, state)))
            self._count_time()
        return told

    def abandon(self) -> None:
        """Forget everything that is under way: all lanes are free again."""
        self._batch = self._make_batch()
        self._answers.clear()

    def _outcome(self, number: int, state: DecodingState) -> Outcome:
        if state.error is not None:
            if self._access.closed:
                raise state.error
            del self._answers[number]
            self._concluded(state)
            return _named(state.error)
        event = self._answers[number].event(state)
        if over(state):
            self._concluded(state)
            self._count_time()
            event = replace(event, completion=self._answers.pop(number).completion(state))
        return event

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._stats.wall_seconds += now - self._since
        self._since = now


def _named(error: Exception) -> Exception:
    """The error as whoever asked should see it: memory that the system refused has a type of its own."""
    try:
        with refusals("an answer was computed"):
            raise error
    except Exception as named:
        return named
