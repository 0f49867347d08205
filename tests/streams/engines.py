"""Executors on a simulated device."""

from __future__ import annotations

from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.cache import ExpertCache
from offload_engine.experts.eviction import make_eviction
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.predictor import make_predictor
from offload_engine.experts.scheduler import ExpertScheduler
from offload_engine.experts.store import ExpertStore
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.metrics import EngineStats
from tests.streams.simulator import SimulatedDevice, WatchedStore


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
) -> OffloadedExperts:
    """An executor whose slots are on `device`; without `host_slots` there is no tier between it and the disk."""
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
    return OffloadedExperts(
        store=store,
        arena=arena,
        transfers=transfers,
        scheduler=ExpertScheduler(ExpertCache(slots, make_eviction(eviction)), in_flight),
        predictor=make_predictor(predictor),
        stats=EngineStats(),
        prefetch_depth=2,
    )
