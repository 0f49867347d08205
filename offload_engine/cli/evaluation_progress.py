"""Progress of an evaluation, with the accuracy so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from offload_engine.cli.progress import PIECES, Progress
from offload_engine.cli.terminal import note
from offload_engine.evaluate.records import Record

LINE_SECONDS = 10.0
"""Where nothing can be redrawn, progress is told this often."""

Show = Callable[[Record], None]


@contextmanager
def evaluation_progress(total: int, before: Mapping[str, bool]) -> Iterator[Show]:
    """Shows each record it is called with, of `total` in all; `before` are those of an earlier run (id -> right)."""
    right, first = sum(before.values()), len(before)

    def accuracy(done: int) -> str:
        return f"{100 * right / done:.1f} % right" if done else ""

    if before:
        note(f"going on after {first} of {total} answers")
    with Progress("answers", total, PIECES, done=first, remark=accuracy(first), every=LINE_SECONDS) as progress:

        def show(record: Record) -> None:
            nonlocal right
            right += bool(record["strict"])
            progress.show(progress.done + 1, accuracy(progress.done + 1))

        yield show
    note(progress.line() if progress.done else "no answers")
