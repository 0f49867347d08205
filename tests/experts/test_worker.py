"""A worker: jobs in their order, each waited for or not, and what they raise."""

from __future__ import annotations

import threading

import pytest

from offload_engine.errors import EngineClosedError
from offload_engine.experts.transfer.worker import Worker


def fail() -> None:
    raise ArithmeticError("no")


def test_jobs_are_done_in_their_order_and_on_another_thread() -> None:
    worker, done = Worker("one"), []
    jobs = [
        worker.begin(lambda number=number: done.append((number, threading.current_thread().name)))
        for number in range(5)
    ]
    worker.wait(jobs[1])
    assert done[:2] == [(0, "one"), (1, "one")]
    worker.wait(jobs[4])
    assert [number for number, _name in done] == list(range(5))
    worker.close()


def test_what_a_job_raises_is_raised_to_whoever_waits_for_it_and_to_nobody_else() -> None:
    worker = Worker("one")
    failed = worker.begin(fail)
    with pytest.raises(ArithmeticError, match="no"):
        worker.wait(failed)
    worker.begin(fail)
    worker.drain()
    worker.wait(worker.begin(lambda: None))
    worker.close()


def test_a_drained_worker_is_through_with_everything() -> None:
    worker, gate, done = Worker("one"), threading.Event(), []
    worker.begin(lambda: gate.wait(20) and done.append(1))
    worker.begin(lambda: done.append(2))
    threading.Timer(0.05, gate.set).start()
    worker.drain()
    assert done == [1, 2]
    worker.close()


def test_closing_finishes_what_was_begun_and_takes_no_more() -> None:
    before = threading.active_count()
    worker, done = Worker("one"), []
    last = worker.begin(lambda: done.append(1))
    worker.close()
    worker.close()
    assert done == [1]
    worker.wait(last)
    worker.drain()
    with pytest.raises(EngineClosedError, match="after the engine was closed"):
        worker.begin(lambda: None)
    assert threading.active_count() == before
