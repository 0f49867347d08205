"""An engine in a program that runs on asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from offload_engine.config import EngineConfig
from offload_engine.core import Completion, SamplingParams, StepEvent
from offload_engine.decode.prompts import Prompt
from offload_engine.engine import Engine
from offload_engine.engine_options import EngineOptions
from offload_engine.errors import EngineClosedError, InternalError
from offload_engine.model.hub import Progress

Result = TypeVar("Result")


class AsyncEngine:
    """Answers on a thread of its own, so that the event loop stays free. For use from one event loop at a time.

    Calls may overlap: they are answered one after the other, in the order in which they began. A task that is
    cancelled, or leaves `stream` early, gives the engine free within one denoising step (in a long prompt, one layer),
    and has done so when it ends. Whatever else the engine can do goes by `run`, in its turn.
    """

    def __init__(self, engine: Engine) -> None:
        """Takes the engine over: `aclose` closes it."""
        self.engine = engine
        """For what may be asked at any time: `plan`, `stats`, `occupancy()`, `tokenizer`."""
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="engine-worker")
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
        self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False
    ) -> AsyncGenerator[StepEvent, None]:
        """As `Engine.stream`. What is wrong with the arguments is raised by the first event, if by any.

        The engine goes on while the caller does something with an event. Leave the loop by `break` only inside
        `contextlib.aclosing`, else the answer goes on until the generator is collected.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[StepEvent | None] = asyncio.Queue()
        left = threading.Event()

        def tell(event: StepEvent | None) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop was closed meanwhile: nobody listens any more
                left.set()

        def answer() -> None:
            try:
                for event in self.engine.stream(prompt, params, raw=raw, cancelled=left.is_set):
                    tell(event)
            finally:
                tell(None)

        work = self._submit(answer)
        try:
            while (event := await events.get()) is not None:
                yield event
            work.result()
        finally:
            left.set()
            await _ended(work)

    async def generate(self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False) -> Completion:
        """The answer to one prompt; see `stream`. Several at once: `asyncio.gather`."""
        async with aclosing(self.stream(prompt, params, raw=raw)) as events:
            async for event in events:
                if event.completion is not None:
                    return event.completion
        raise InternalError("an answer ended without its completion")

    async def run(self, call: Callable[[Engine], Result]) -> Result:
        """`call` with the engine, in its turn: for `resize`, `logits`, `set_routing` and the like. Can't be stopped
        once it is under way: a task that is cancelled ends when it does.
        """
        work = self._submit(partial(call, self.engine))
        try:
            return await asyncio.wrap_future(work)
        finally:
            await _ended(work)

    async def aclose(self) -> None:
        """End the answer under way with `EngineClosedError`, join all threads, free everything. Idempotent."""
        self._closed = True
        await asyncio.to_thread(self._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def _submit(self, work: Callable[[], Result]) -> Future[Result]:
        if self._closed:
            raise EngineClosedError("the engine is closed; make another one with AsyncEngine.from_pretrained")
        return self._worker.submit(work)

    def _close(self) -> None:
        self.engine.close()
        self._worker.shutdown()


async def _ended(work: Future[Any]) -> None:
    """Wait until `work` is done, or will never begin."""
    if not work.cancel() and not work.done():
        await asyncio.to_thread(work.exception)


def _close_unwanted(loading: Future[Engine]) -> None:
    """An engine that was loaded for a task that is no more."""
    if loading.exception() is None:
        loading.result().close()
