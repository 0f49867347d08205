"""What copies and CPU experts take on this machine, measured before the first answer: some tens of milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from offload_engine.core import ExpertKey, RoutingDecision
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.scheduling.cpu_rates import HANDOVER, OWN_PART, line_through, median_seconds
from offload_engine.experts.scheduling.sharing import Rates
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import Event, StreamDriver
from offload_engine.model.moe import ExpertOutputs, ExpertWeights, ExpertWork

SLABS = 8
"""Experts gone through in turn, so that no cache holds the next one's weights."""
TOKENS = (1, 32)
"""Between these an expert's time is taken to lie on a line: its weights are read once, each token is computed."""


def measure_rates(
    driver: StreamDriver,
    store: ExpertStore,
    slot: Tensor,
    dtype: torch.dtype,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """Measure with the experts of `store`, computed in `dtype`. `slot`: uint8 [slab_bytes] on the device, which nobody
    uses yet, and which holds anything afterwards. Raises `MemoryBudgetError` when there is no memory to measure with,
    `TransferError` when the store can't be read.
    """
    with ExitStack() as undo:
        keys = list(islice(store.keys(), SLABS))
        slabs = SlotArena(len(keys), store.slab_bytes)
        undo.callback(slabs.close)
        slabs.wait_touched()
        reads = [partial(_read, store, key, slabs.buffer(place)) for place, key in enumerate(keys)]
        read = median_seconds(reads, clock)
        if driver.pin(slabs.whole()) is None:
            undo.callback(driver.unpin, slabs.whole())
        undo.callback(driver.finish)
        event = driver.event()
        undo.callback(event.close)
        layout = store.layout(keys[0])
        row = layout.gate.columns * dtype.itemsize
        down, token = min(TOKENS[1] * row, store.slab_bytes), min(row, store.slab_bytes)
        sources = [slabs.slab(number) for number in range(len(keys))]
        copy = median_seconds([partial(_copy, driver, event, source, slot) for source in sources], clock)
        fetches = [partial(_fetch, driver, event, slot[:down], source[:down]) for source in sources]
        ups = [partial(_copy, driver, event, source[:token], slot[:token]) for source in sources]
        trip = median_seconds(fetches, clock) + median_seconds(ups, clock)
        expert, each = _cpu_line(store, keys, sources, dtype, clock)
    return Rates(
        copy=copy,
        expert=expert,
        token=each,
        trip=trip + HANDOVER,
        own=OWN_PART,
        row=copy * row / store.slab_bytes,
        read=read,
    )


def measure_cpu(
    store: ExpertStore, dtype: torch.dtype, clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Seconds of an expert of `store` on this CPU, computed in `dtype`, and of each of its tokens. Raises
    `MemoryBudgetError`, `TransferError`.
    """
    keys = list(islice(store.keys(), SLABS))
    slabs = SlotArena(len(keys), store.slab_bytes)
    try:
        slabs.wait_touched()
        for place, key in enumerate(keys):
            store.read(key, slabs.buffer(place))
        return _cpu_line(store, keys, [slabs.slab(place) for place in range(len(keys))], dtype, clock)
    finally:
        slabs.close()


def _cpu_line(
    store: ExpertStore,
    keys: Sequence[ExpertKey],
    slabs: Sequence[Tensor],
    dtype: torch.dtype,
    clock: Callable[[], float],
) -> tuple[float, float]:
    weights = [store.layout(key).weights(slab) for key, slab in zip(keys, slabs, strict=True)]
    few, many = (_cpu_seconds(weights, tokens, dtype, clock) for tokens in TOKENS)
    return line_through(TOKENS, (few, many))


def _cpu_seconds(
    weights: Sequence[ExpertWeights], tokens: int, dtype: torch.dtype, clock: Callable[[], float]
) -> float:
    """Of one expert with so many tokens."""
    decision = RoutingDecision(torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1))
    with torch.inference_mode():
        outputs = ExpertOutputs(torch.ones(tokens, weights[0].gate.shape[1], dtype=dtype), decision)
        return median_seconds([partial(outputs.compute, [ExpertWork(0, one)]) for one in weights], clock)


def _read(store: ExpertStore, key: ExpertKey, slab: memoryview) -> None:
    store.read(key, slab)


def _copy(driver: StreamDriver, event: Event, source: Tensor, target: Tensor) -> None:
    driver.copy(Stream.COPY, source, target)
    event.record(Stream.COPY)
    event.wait()


def _fetch(driver: StreamDriver, event: Event, source: Tensor, target: Tensor) -> None:
    driver.fetch(Stream.COMPUTE, source, target)
    event.record(Stream.COMPUTE)
    event.wait()
