"""What the machine gives: disk, memory, products, copies. The bounds that no engine on it can beat."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import NamedTuple

import torch

from offload_engine.bench.spec import Bandwidth
from offload_engine.config import EngineConfig
from offload_engine.engine.assembly import compute_dtype, find_source
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.calibration import measure_cpu
from offload_engine.experts.storage.opening import open_store
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.model.checkpoint import Checkpoint

DEPTHS = (1, 2, 4)
DISK_BYTES = 1_000_000_000
"""Read at each depth, or every expert once if that is less."""
DRAM_BYTES = 512 * 2**20
"""Well beyond any cache of the processor."""
GEMM_SIZE = 2048
TRIED_SIZE = 256
"""Of a first product, which tells whether a large one is worth its time: minutes, in a dtype without instructions."""
LINK_BYTES = 64 * 2**20
"""Copied at a time: some experts' worth, so that its start doesn't count."""
REPEATS = 5
SHORTEST = 1e-9
"""Seconds, where a clock shows none."""
_CPU = torch.device("cpu")


class HostRates(NamedTuple):
    """What a CPU gives that computes experts beside a GPU, per second."""

    reading: float
    """Bytes of an expert's weights, with one token."""
    computing: float
    """Operations of the expert's further tokens."""


class DeviceRates(NamedTuple):
    """What a device gives, per second."""

    memory: float
    """Bytes read."""
    gemm: float
    """Operations of a large product of 16-bit weights."""
    pinned: float
    """Bytes copied from pinned host memory."""
    pageable: float
    """Bytes copied from any other."""


def measure_bandwidth(config: EngineConfig) -> Bandwidth:
    """Read the model's experts, read memory, multiply; each as often as it takes to be sure. Raises `ModelError`s."""
    source = find_source(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with closing(open_store(source.config, Checkpoint.open(source.directory), verify="never")) as store:
        disk = {depth: _disk(store, depth) for depth in DEPTHS}
        return Bandwidth(slab_bytes=store.slab_bytes, disk=disk, direct=store.direct, dram=_dram(), gemm=_gemm())


def measure_host_experts(config: EngineConfig) -> HostRates:
    """Compute some of the model's experts on the CPU. Raises `ModelError`s, `MemoryBudgetError`, `TransferError`."""
    source = find_source(config)
    with closing(open_store(source.config, Checkpoint.open(source.directory), verify="never")) as store:
        expert, token = measure_cpu(store, compute_dtype(config, source.config, store.format.dtype))
        nbytes = store.payload_bytes(next(iter(store.keys())))
    operations = 2 * 3 * source.config.hidden_size * source.config.moe_intermediate_size
    return HostRates(nbytes / max(expert + token, SHORTEST), operations / max(token, SHORTEST))


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


def measure_device(device: torch.device) -> DeviceRates:
    """Read the device's memory, multiply on it, and copy to it."""
    half = device.type == "cuda" and not torch.cuda.is_bf16_supported()
    return DeviceRates(
        memory=_dram(device),
        gemm=_gemm(device, torch.float16 if half else torch.bfloat16),
        pinned=_link(device, pinned=device.type == "cuda"),
        pageable=_link(device, pinned=False),
    )


def _dram(device: torch.device = _CPU) -> float:
    """Bytes per second of a sum over an array that no cache holds."""
    array = torch.ones(DRAM_BYTES // 4, device=device)
    return DRAM_BYTES / _shortest(lambda: array.sum(), device)


def _gemm(device: torch.device = _CPU, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations per second of a large product of 16-bit weights: in `dtype`, or on a CPU in float32 where that is
    faster.
    """
    best = 0.0
    for one in (torch.float32, dtype) if device.type == "cpu" else (dtype,):
        if _product(TRIED_SIZE, device, one) > best / 4:  # small ones are slower than large ones, but not by so much
            best = max(best, _product(GEMM_SIZE, device, one))
    return best


def _product(size: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square product."""
    left, right = torch.ones(2, size, size, dtype=dtype, device=device)
    return 2 * size**3 / _shortest(lambda: left @ right, device)


def _link(device: torch.device, *, pinned: bool) -> float:
    """Bytes per second of copies from host memory."""
    source = torch.ones(LINK_BYTES, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    return LINK_BYTES / _shortest(lambda: target.copy_(source, non_blocking=pinned), device)


def _shortest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some repeats, each to the end of its work; one before them warms up."""
    _finish(work, device)
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        _finish(work, device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def _finish(work: Callable[[], object], device: torch.device) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
