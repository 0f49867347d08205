"""Who may use an engine: one call at a time, and none once it is closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from offload_engine.errors import EngineClosedError, UsageError
from offload_engine.memory.refusal import refusals


class Access:
    """Guards an engine's calls against each other, and against a `close` that comes from another thread meanwhile."""

    def __init__(self) -> None:
        self._books = threading.Lock()
        self._call: object | None = None
        """Of the call that is under way."""
        self._working = threading.RLock()
        self.closed = False

    @contextmanager
    def call(self) -> Iterator[None]:
        """The whole of a call, from its first event to its last.

        Raises `EngineClosedError`, and `UsageError` while another one is under way.
        """
        own = object()
        try:
            with self._books:  # an interrupt between any two of these lines leaves the engine free
                self._require_open()
                if self._call is not None:
                    raise UsageError(
                        "the engine is busy with another call; wait for it or close its stream, or use a second engine"
                    )
                self._call = own
            yield
        finally:
            if self._call is own:
                self._call = None

    @contextmanager
    def work(self) -> Iterator[None]:
        """A part of a call in which nothing of the engine may be freed.

        Raises `EngineClosedError` for whatever comes of the engine's being closed meanwhile, `MemoryBudgetError` for
        memory that the system refuses.
        """
        with self._working:
            self._require_open()
            try:
                with refusals("an answer was computed"):
                    yield
            except EngineClosedError:
                raise
            except Exception as error:
                if self.closed:
                    raise EngineClosedError("the engine was closed during this call") from error
                raise

    def close(self) -> bool:
        """Begin no work any more; whether this is the first `close`."""
        with self._books:
            first, self.closed = not self.closed, True
        return first

    def wait(self) -> None:
        """Wait until no other thread is at work."""
        with self._working:
            pass

    def _require_open(self) -> None:
        if self.closed:
            raise EngineClosedError("the engine is closed; make another one with Engine.from_pretrained")
