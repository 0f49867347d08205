"""How far a long piece of work is, how fast it goes and how long it will take: told in one way by all that is long.

A line with a bar that a terminal redraws and that is gone at the end; elsewhere a line now and then. Always on stderr.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Self

from offload_engine.cli.terminal import note, stderr_console, stderr_is_live
from offload_engine.config import format_bytes

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress as Display
    from rich.progress import TaskID

LINE_SECONDS = 5.0
"""Where nothing can be redrawn, progress is told this often."""
BAR_WIDTH = 24


class Unit(NamedTuple):
    """What work is counted in."""

    amount: Callable[[int], str]
    rate: Callable[[float], str]
    """Of so much per second."""


BYTES = Unit(format_bytes, lambda rate: f"{format_bytes(round(rate))}/s")
PIECES = Unit(str, lambda rate: f"{rate:.1f}/s" if rate >= 1 else f"{rate:.2g}/s")
TOKENS = Unit(lambda count: f"{count} tokens", lambda rate: f"{rate:.0f} tokens/s")
RUNS = Unit(str, lambda rate: f"{duration(1 / rate)} each")
"""Pieces that take long."""


def duration(seconds: float) -> str:
    """As a reader wants it: '7 s', '3:10', '2:03:10'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """One piece of work of a known size. Open it, tell it how far it is, close it.

    Speed and time left are those since it was made, what was `done` before then left out. `total` may be corrected
    before any `show`.
    """

    def __init__(
        self,
        doing: str,
        total: int,
        unit: Unit = BYTES,
        *,
        done: int = 0,
        remark: str = "",
        every: float = LINE_SECONDS,
        patience: float = 0.0,
        still: bool = False,
    ) -> None:
        """`every`: seconds between two lines; `patience`: seconds before a bar appears, for what is often quick;
        `still`: the bar is drawn by `show` alone and not by a thread, which would disturb what is being measured.
        """
        self.doing, self.total, self.done = doing, total, done
        self._unit, self._every, self._patience, self._first = unit, every, patience, done
        self._remark, self._still = remark, still
        self._began = self._told = time.monotonic()
        self._live = stderr_is_live()
        self._display: tuple[Display, TaskID] | None = None

    @property
    def seconds(self) -> float:
        """Since it was made."""
        return time.monotonic() - self._began

    def show(self, done: int, remark: str = "") -> None:
        """So much is done now; `remark` is what else there is to say of it."""
        self.done, self._remark = done, remark
        if self._live:
            self._draw()
        elif done < self.total and time.monotonic() - self._told >= self._every:
            self._told = time.monotonic()
            note(self.line())

    def advance(self, count: int) -> None:
        """So much more is done now."""
        self.show(self.done + count, self._remark)

    def show_of(self, done: int, total: int) -> None:
        """So much is done now of what has come to be so much in all."""
        self.total = total
        self.show(done, self._remark)

    def line(self) -> str:
        """How things stand, in one line; speed and time left as soon as they are known."""
        amount, seconds, new = self._unit.amount, self.seconds, self.done - self._first
        said = [f"{self.doing}: {amount(self.done)} of {amount(self.total)}", self._remark]
        if seconds > 0 and new > 0:
            said.append(self._unit.rate(new / seconds))
            said.append(f"{duration(max(0, self.total - self.done) * seconds / new)} left")
        return ", ".join(filter(None, said))

    def close(self) -> None:
        """Take the bar away. Idempotent."""
        if self._display is not None:
            self._display[0].stop()
            self._display = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _draw(self) -> None:
        if self._display is None:
            if self.seconds < self._patience:
                return
            self._display = _bar(self.total, self._still)
        display, task = self._display
        display.update(task, completed=self.done, total=self.total, description=self.line(), refresh=self._still)


def _bar(total: int, still: bool) -> tuple[Display, TaskID]:
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Display

    columns = (BarColumn(BAR_WIDTH), TextColumn("{task.description}", markup=False))
    console = stderr_console()
    display = Display(*columns, console=console, transient=True, refresh_per_second=5, auto_refresh=not still)
    display.start()
    return display, display.add_task("", total=total)
