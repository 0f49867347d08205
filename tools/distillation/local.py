"""Shards answered on this machine: in this process, or by several, each with an engine of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import torch

from offload_engine.errors import OffloadError
from offload_engine.memory import auto_budget, available_memory
from tools.distillation.shards import Receipt, Shard, generate_shard
from tools.distillation.teacher import Answering, Teacher

LOCAL = "local"
"""The address of a Ray cluster that means: start one of this machine alone, for as long as the job takes."""
WORKER_KILLED = (
    "a worker was killed, perhaps for want of memory; run the same command again to go on, with fewer --workers or a "
    "smaller --gpu-mem"
)


def answer_locally(directory: Path, teacher: Teacher, shards: Sequence[Shard], workers: int) -> Iterator[Receipt]:
    """The receipts of `shards` as they are put in place. Raises `OffloadError`s; a worker that dies is one."""
    workers = min(workers, len(shards))
    if workers <= 1:
        with teacher.open() as answering:
            for shard in shards:
                yield generate_shard(directory, shard, answering)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    teacher = sharing_memory(teacher, workers)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=_start_worker, initargs=(threads,)) as pool:
        futures = [pool.submit(_generate, directory, teacher, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise OffloadError(WORKER_KILLED) from None
            raise


def sharing_memory(teacher: Teacher, workers: int) -> Teacher:
    """With a budget of auto divided among the workers of a machine: each would take the whole of it for its own."""
    if teacher.config.gpu_mem != "auto":
        return teacher
    share = auto_budget(available_memory(), "cpu") // workers
    return replace(teacher, config=teacher.config.model_copy(update={"gpu_mem": share}))


_answering: Answering | None = None
"""This worker's model, once its first shard has come."""


def _start_worker(threads: int) -> None:
    """Leave Ctrl-C to the parent, end with it however it ends, and take a share of the cores."""
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _generate(directory: Path, teacher: Teacher, shard: Shard) -> Receipt:
    global _answering
    if _answering is None:
        _answering = teacher.open()
    return generate_shard(directory, shard, _answering)
