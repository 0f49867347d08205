"""An engine for a command, with everything on the way to its first token that takes long shown on stderr."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from offload_engine.cli.progress import TOKENS, Progress
from offload_engine.cli.terminal import note
from offload_engine.config import EngineConfig, format_bytes

if TYPE_CHECKING:
    from offload_engine.engine.engine import Engine

PATIENCE = 1.0
"""Seconds of a prefill before it is shown: most are over by then."""

Report = Callable[[str, int, int], None]
"""What is being brought, bytes done, bytes in all."""

DOWNLOAD = "download"
"""What `resolve_model` calls what it brings."""


def load_engine(config: EngineConfig) -> Engine:
    """The engine, with progress on stderr. Raises `OffloadError`s."""
    from offload_engine.engine.engine import Engine  # here, for commands that load none start faster

    with loading_progress() as progress:
        engine = Engine.from_pretrained(config=config, progress=progress)
    gc.freeze()  # all this stays; to look through it for garbage took 3 % of the time of a short answer
    return engine


@contextmanager
def loading_progress(doing: str = "loading", did: str = "loaded") -> Iterator[Report]:
    """Shows what is reported while open, one thing after the other, and sums each up, in the words given for it."""
    stages = _Stages(doing, did)
    try:
        yield stages.report
        stages.finish()
    finally:
        stages.close()


class _Stages:
    """A download, then weights: each has a progress of its own."""

    def __init__(self, doing: str, did: str) -> None:
        self._doing, self._did = doing, did
        self._began = time.monotonic()
        self._what = ""
        self._shown: Progress | None = None

    def report(self, what: str, done: int, total: int) -> None:
        if self._shown is None or what != self._what:
            self.finish()
            doing = "downloading" if what == DOWNLOAD else f"{self._doing} {what}"
            self._what, self._shown = what, Progress(doing, total, done=done)
        self._shown.show(done)

    def finish(self) -> None:
        """What was reported last is done."""
        if self._shown is not None:
            self.close()
            size, now = format_bytes(self._shown.done), time.monotonic()
            did = f"downloaded {size}" if self._what == DOWNLOAD else f"{self._did} {size} of {self._what}"
            note(f"{did} in {now - self._began:.1f} s")
            self._began, self._shown = now, None

    def close(self) -> None:
        if self._shown is not None:
            self._shown.close()


@contextmanager
def prefill_progress(engine: Engine) -> Iterator[None]:
    """While open, prefills that take a while are shown."""
    shown: Progress | None = None

    def told(done: int, total: int) -> None:
        nonlocal shown
        if shown is None or done < shown.done:
            close()
            shown = Progress("reading the prompt", total, TOKENS, patience=PATIENCE)
        shown.show(done)
        if done == total:
            close()

    def close() -> None:
        nonlocal shown
        if shown is not None:
            shown.close()
            shown = None

    engine.on_prefill = told
    try:
        yield
    finally:
        engine.on_prefill = None
        close()
