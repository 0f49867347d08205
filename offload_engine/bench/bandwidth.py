"""What the machine gives: disk, memory, products. The bounds that no engine on it can beat."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import torch

from offload_engine.assembly import find_source
from offload_engine.bench.spec import Bandwidth
from offload_engine.config import EngineConfig
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.opening import open_store
from offload_engine.experts.store import ExpertStore
from offload_engine.model.checkpoint import Checkpoint

DEPTHS = (1, 2, 4)
DISK_BYTES = 1_000_000_000
"""Read at each depth, or every expert once if that is less."""
DRAM_BYTES = 512 * 2**20
"""Well beyond any cache of the processor."""
GEMM_SIZE = 2048
REPEATS = 5


def measure_bandwidth(config: EngineConfig) -> Bandwidth:
    """Read the model's experts, read memory, multiply; each as often as it takes to be sure. Raises `ModelError`s."""
    source = find_source(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with closing(open_store(source.config, Checkpoint.open(source.directory), verify="never")) as store:
        disk = {depth: _disk(store, depth) for depth in DEPTHS}
        return Bandwidth(slab_bytes=store.slab_bytes, disk=disk, direct=store.direct, dram=_dram(), gemm=_gemm())


def _disk(store: ExpertStore, depth: int) -> float:
    """Bytes per second of whole experts at random places, `depth` reads under way at any time."""
    keys = list(store.keys())
    random.Random(depth).shuffle(keys)  # another order at each depth, so that nothing read before helps
    keys = keys[: max(depth, DISK_BYTES // store.slab_bytes)]
    arena = SlotArena(depth, store.slab_bytes)

    def read_share(reader: int) -> int:
        return sum(store.read(key, arena.buffer(reader)) for key in keys[reader::depth])

    with ThreadPoolExecutor(depth) as readers:
        began = time.perf_counter()
        total = sum(readers.map(read_share, range(depth)))
        return total / (time.perf_counter() - began)


def _dram() -> float:
    """Bytes per second of a sum over an array that no cache holds."""
    array = torch.ones(DRAM_BYTES // 4)
    return DRAM_BYTES / _shortest(lambda: array.sum())


def _gemm() -> float:
    """bf16 operations per second of a square product."""
    left, right = torch.ones(2, GEMM_SIZE, GEMM_SIZE, dtype=torch.bfloat16)
    return 2 * GEMM_SIZE**3 / _shortest(lambda: left @ right)


def _shortest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some repeats, the first of which warms up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
