"""A thread that works through what it is given, one after the other, and says when each is done."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from offload_engine.errors import EngineClosedError


class Job:
    """Work given to a `Worker`."""

    __slots__ = ("error", "work")

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.error: BaseException | None = None
        """What it raised; final once it is done."""


class Worker:
    """Begins jobs in the order given. One other thread may begin them and wait, and may be interrupted anywhere."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()  # which no interrupt can leave locked
        self._done: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._closing = threading.Lock()
        """No job may be queued behind the mark that ends the thread."""
        self._closed = False
        self._thread = threading.Thread(target=self._work_forever, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], None]) -> Job:
        """Have `work` done; returns at once."""
        job = Job(work)
        with self._closing:
            if self._closed:
                raise EngineClosedError("experts were to be computed on the CPU after the engine was closed")
            self._jobs.put(job)
        return job

    def wait(self, job: Job) -> None:
        """Wait until `job` and all before it are done; raises what it raised. Once per job, in their order."""
        while self._done.get() is not job:
            continue  # one whose end nobody has waited for
        if job.error is not None:
            raise job.error

    def drain(self) -> None:
        """Wait until all jobs begun are done, whatever came of them."""
        if not self._closed:
            self.wait(self.begin(_nothing))

    def close(self) -> None:
        """Finish what was begun and join the thread. Idempotent."""
        with self._closing:
            if not self._closed:
                self._jobs.put(None)
            self._closed = True
        self._thread.join()

    def _work_forever(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.work()
            except BaseException as error:
                job.error = error
            self._done.put(job)


def _nothing() -> None: ...
