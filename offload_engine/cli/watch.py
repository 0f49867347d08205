"""`--watch`: the block being denoised, masks turning into words, with the expert cache beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from offload_engine.cli.terminal import note, stderr_console, stderr_is_live, visible
from offload_engine.core import SamplingParams, StepEvent
from offload_engine.metrics import EngineStats
from offload_engine.text.pieces import token_texts

if TYPE_CHECKING:
    from offload_engine.engine.engine import Engine
    from offload_engine.experts.scheduling.cache import Occupancy

OPEN = " ░░"
"""Stands for a position that is still masked."""
END = "∎"
"""Stands for an eos."""


class Viewer(Protocol):
    """Shows the steps of one answer."""

    live: bool
    """Whether the view redraws itself: nothing else should then be written to its terminal."""

    def show(self, event: StepEvent) -> None:
        """Take the answer's next event."""


@dataclass(frozen=True, slots=True)
class Token:
    """One position of the block as it is shown."""

    text: str
    open: bool = False
    confidence: float | None = None
    """Of a token that this step unmasked."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Everything there is to see after one step."""

    block: int
    step: int
    answer: str
    """The text of the blocks before."""
    tokens: list[Token]
    stats: EngineStats
    """Counted since this answer began."""
    occupancy: Occupancy
    tokens_per_second: float

    @property
    def undecided(self) -> int:
        """Masks left in the block."""
        return sum(token.open for token in self.tokens)

    @property
    def accepted(self) -> int:
        """Positions this step unmasked."""
        return sum(token.confidence is not None for token in self.tokens)


class Board:
    """Turns the events of one answer into frames."""

    def __init__(self, engine: Engine, *, token_ids: bool) -> None:
        self._engine = engine
        self._tokenizer = None if token_ids else engine.tokenizer
        self._before = engine.stats.snapshot()
        self._began = time.monotonic()
        self._answer = ""
        self._accepted = 0

    def take(self, event: StepEvent) -> Frame | None:
        """The frame of a step; None for a finished block, which only grows the answer."""
        if event.kind == "block":
            ids = "".join(f" {token}" for token in event.block_token_ids)
            self._answer += ids if self._tokenizer is None else event.text
            return None
        self._accepted += len(event.accepted)
        return Frame(
            block=event.block,
            step=event.step,
            answer=self._answer,
            tokens=self._tokens(event),
            stats=self._engine.stats.since(self._before),
            occupancy=self._engine.occupancy(),
            tokens_per_second=self._accepted / max(time.monotonic() - self._began, 1e-9),
        )

    def _tokens(self, event: StepEvent) -> list[Token]:
        sure = {position: confidence for position, _token, confidence in event.accepted}
        mask, eos = self._engine.mask_token_id, self._engine.eos_token_id
        signs = {token: sign for token, sign in ((mask, OPEN), (eos, END)) if token is not None}
        words = map(visible, token_texts(event.block_token_ids, signs, self._tokenizer))
        return [
            Token(text, open=token == mask, confidence=sure.get(position))
            for position, (token, text) in enumerate(zip(event.block_token_ids, words, strict=True))
        ]


@contextmanager
def watching(engine: Engine, params: SamplingParams, *, token_ids: bool, wanted: bool) -> Iterator[Viewer]:
    """A viewer of one answer: none if not `wanted`, live on a terminal, else plain lines."""
    if not wanted:
        yield _Blind()
    elif not stderr_is_live():
        yield PlainWatch(Board(engine, token_ids=token_ids))
    else:
        from offload_engine.cli.live import LiveWatch

        with LiveWatch(Board(engine, token_ids=token_ids), params.threshold, stderr_console()) as viewer:
            yield viewer


class _Blind:
    """Shows nothing."""

    live = False

    def show(self, event: StepEvent) -> None:
        """See `Viewer`."""


class PlainWatch:
    """One line per step."""

    live = False

    def __init__(self, board: Board) -> None:
        self._board = board

    def show(self, event: StepEvent) -> None:
        """See `Viewer`."""
        frame = self._board.take(event)
        if frame is not None:
            note(plain_line(frame))


def plain_line(frame: Frame) -> str:
    """A frame as one line of text."""
    slots, size = frame.occupancy, len(frame.tokens)
    words = "".join(token.text for token in frame.tokens).replace("\n", "⏎").replace("\t", " ")
    return (
        f"block {frame.block} step {frame.step}: {size - frame.undecided}/{size} decided (+{frame.accepted}), "
        f"{frame.tokens_per_second:.1f} tokens/s, hit rate {percent(frame.stats.hit_rate)}, "
        f"slots {slots.resident} resident {slots.loading} loading {slots.free} free |{words}"
    )


def percent(share: float | None) -> str:
    """A share of 1 as it is read."""
    return "n/a" if share is None else f"{share * 100:.1f} %"
