"""An answer under way, as the event loop sees what the engine's thread tells of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from starlette.types import Receive

from offload_engine.core import Completion, StepEvent
from offload_engine.engine.batching import Batcher, Ticket
from offload_engine.server.bodies import Job
from offload_engine.server.failures import shutting_down, too_late
from offload_engine.server.logs import Record

Observer = Callable[[StepEvent], None]
"""Called on the engine's thread with every event."""


class Following:
    """One request, from its place in the queue to its completion. Whoever stops following calls `leave`."""

    def __init__(self, deadline: float, record: Record) -> None:
        """`deadline` is in seconds from now; `record` gets what is worth logging. Needs a running event loop."""
        self.record = record
        self.began = time.monotonic()
        self.seconds = deadline
        self.deadline = self.began + deadline
        self.completion: Completion | None = None
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[StepEvent | Completion | Exception] = asyncio.Queue()
        self._ticket: Ticket | None = None
        self._left = False

    async def submit(self, batcher: Batcher, job: Job, observer: Observer | None = None) -> None:
        """Queue the request. Raises what `Batcher.submit` raises.

        In a thread: tokenizing a long prompt takes a while, and the others shouldn't wait for it.
        """

        def tell(event: StepEvent) -> None:
            if observer is not None:
                observer(event)
            self._put(event)

        def submit() -> Ticket:
            return batcher.submit(
                job.prompt,
                job.params,
                raw=job.raw,
                routing=job.routing,
                top_p=job.top_p,
                on_event=tell,
                deadline=self.deadline,
            )

        submitting = asyncio.ensure_future(asyncio.to_thread(submit))
        try:
            self._ticket = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_give_up)
            raise
        self._ticket.add_done_callback(self._done)
        if self._left:
            self._ticket.cancel()

    async def events(self) -> AsyncIterator[StepEvent]:
        """Every event, the last of which carries the completion. Raises the error that ended the request."""
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, Completion):  # of a request that ended before it was begun
                event = StepEvent("block", 0, 0, (), completion=event)
            if self.record.first is None:
                self.record.first = time.monotonic() - self.began
            if event.completion is not None:
                self._finish(event.completion)
            yield event
            if event.completion is not None:
                return

    async def result(self) -> Completion:
        """The completion; raises what `events` raises."""
        async for _event in self.events():
            pass
        assert self.completion is not None
        return self.completion

    @property
    def finish_reason(self) -> str:
        """In OpenAI's words. What was cut short by the deadline or by the server's end reads as what was cut short by
        its length.
        """
        assert self.completion is not None
        return "stop" if self.completion.finish_reason in ("eos", "stop") else "length"

    @property
    def stop_reason(self) -> str | None:
        """What cut the answer short, if neither the model nor the request did."""
        if self.completion is None or self.completion.finish_reason != "cancelled":
            return None
        return "deadline" if time.monotonic() >= self.deadline else "shutdown"

    def leave(self) -> None:
        """Nobody wants the answer any more, or it is there: its place is free within a denoising step. Idempotent."""
        self._left = True
        if self.completion is None and self.record.error is None:
            self.record.details["finish_reason"] = "client gone"
        if self._ticket is not None:
            self._ticket.cancel()

    def _finish(self, completion: Completion) -> None:
        self.completion = completion
        stats = completion.stats
        self.record.details |= {
            "finish_reason": completion.finish_reason,
            "prompt_tokens": stats.prompt_tokens,
            "new_tokens": stats.new_tokens,
            "steps": stats.denoise_steps,
        }
        if completion.finish_reason == "cancelled" and not completion.token_ids:
            raise too_late(self.seconds) if self.stop_reason == "deadline" else shutting_down()

    def _put(self, event: StepEvent | Completion | Exception) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process ends
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _done(self, ticket: Ticket) -> None:
        try:
            self._put(ticket.result(timeout=0))
        except Exception as error:
            self._put(error)


async def unless_gone(receive: Receive, following: Following) -> Completion | None:
    """The completion; None once the client has gone away."""
    answer = asyncio.ensure_future(following.result())
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        following.leave()
        for task in (answer, gone):
            task.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _give_up(submitting: asyncio.Future[Ticket]) -> None:
    """The one who submitted this is gone."""
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
