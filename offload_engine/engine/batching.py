"""Continuous sharing: requests of many threads, answered by one engine in forwards that they share."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from types import TracebackType
from typing import Self

from offload_engine.core import Completion, SamplingParams, StepEvent
from offload_engine.decode.prompts import Prompt
from offload_engine.decode.session import Outcome
from offload_engine.decode.ticket import Ticket
from offload_engine.engine.adjusting import changed, reroute
from offload_engine.engine.engine import Engine
from offload_engine.errors import EngineClosedError, InternalError, OffloadError, QueueFullError, UsageError
from offload_engine.metrics import EngineStats
from offload_engine.routing import RoutingPolicy

__all__ = ["Batcher", "Ticket"]

TURN_BLOCKS = 4
"""Blocks that a request may have in a row while others that could share its forwards wait for their turn. A turn's
first block brings its experts back into the cache: turns of one block take 1.7 times the loads of answers one after the
other, turns of four 1.2 times (llada2-mini's shape, dMoE, 44 slots per layer; docs/LOG.md).
"""
POLICIES = 32
"""Policies that are remembered, so that requests for the same one can share forwards."""
RECENT_ANSWERS = 8
"""Answers that the estimate of when there is room again looks back on."""


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """A request that was found good."""

    ticket: Ticket
    prompt: list[int]
    params: SamplingParams
    policy: RoutingPolicy


class Batcher:
    """Answers requests of many threads with one engine, denoised together; they join and leave at block boundaries.

    One worker thread owns the engine until `close`: other calls of the engine are refused as busy meanwhile. Requests
    get the engine's lanes (as many as its `batch_size`) first come, first served; those that can't share a forward
    (other routing or p, other block length) take turns by block, and so, by `TURN_BLOCKS`, do those that the expert
    cache would not serve together. An answer is the one that the request would get alone, but for the rounding of
    products of other shapes. The statistics of a completion count its own prompt, tokens, blocks and steps, and
    everything else that the engine did from its first forward to its last.

    All methods may be called from any thread.
    """

    def __init__(self, engine: Engine, *, max_waiting: int = 64) -> None:
        """`max_waiting`: requests that may wait for a lane. Raises `UsageError` if the engine is busy."""
        if max_waiting < 0:
            raise UsageError(f"max_waiting is {max_waiting}; wanted at least 0")
        self._engine = engine
        self._max_waiting = max_waiting
        self._lanes = engine.plan.sequences
        self._changed = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._under_way: dict[int, tuple[_Job, float]] = {}
        """By number, with the time when it was begun."""
        self._closing = False
        self._numbers = count()
        self._policies: OrderedDict[tuple[str | None, float | None], RoutingPolicy] = OrderedDict()
        self._preparing = threading.Lock()
        self._seconds: deque[float] = deque(maxlen=RECENT_ANSWERS)
        """What the latest answers took."""
        self._owning = ExitStack()
        self._session = self._owning.enter_context(engine.session(turn_blocks=TURN_BLOCKS, reuse=True))
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._owning.close()
            raise

    @property
    def waiting(self) -> int:
        """Requests without a lane."""
        return len(self._waiting)

    @property
    def active(self) -> int:
        """Requests that have a lane."""
        return len(self._under_way)

    @property
    def closed(self) -> bool:
        """Whether no more requests are taken: `close` was called, or the engine failed for good."""
        return self._closing

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        routing: str | None = None,
        top_p: float | None = None,
        on_event: Callable[[StepEvent], None] | None = None,
        deadline: float | None = None,
    ) -> Ticket:
        """Have a prompt (text, the turns of a conversation, or token ids) answered.

        `routing` and `top_p` (dMoE's) are the request's own; None: the engine's. `on_event` is called on the worker
        thread and must not block; if it raises, the request ends with a `UsageError`. A request whose `deadline`, a
        value of `time.monotonic`, passes ends as cancelled with what was decided; while it waits, with nothing.

        Raises `UsageError` or `PromptError` for arguments that can't be honoured, `QueueFullError` when `max_waiting`
        requests wait, `EngineClosedError` after `close`.
        """
        self._check_open()
        params = params or SamplingParams()
        with self._preparing:
            ids = self._engine.prepare(prompt, params, raw=raw)
            policy = self._policy(routing, top_p)
        with self._changed:
            self._check_open()
            if len(self._waiting) >= self._max_waiting + self._lanes - len(self._under_way):
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already, as many as may; try again in "
                    f"{self._retry_after():.0f} s",
                    self._retry_after(),
                )
            ticket = Ticket(next(self._numbers), on_event, deadline)
            self._waiting.append(_Job(ticket, ids, params, policy))
            self._changed.notify_all()
        return ticket

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no further requests, and give the engine back. Idempotent.

        `drain`: answer those that are there first, for at most `timeout` seconds, then cancel the rest; else cancel
        all. Joins the worker thread, unless called from it.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not drain:
            self._cancel_all()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._cancel_all()
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close(drain=error is None)

    def _check_open(self) -> None:
        if self._closing:
            raise EngineClosedError("the batcher is closed and takes no more requests; make another one")

    def _cancel_all(self) -> None:
        with self._changed:
            for job in [*self._waiting, *(job for job, _began in self._under_way.values())]:
                job.ticket.cancel()

    def _policy(self, routing: str | None, top_p: float | None) -> RoutingPolicy:
        """The same object for the same policy, however it was asked for."""
        found = self._policies.get((routing, top_p))
        if found is None:
            found = _policy_of(self._engine, routing, top_p)
            known = [self._engine.policy, *self._policies.values()]
            found = next((one for one in known if one == found), found)
            self._policies[routing, top_p] = found
            if len(self._policies) > POLICIES:
                self._policies.popitem(last=False)
        return found

    def _retry_after(self) -> float:
        """Seconds until a lane, and so a place in the queue, is likely to be free."""
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return max(1.0, mean / self._lanes)

    def _work(self) -> None:
        """The worker thread."""
        failure: Exception = EngineClosedError("the batcher was closed")
        try:
            while self._wait_for_work():
                try:
                    self._admit()
                    for number, outcome in self._session.advance():
                        self._tell(number, outcome)
                except EngineClosedError:
                    raise
                except Exception as error:  # nobody's in particular: those under way are lost, but not the next ones
                    self._session.abandon()
                    for number in list(self._under_way):
                        self._tell(number, error)
        except Exception as error:
            failure = error
        finally:
            self._stop(failure)

    def _wait_for_work(self) -> bool:
        """Whether there is any, sooner or later."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._waiting or self._under_way)
            return bool(self._waiting or self._under_way)

    def _admit(self) -> None:
        """Give free lanes to who has waited longest, and an answer to who has given up."""
        for job in self._given_up():
            job.ticket.tell(StepEvent("block", 0, 0, (), completion=self._nothing(job)))
        while self._session.has_room and (following := self._next()) is not None:
            ticket = following.ticket
            try:
                self._session.enter(ticket.id, following.prompt, following.params, ticket.given_up, following.policy)
            except EngineClosedError:
                raise
            except Exception as error:
                self._tell(ticket.id, error)

    def _given_up(self) -> list[_Job]:
        """Those that wait no longer; they are taken from the queue."""
        with self._changed:
            found = [job for job in self._waiting if job.ticket.given_up()]
            for job in found:
                self._waiting.remove(job)
        return found

    def _next(self) -> _Job | None:
        """Who has waited longest, from now on under way; None if nobody waits."""
        with self._changed:
            if not self._waiting:
                return None
            job = self._waiting.popleft()
            self._under_way[job.ticket.id] = job, time.monotonic()
            return job

    def _nothing(self, job: _Job) -> Completion:
        """The answer to a request that was never begun."""
        stats: EngineStats = self._engine.stats
        return Completion(
            "", [], "cancelled", replace(stats.since(stats.snapshot()), prompts=1, prompt_tokens=len(job.prompt))
        )

    def _tell(self, number: int, outcome: Outcome) -> None:
        job, began = self._under_way[number]
        ended = isinstance(outcome, Exception) or outcome.completion is not None
        if ended:
            with self._changed:
                del self._under_way[number]
                self._seconds.append(time.monotonic() - began)
        if isinstance(outcome, Exception):
            job.ticket.end(_typed(outcome))
        else:
            job.ticket.tell(outcome)

    def _stop(self, failure: Exception) -> None:
        """Give the engine back; whoever is still there learns why they get nothing."""
        with self._changed:
            self._closing = True
            left = [*self._waiting, *(job for job, _began in self._under_way.values())]
            self._waiting.clear()
            self._under_way.clear()
        self._owning.close()
        for job in left:
            job.ticket.end(_typed(failure))


def _policy_of(engine: Engine, routing: str | None, top_p: float | None) -> RoutingPolicy:
    """The engine's policy with these options of its own. Raises `ConfigError`, `UsageError`: see `reroute`."""
    if routing is None and top_p is None:
        return engine.policy
    policy, _notices = reroute(changed(engine.config, routing=routing, top_p=top_p), engine._parts)
    return policy


def _typed(error: Exception) -> OffloadError:
    """The error itself, or, of a defect, one that says so."""
    if isinstance(error, OffloadError):
        return error
    defect = InternalError(f"a defect ended this request: {type(error).__name__}: {error}")
    defect.__cause__ = error
    return defect
