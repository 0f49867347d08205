"""Experts that the CPU computes from host memory while others are copied to the device.

Which work waits for which:

- Activations are copied down on the compute stream, and the worker waits for a mark behind that copy alone. By then the
  last results have gone up as well, which went over the same stream: one wait serves both buffers.
- Results are copied up on the compute stream once the worker is through, and put at their places by a launch behind.
- The worker is through with one layer before the next layer's activations are copied over this one's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from offload_engine.core import ExpertKey, RoutingDecision
from offload_engine.errors import InternalError, OffloadError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.scheduling.cpu_rates import LearnedRates
from offload_engine.experts.scheduling.sharing import Missing, ShareMode, choose
from offload_engine.experts.storage.layout import SlabExpert
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.experts.transfer.worker import Job, Worker
from offload_engine.memory.footprint import shared_activation_bytes, shared_result_bytes
from offload_engine.model.moe import ExpertOutputs, ExpertWork, LayerOutputs

PLACE_BYTES = torch.int64.itemsize


@dataclass(frozen=True, slots=True)
class ForwardShape:
    """The largest forward whose experts are shared; larger ones are computed on the device alone."""

    tokens: int
    choices: int
    """Experts per token."""
    hidden: int
    itemsize: int
    """Bytes of one number of the compute dtype."""

    @property
    def down(self) -> int:
        """Bytes of all activations, in whole pages."""
        return shared_activation_bytes(self.tokens, self.hidden, self.itemsize)

    @property
    def up(self) -> int:
        """Bytes of all outputs and their places, which have to find room at once, in whole pages."""
        return shared_result_bytes(self.tokens * self.choices, self.hidden, self.itemsize)


class Errand:
    """The experts of one layer that the CPU computes. Used by the thread that runs the engine, in the order written."""

    def __init__(self, experts: frozenset[int] = frozenset(), worker: Worker | None = None) -> None:
        self.experts = experts
        self.bytes_read = 0
        """From disk, for experts that had left host memory in between; final once waited for."""
        self.job: Job | None = None
        self._worker = worker

    def wait(self) -> None:
        """Until the worker is through. Raises what kept it from it."""
        if self.job is None or self._worker is None:
            return
        try:
            self._worker.wait(self.job)
        except OffloadError:
            raise
        except Exception as error:
            raise InternalError(f"experts on the CPU: {type(error).__name__}: {error}") from error

    def deliver(self, outputs: LayerOutputs) -> None:
        """Have the results taken up and put where they belong."""


NO_ERRAND = Errand()
"""Nothing for the CPU to do."""


class _Layer(Errand):
    """What one layer has for the CPU."""

    def __init__(self, owner: HostExperts, layer: int, hidden: Tensor, chosen: Tensor, experts: Sequence[int]) -> None:
        super().__init__(frozenset(experts), owner.worker)
        self._owner = owner
        self._layer = layer
        self._chosen = chosen
        self._dtype = hidden.dtype
        self._shape = hidden.shape
        self._taken = owner.clock()
        self._computing = self._beside = 0.0
        """Seconds."""
        self._places = torch.isin(chosen.flatten(), torch.tensor(list(experts))).nonzero().flatten()

    def compute(self) -> None:
        """On the worker's thread: wait for the activations, leave results and places in the buffer."""
        owner = self._owner
        owner.wait_for_activations()
        with torch.inference_mode():
            rows, places = self._parts(owner.results)
            hidden = owner.activations[: rows.element_size() * self._shape.numel()].view(self._dtype)
            outputs = ExpertOutputs(hidden.view(self._shape), RoutingDecision(self._chosen, torch.empty(0)))
            started = owner.clock()
            self.bytes_read = owner.compute(self._layer, sorted(self.experts), outputs)
            self._computing = owner.clock() - started
            torch.index_select(outputs.outputs, 0, self._places, out=rows)
            places.copy_(self._places)
        self._beside = owner.clock() - self._taken - self._computing

    def deliver(self, outputs: LayerOutputs) -> None:
        """See `Errand`."""
        owner, began = self._owner, self._owner.clock()
        rows, places = self._parts(owner.staging)
        used = places.data_ptr() + places.nbytes - owner.staging.data_ptr()
        owner.driver.copy(Stream.COMPUTE, owner.results[:used], owner.staging[:used])
        owner.driver.launch(Stream.COMPUTE, partial(outputs.put, places, rows), [owner.staging], [])
        if not self.bytes_read:  # else the disk was measured
            beside = self._beside + owner.clock() - began
            owner.rates.learn(len(self.experts), len(self._places), self._computing, beside)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Views of a result buffer: outputs [n, H], and behind them their places [n]."""
        count, hidden = len(self._places), self._shape[1]
        end = count * hidden * self._dtype.itemsize
        start = -(-end // PLACE_BYTES) * PLACE_BYTES
        places = buffer[start : start + count * PLACE_BYTES].view(torch.int64)
        return buffer[:end].view(self._dtype).view(count, hidden), places


class HostExperts:
    """Computes experts of a layer on the CPU, from what `host` holds, on a thread of its own.

    Their outputs are those of `ExpertOutputs` on the CPU: within rounding those of the device. `rates` learn from each
    layer. Raises `MemoryBudgetError` when the memory for activations and results can't be had.
    """

    def __init__(
        self,
        driver: StreamDriver,
        host: HostTier,
        store: ExpertStore,
        shape: ForwardShape,
        mode: ShareMode,
        rates: LearnedRates,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.driver = driver
        self.host = host
        self.store = store
        self.shape = shape
        self.mode = mode
        self.rates = rates
        self.clock = clock
        self._spare = SlotArena(1, store.slab_bytes)
        """For what has left the tier between the decision and its use."""
        self._buffers = SlotArena(1, shape.down + shape.up)
        self._pinned = False
        try:
            self._spare.wait_touched()
            self._buffers.wait_touched()
            device = driver.allocate(shape.down + shape.up)
        except BaseException:
            self._free()
            raise
        memory = self._buffers.whole()
        self._pinned = driver.pin(memory) is None
        """Where the system refuses, these copies keep the host waiting, and nothing else changes."""
        self._leaving, self.staging = device[: shape.down], device[shape.down :]
        """On the device: activations on their way down, results on their way to their places."""
        self.activations, self.results = memory[: shape.down], memory[shape.down :]
        self._arrived = driver.event()
        self._brought: Tensor | None = None
        """Whose activations are on their way to the host."""
        self._shared: set[int] = set()
        """Layers that had something for the CPU the last time."""
        self.worker = Worker("cpu-experts")
        self._closed = False

    def bring(self, layer: int, hidden: Tensor) -> None:
        """Have `layer`'s activations on their way already, ahead of work that is enqueued before it is known
        what is missing, if it had something for the CPU the last time. Else `take` does it.
        """
        self._brought = None  # of a layer that was broken off; what replays work has its outputs in the same place
        if layer in self._shared and hidden.shape[0] <= self.shape.tokens:
            self._copy_down(hidden)
            self._brought = hidden

    def take(
        self, layer: int, absent: Sequence[int], hidden: Tensor, decision: RoutingDecision, waiting: float
    ) -> Errand:
        """Decide which of a layer's `absent` experts, the most wanted first, the CPU computes, and begin with them.

        `waiting`: copies that come before the layer's. What was taken before must have been delivered or withdrawn.
        """
        brought, self._brought = self._brought, None
        tokens, choices = decision.experts.shape
        if not absent or tokens > self.shape.tokens or choices > self.shape.choices:
            return NO_ERRAND
        chosen = decision.experts.cpu().contiguous()
        counts = torch.bincount(chosen.flatten() + 1).tolist()  # -1, no expert, counts as the first
        hosted = self.host.present(ExpertKey(layer, expert) for expert in absent)
        missing = [Missing(one, counts[one + 1], here) for one, here in zip(absent, hosted, strict=True)]
        experts = choose(self.mode, missing, self.rates.now, waiting)
        if not experts:
            self._shared.discard(layer)
            return NO_ERRAND
        self._shared.add(layer)
        errand = _Layer(self, layer, hidden, chosen, experts)
        if brought is not hidden:
            self._copy_down(hidden)
        errand.job = self.worker.begin(errand.compute)
        return errand

    def _copy_down(self, hidden: Tensor) -> None:
        nbytes = hidden.numel() * hidden.element_size()
        leaving = self._leaving[:nbytes]
        self.driver.launch(Stream.COMPUTE, partial(_pack, hidden, leaving), [], [leaving])
        self.driver.fetch(Stream.COMPUTE, leaving, self.activations[:nbytes])
        self._arrived.record(Stream.COMPUTE)

    def withdraw(self) -> None:
        """Wait until the worker is idle: what was taken won't be delivered, nor what was brought be taken."""
        self._brought = None
        self.worker.drain()

    def close(self) -> None:
        """Join the thread and free the buffers, after everything enqueued has run. Idempotent."""
        self.worker.close()
        if self._closed:
            return
        self._closed = True
        self.driver.finish()
        self._arrived.close()
        del self.activations, self.results, self.staging, self._leaving
        self._free()

    def _free(self) -> None:
        if self._pinned:
            self.driver.unpin(self._buffers.whole())
        self._buffers.close()
        self._spare.close()

    # On the worker's thread

    def wait_for_activations(self) -> None:
        """Until they are there, and the results of the layer before are gone."""
        self._arrived.wait()

    def compute(self, layer: int, experts: Sequence[int], outputs: ExpertOutputs) -> int:
        """Compute these into `outputs`; returns the bytes read from disk for those that were not in host memory."""
        keys = [ExpertKey(layer, expert) for expert in experts]
        found = {key: held for key in keys if (held := self.host.find(key)) is not None}
        try:
            outputs.compute([self._work(key, held.slab.tensor) for key, held in found.items()])
        finally:
            for key, held in found.items():
                self.host.release(key, held, filled=True)
        read = 0
        for key in keys:
            if key not in found:
                read += self.store.read(key, self._spare.buffer(0))
                outputs.compute([self._work(key, self._spare.slab(0))])
        return read

    def _work(self, key: ExpertKey, slab: Tensor) -> ExpertWork:
        return ExpertWork(key.expert, SlabExpert(self.store.layout(key), slab))


def _pack(hidden: Tensor, target: Tensor) -> None:
    """`hidden`'s numbers into as many bytes."""
    target.view(hidden.dtype).view(hidden.shape).copy_(hidden)
