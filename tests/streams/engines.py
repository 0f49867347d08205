"""Executors on a simulated device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.cache import ExpertCache
from offload_engine.experts.cpu_experts import ForwardShape, HostExperts
from offload_engine.experts.cpu_rates import LearnedRates
from offload_engine.experts.eviction import make_eviction
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.predictor import make_predictor
from offload_engine.experts.scheduler import ExpertScheduler
from offload_engine.experts.sharing import Rates, ShareMode
from offload_engine.experts.store import ExpertStore
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.metrics import EngineStats
from offload_engine.model.moe import ExpertOutputs
from tests.streams.simulator import SimulatedDevice, WatchedStore


class WatchedHostExperts(HostExperts):
    """Tells the device of all that the CPU reads and writes."""

    def compute(self, layer: int, experts: Sequence[int], outputs: ExpertOutputs) -> int:
        device = self.driver
        assert isinstance(device, SimulatedDevice)
        device.host_reads(self.activations)
        read = super().compute(layer, experts, outputs)
        device.host_writes(self.results.data_ptr())
        return read


def on_device(
    device: SimulatedDevice,
    store: ExpertStore,
    slots: int,
    *,
    eviction: str = "lru",
    predictor: str = "previous-step",
    in_flight: int = 2,
    threads: int = 2,
    host_slots: int | None = None,
    share: ShareMode = "off",
    rates: Rates | None = None,
    dtype: torch.dtype = torch.float32,
) -> OffloadedExperts:
    """An executor whose slots are on `device`; without `host_slots` there is no tier between it and the disk, and
    nothing for the CPU to compute from. `rates` are those that the CPU's share goes by.
    """
    arena = DeviceArena(slots, store.slab_bytes, device.allocate)
    watched = WatchedStore(store, device)
    host = None if host_slots is None else HostTier(device, host_slots, store.slab_bytes)
    transfers = CudaTransfers(
        watched,  # type: ignore[arg-type]
        arena,
        device,
        threads=threads,
        in_flight=in_flight,
        host=host,
    )
    cpu = None
    if host is not None and share != "off":
        width = store.layout(next(iter(store.keys()))).gate.columns
        shape = ForwardShape(tokens=16, choices=8, hidden=width, itemsize=dtype.itemsize)
        learned = LearnedRates(rates or Rates.unknown())
        cpu = WatchedHostExperts(device, host, watched, shape, share, learned)  # type: ignore[arg-type]
    return OffloadedExperts(
        store=store,
        arena=arena,
        transfers=transfers,
        scheduler=ExpertScheduler(ExpertCache(slots, make_eviction(eviction)), in_flight),
        predictor=make_predictor(predictor),
        stats=EngineStats(),
        prefetch_depth=2,
        cpu=cpu,
    )
