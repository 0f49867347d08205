"""An engine in a program that runs on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from offload_engine.config import EngineConfig
from offload_engine.core import Completion, SamplingParams, StepEvent
from offload_engine.decode.prompts import Prompt
from offload_engine.decode.ticket import Ticket
from offload_engine.engine.batching import Batcher
from offload_engine.engine.engine import Engine
from offload_engine.engine.options import EngineOptions
from offload_engine.errors import EngineClosedError, InternalError, OffloadError
from offload_engine.model.hub import Progress

Result = TypeVar("Result")

MAX_WAITING = 1024
"""Calls that may wait; more are refused with `QueueFullError`."""


class AsyncEngine:
    """Answers on a thread of its own, so that the event loop stays free. For use from one event loop at a time.

    Calls may overlap: a `Batcher` answers as many at a time as the engine has lanes (its `batch_size`), which then
    share the experts that are fetched; the others wait for their turn. A task that is cancelled, or leaves `stream`
    early, gives its lane free within one denoising step (in a long prompt, one layer), and has done so when it ends.
    Whatever else the engine can do goes by `run`, in its turn.
    """

    def __init__(self, engine: Engine) -> None:
        """Takes the engine over: `aclose` closes it. Raises `UsageError` if it is busy."""
        self.engine = engine
        """For what may be asked at any time: `plan`, `stats`, `occupancy()`, `tokenizer`."""
        self._batcher = Batcher(engine, max_waiting=MAX_WAITING)
        self._entering = asyncio.Lock()
        """Held while a request is handed to the batcher, and while there is none."""
        self._closed = False

    @classmethod
    async def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        config: EngineConfig | Path | str | None = None,
        progress: Progress | None = None,
        **overrides: Unpack[EngineOptions],
    ) -> Self:
        """As `Engine.from_pretrained`; `progress` is called on another thread."""
        loader = ThreadPoolExecutor(1, thread_name_prefix="engine-loader")
        load = partial(Engine.from_pretrained, model, config=config, progress=progress, **overrides)
        loading = loader.submit(load)
        loader.shutdown(wait=False)
        try:
            return cls(await asyncio.wrap_future(loading))
        except asyncio.CancelledError:
            loading.add_done_callback(_close_unwanted)
            raise

    async def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        routing: str | None = None,
        top_p: float | None = None,
    ) -> AsyncGenerator[StepEvent, None]:
        """As `Engine.stream`; `routing` and dMoE's `top_p` may be this answer's own. What is wrong with the arguments
        is raised by the first event, if by any.

        The engine goes on while the caller does something with an event. Leave the loop by `break` only inside
        `contextlib.aclosing`, else the answer goes on until the generator is collected.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[StepEvent | None] = asyncio.Queue()

        def tell(event: StepEvent | None) -> None:  # raises if the loop was closed meanwhile, which ends the request
            loop.call_soon_threadsafe(events.put_nowait, event)

        options: dict[str, Any] = {"raw": raw, "routing": routing, "top_p": top_p, "on_event": tell}
        ticket = await self._enter(lambda: self._batcher.submit(prompt, params, **options))
        ticket.add_done_callback(lambda _ticket: tell(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            ticket.result(0)
        finally:
            await _leave(ticket)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        routing: str | None = None,
        top_p: float | None = None,
    ) -> Completion:
        """The answer to one prompt; see `stream`. Several at once: `asyncio.gather`."""
        async with aclosing(self.stream(prompt, params, raw=raw, routing=routing, top_p=top_p)) as events:
            async for event in events:
                if event.completion is not None:
                    return event.completion
        raise InternalError("an answer ended without its completion")

    async def run(self, call: Callable[[Engine], Result]) -> Result:
        """`call` with the engine to itself, on another thread, once everything under way is answered: for `resize`,
        `logits`, `set_routing` and the like. Can't be stopped once it is under way: a task that is cancelled ends when
        it does.
        """
        async with self._entering:
            self._check_open()
            return await _to_the_end(asyncio.to_thread(self._alone, call))

    @property
    def active(self) -> int:
        """Answers under way."""
        return self._batcher.active

    async def aclose(self) -> None:
        """End what is under way or waits with `EngineClosedError`, join all threads, free everything. Idempotent."""
        self._closed = True
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _enter(self, submit: Callable[[], Ticket]) -> Ticket:
        async with self._entering:
            self._check_open()
            entering = asyncio.ensure_future(asyncio.to_thread(submit))
            try:
                return await asyncio.shield(entering)
            except asyncio.CancelledError:
                await asyncio.wait([entering])
                if entering.exception() is None:
                    await _leave(entering.result())
                raise

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosedError("the engine is closed; make another one with AsyncEngine.from_pretrained")

    def _alone(self, call: Callable[[Engine], Result]) -> Result:
        self._batcher.close()
        try:
            return call(self.engine)
        finally:
            if not self._closed:
                self._batcher = Batcher(self.engine, max_waiting=MAX_WAITING)

    def _close(self) -> None:
        self.engine.close()
        self._batcher.close()  # whose worker finds the engine closed, and ends every request with that


async def _leave(ticket: Ticket) -> None:
    """Cancel it, and wait until its lane is free."""
    ticket.cancel()
    if not ticket.done:
        with suppress(OffloadError):  # nobody's any more
            await asyncio.to_thread(ticket.result)


async def _to_the_end(work: Coroutine[Any, Any, Result]) -> Result:
    """What comes of `work`, which is not to be left half done: who is cancelled meanwhile goes on waiting for it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _close_unwanted(loading: Future[Engine]) -> None:
    """An engine that was loaded for a task that is no more."""
    if loading.exception() is None:
        loading.result().close()
