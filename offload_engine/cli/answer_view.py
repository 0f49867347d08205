"""An answer as it comes: on a terminal the block under way below it, masks and all; else block by block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, Self

from offload_engine.cli.terminal import Output, stdout_is_live, visible
from offload_engine.cli.watch import Board
from offload_engine.core import SamplingParams, StepEvent

if TYPE_CHECKING:
    from types import TracebackType

    from rich.console import Console

    from offload_engine.engine.engine import Engine


class AnswerView(Protocol):
    """Shows one answer on standard output."""

    def show(self, event: StepEvent) -> None:
        """Take the answer's next event."""


@contextmanager
def answer_view(engine: Engine, params: SamplingParams, output: Output) -> Iterator[AnswerView]:
    """The view that standard output allows for; the answer's last line is ended when it is closed."""
    if not stdout_is_live():
        try:
            yield _Plain(output)
        finally:
            output.end_line()
        return
    with _Live(Board(engine, token_ids=False), params.threshold) as view:
        yield view


class _Plain:
    def __init__(self, output: Output) -> None:
        self._output = output

    def show(self, event: StepEvent) -> None:
        """See `AnswerView`."""
        self._output.write(event.text)


class _Live:
    """Finished lines are printed for good; the last one and the block being denoised are drawn anew with every step."""

    def __init__(self, board: Board, threshold: float) -> None:
        from rich.live import Live

        self._board, self._threshold = board, threshold
        self._line = ""
        """The answer's last line, as far as it is final."""
        self._console = _stdout_console()
        self._live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def show(self, event: StepEvent) -> None:
        """See `AnswerView`."""
        from rich.text import Text

        from offload_engine.cli.live import block_text

        frame = self._board.take(event)
        *lines, self._line = (self._line + visible(event.text)).split("\n")
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)
        shown = Text(self._line[-self._room :])
        if frame is not None:
            shown.append_text(block_text(frame.tokens, self._threshold))
        self._live.update(shown, refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        from rich.text import Text

        self._live.stop()
        if self._line:
            self._console.print(Text(self._line), soft_wrap=True)

    @property
    def _room(self) -> int:
        """Characters of a long line that can be redrawn: what has scrolled off the screen can't."""
        return max(1, self._console.width * (self._console.height - 8))


def _stdout_console() -> Console:
    """A console on stdout that takes text literally: no markup, no emoji codes, no highlighting."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)
