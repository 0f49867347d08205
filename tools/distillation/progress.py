"""Progress of a run, read off the dataset's directory, so that it is the same whoever answers, and wherever."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from offload_engine.cli.progress import PIECES, Progress
from offload_engine.cli.terminal import stderr_is_live
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
    over = threading.Event()
    with Progress("answering", total, PIECES, done=tally().done, every=0) as progress:

        def follow() -> None:
            while not over.wait(BAR_SECONDS if stderr_is_live() else LINE_SECONDS):
                now = tally()
                progress.show(now.done, f"{now.kept} kept, {now.dropped} dropped")

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
