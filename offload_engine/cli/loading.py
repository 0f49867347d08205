"""Progress while weights are loaded: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_engine.cli.terminal import note, stderr_console, stderr_is_live
from offload_engine.config import EngineConfig, format_bytes

if TYPE_CHECKING:
    from offload_engine.engine import Engine

LINE_SECONDS = 5.0
"""A terminal's bar apart, progress is told this often."""

Report = Callable[[str, int, int], None]
"""What is loaded, bytes done, bytes in all."""


def load_engine(config: EngineConfig) -> Engine:
    """The engine, with progress on stderr. Raises `OffloadError`s."""
    from offload_engine.engine import Engine  # here, for commands that load none start faster

    with loading_progress() as progress:
        engine = Engine.from_pretrained(config=config, progress=progress)
    gc.freeze()  # all this stays; to look through it for garbage took 3 % of the time of a short answer
    return engine


@contextmanager
def loading_progress(doing: str = "loading", done: str = "loaded") -> Iterator[Report]:
    """Shows what is reported while open, and sums it up at the end, in the words given for it."""
    summary = _Lines(doing, done)
    if not stderr_is_live():
        yield summary
    else:
        with _bar(doing) as bar:

            def both(what: str, done: int, total: int) -> None:
                summary.count(what, done)
                bar(what, done, total)

            yield both
    summary.close()


class _Lines:
    """Plain lines of progress."""

    def __init__(self, doing: str, done: str) -> None:
        self._doing, self._did = doing, done
        self._began = self._told = time.monotonic()
        self._what, self._done = "", 0
        self._first: tuple[float, int] | None = None
        """When the first report came, and the bytes it told of: what came before may be a download."""

    def __call__(self, what: str, done: int, total: int) -> None:
        self.count(what, done)
        now = time.monotonic()
        if done < total and now - self._told >= LINE_SECONDS:
            self._told = now
            note(f"{self._doing} {what}: {format_bytes(done)} of {format_bytes(total)}{self._rate(now, total - done)}")

    def count(self, what: str, done: int) -> None:
        self._what, self._done = what, done
        self._first = self._first or (time.monotonic(), done)

    def close(self) -> None:
        if self._what:
            note(f"{self._did} {format_bytes(self._done)} of {self._what} in {time.monotonic() - self._began:.1f} s")

    def _rate(self, now: float, left: int) -> str:
        """Speed and time left; nothing as long as they aren't known."""
        assert self._first is not None
        seconds, done = now - self._first[0], self._done - self._first[1]
        if seconds <= 0 or done <= 0:
            return ""
        return f", {format_bytes(round(done / seconds))}/s, {left * seconds / done:.0f} s left"


@contextmanager
def _bar(doing: str) -> Iterator[Report]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr_console(), transient=True) as progress:
        task = progress.add_task(f"{doing} model", total=None)
        yield lambda what, done, total: progress.update(
            task, description=f"{doing} {what}", completed=done, total=total
        )
