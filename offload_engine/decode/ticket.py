"""A request that another thread answers: what has come of it so far, and what will."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator

from offload_engine.core import Completion, StepEvent
from offload_engine.errors import UsageError

logger = logging.getLogger(__name__)


class Ticket:
    """Of one request. All methods may be called from any thread; `tell` and `end` are the answering thread's."""

    def __init__(
        self, number: int, on_event: Callable[[StepEvent], None] | None = None, deadline: float | None = None
    ) -> None:
        """`on_event` is called on the answering thread; `deadline` is a value of `time.monotonic`."""
        self.id = number
        self._on_event = on_event
        self._deadline = deadline
        self._cancelled = False
        self._changed = threading.Condition()
        self._events: list[StepEvent] = []
        self._result: Completion | Exception | None = None
        self._callbacks: list[Callable[[Ticket], None]] = []

    def events(self) -> Iterator[StepEvent]:
        """Every event from the first on, as they come; the last carries the completion. Raises the error that ended the
        request.
        """
        seen = 0
        while True:
            with self._changed:
                while len(self._events) == seen and self._result is None:
                    self._changed.wait()
                fresh = self._events[seen:]
            if not fresh:
                break
            yield from fresh
            seen += len(fresh)
        if isinstance(self._result, Exception):
            raise self._result

    def result(self, timeout: float | None = None) -> Completion:
        """The completion, once it is there. Raises the error that ended the request, and `TimeoutError` if nothing has
        after `timeout` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._result is not None, timeout):
                raise TimeoutError(f"request {self.id} is not answered after {timeout:g} s")
        if isinstance(self._result, Exception):
            raise self._result
        assert self._result is not None
        return self._result

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._result is not None

    def cancel(self) -> None:
        """End the answer with what is decided; takes effect within one denoising step."""
        self._cancelled = True

    def given_up(self) -> bool:
        """Whether it was cancelled, or its deadline has passed."""
        return self._cancelled or (self._deadline is not None and time.monotonic() >= self._deadline)

    def add_done_callback(self, callback: Callable[[Ticket], None]) -> None:
        """Have `callback` called with this ticket on the answering thread once the request has ended; at once if it
        has. What it raises is logged.
        """
        with self._changed:
            if self._result is None:
                self._callbacks.append(callback)
                return
        self._call(callback)

    def tell(self, event: StepEvent) -> None:
        """Something happened. If the caller's own callback fails, the request ends with that."""
        if self.done:
            return
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()
        try:
            if self._on_event is not None:
                self._on_event(event)
        except Exception as error:
            failure = UsageError(f"on_event raised {type(error).__name__} ({error}), which ended the request")
            failure.__cause__ = error
            self.cancel()
            self.end(failure)
            return
        if event.completion is not None:
            self.end(event.completion)

    def end(self, result: Completion | Exception) -> None:
        """The request has ended; all but the first call are without effect."""
        with self._changed:
            if self._result is not None:
                return
            self._result = result
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        for callback in callbacks:
            self._call(callback)

    def _call(self, callback: Callable[[Ticket], None]) -> None:
        try:
            callback(self)
        except Exception:
            logger.exception("a done callback of request %d failed", self.id)
