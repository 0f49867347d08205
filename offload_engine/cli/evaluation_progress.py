"""Progress of an evaluation: a bar on a terminal, else a line now and then, with the accuracy so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from offload_engine.cli.terminal import note, stderr_console, stderr_is_live
from offload_engine.evaluate.records import Record

LINE_SECONDS = 10.0
"""A terminal's bar apart, progress is told this often."""

Show = Callable[[Record], None]


@contextmanager
def evaluation_progress(total: int, before: Mapping[str, bool]) -> Iterator[Show]:
    """Shows each record it is called with, of `total` in all; `before` are those of an earlier run (id -> right)."""
    tally = _Tally(total, before)
    if before:
        note(f"going on after {len(before)} of {total} answers")
    if stderr_is_live():
        with _bar(tally) as show:
            yield show
    else:
        yield _lines(tally)


class _Tally:
    """How many answers there are and how many of them are right."""

    def __init__(self, total: int, before: Mapping[str, bool]) -> None:
        self.total = total
        self.done = self._first = len(before)
        self.right = sum(before.values())
        self._began = time.monotonic()

    def count(self, record: Record) -> None:
        self.done += 1
        self.right += bool(record["strict"])

    @property
    def accuracy(self) -> str:
        return f"{100 * self.right / self.done:.1f} % right"

    def line(self) -> str:
        if not self.done:
            return "no answers"
        if self.done == self._first:
            return f"{self.done}/{self.total} answers, {self.accuracy}"
        rate = (self.done - self._first) / max(time.monotonic() - self._began, 1e-9)
        left = round((self.total - self.done) / rate)
        return f"{self.done}/{self.total} answers, {self.accuracy}, {rate:.1f}/s, {left // 60}:{left % 60:02} left"


def _lines(tally: _Tally) -> Show:
    told = time.monotonic()

    def show(record: Record) -> None:
        nonlocal told
        tally.count(record)
        now = time.monotonic()
        if now - told >= LINE_SECONDS or tally.done == tally.total:
            told = now
            note(tally.line())

    return show


@contextmanager
def _bar(tally: _Tally) -> Iterator[Show]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr_console(), transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("", total=tally.total, completed=tally.done)

        def show(record: Record) -> None:
            tally.count(record)
            progress.update(task, completed=tally.done, description=tally.accuracy)

        yield show
    note(tally.line())
