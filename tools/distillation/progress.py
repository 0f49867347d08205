"""Progress of a run, read off the dataset's directory, so that it is the same whoever answers, and wherever."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from offload_engine.cli.terminal import note, stderr_console, stderr_is_live
from tools.distillation.shards import DROPPED_PREFIX, WORK

BAR_SECONDS, LINE_SECONDS = 1.0, 10.0
"""How often a terminal's bar is redrawn, and how often progress is told elsewhere."""


class Tally(NamedTuple):
    """Prompts done with."""

    kept: int = 0
    dropped: int = 0

    @property
    def done(self) -> int:
        """Both together."""
        return self.kept + self.dropped

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        return Tally(self.kept + other.kept, self.dropped + other.dropped)


class Watch:
    """Counts what receipts and journals say is done."""

    def __init__(self, directory: Path, before: Tally) -> None:
        """`before`: what is done in shards that `directory` has no receipt of."""
        self._work = directory / WORK
        self._before = before
        self._receipts: dict[str, Tally] = {}

    def tally(self) -> Tally:
        """As things stand."""
        parts: dict[str, Tally] = {}
        for path in self._work.glob("shard-*"):
            shard = path.name.partition(".")[0]
            with suppress(OSError, ValueError):  # just gone: the next look finds its successor
                if path.suffix == ".part":
                    parts[shard] = parts.get(shard, Tally()) + _journalled(path)
                elif shard not in self._receipts:
                    receipt = json.loads(path.read_bytes())
                    self._receipts[shard] = Tally(receipt["kept"], sum(receipt["dropped"].values()))
        unfinished = (tally for shard, tally in parts.items() if shard not in self._receipts)
        return sum([*self._receipts.values(), *unfinished], start=self._before)


def _journalled(path: Path) -> Tally:
    lines = path.read_bytes().split(b"\n")[:-1]
    dropped = sum(line.startswith(DROPPED_PREFIX) for line in lines)
    return Tally(len(lines) - dropped, dropped)


@contextmanager
def showing(tally: Callable[[], Tally], total: int) -> Iterator[None]:
    """While open, shows on stderr how much of `total` is done."""
    first, began, over = tally(), time.monotonic(), threading.Event()
    with _display(total, first) as show:

        def follow() -> None:
            while not over.wait(BAR_SECONDS if stderr_is_live() else LINE_SECONDS):
                now = tally()
                show(now, (now.done - first.done) / (time.monotonic() - began))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


Show = Callable[[Tally, float], None]
"""Takes what is done, and answers per second."""


@contextmanager
def _display(total: int, first: Tally) -> Iterator[Show]:
    if not stderr_is_live():
        yield lambda tally, rate: note(f"{tally.done} of {total} prompts: {_summary(tally, rate, total)}")
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=stderr_console(), transient=True) as progress:
        task = progress.add_task("", total=total, completed=first.done)
        yield lambda tally, rate: progress.update(task, completed=tally.done, description=_summary(tally, rate, total))


def _summary(tally: Tally, rate: float, total: int) -> str:
    left = f", {_duration((total - tally.done) / rate)} left" if rate > 0 else ""
    return f"{tally.kept} kept, {tally.dropped} dropped, {rate:.2f}/s{left}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
