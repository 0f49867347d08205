"""Executors on a simulated device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.cpu_experts import ForwardShape, HostExperts
from offload_engine.experts.device.accounts import Accounts
from offload_engine.experts.device.exchange import Exchange
from offload_engine.experts.device.executor import PLACES, PREVIEWED, DeviceExperts
from offload_engine.experts.device.previews import Previews
from offload_engine.experts.device.table import UNUSED
from offload_engine.experts.grouped import LayerSlabs, SlotExperts
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.cpu_rates import LearnedRates
from offload_engine.experts.scheduling.eviction import make_eviction
from offload_engine.experts.scheduling.predictor import make_predictor
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.experts.scheduling.sharing import Rates, ShareMode
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.experts.transfer.pinned import HostSlab
from offload_engine.metrics import EngineStats
from offload_engine.model.moe import ExpertOutputs, ExpertWork
from tests.streams.simulator import SimulatedDevice, WatchedStore


class EmulatedOutputs(ExpertOutputs):
    """As `SlotOutputs`, with torch's products: what the host may not look at, it looks at on the device's time."""

    def __init__(self, hidden: Tensor, decision: RoutingDecision, layer: LayerSlabs, device: SimulatedDevice) -> None:
        super().__init__(hidden, decision)
        self.layer = layer
        self.simulated = device
        self.found: Tensor | None = None

    def look_up(self, row: Tensor) -> Tensor:
        unwanted = torch.ones(len(self.layer.layouts), dtype=torch.bool)
        unwanted[self.chosen[self.chosen >= 0]] = False
        self.found = row.masked_fill(unwanted, UNUSED)
        return self.found

    def show(self, slots: Tensor) -> None:
        self.found = slots

    def compute_found(self) -> None:
        assert self.found is not None
        slab_bytes, memory = self.layer.slabs.slab_bytes, self.layer.slabs.memory
        for expert, slot in enumerate(self.found.tolist()):
            if slot >= 0:
                slab = memory[slot * slab_bytes : (slot + 1) * slab_bytes]
                self.simulated.work_reads(slab)
                self.compute([ExpertWork(expert, self.layer.layouts[expert].weights(slab), slot)])


class EmulatedSlots(SlotExperts):
    """As where the kernels run."""

    def __init__(self, store: ExpertStore, arena: DeviceArena, device: SimulatedDevice) -> None:
        super().__init__(store, arena)
        self.simulated = device

    def serves(self, hidden: Tensor) -> bool:
        return True

    def outputs(  # type: ignore[override]
        self, layer: int, hidden: Tensor, decision: RoutingDecision
    ) -> EmulatedOutputs:
        return EmulatedOutputs(hidden, decision, self._slabs(layer), self.simulated)


class WatchedExchange(Exchange):
    """Tells the device of all that the host writes and reads."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.simulated = device
        super().__init__(device)

    def _write(self, slab: HostSlab, row: bytes) -> None:
        self.simulated.host_writes(slab.tensor.data_ptr())
        super()._write(slab, row)

    def _read(self, slab: HostSlab, nbytes: int) -> Tensor:
        self.simulated.host_reads(slab.tensor)
        return super()._read(slab, nbytes)


class WatchedHostExperts(HostExperts):
    """Tells the device of all that the CPU reads and writes."""

    def compute(self, layer: int, experts: Sequence[int], outputs: ExpertOutputs) -> int:
        device = cast(SimulatedDevice, self.driver)
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
    emulated: bool = False,
    share: ShareMode = "off",
    rates: Rates | None = None,
    dtype: torch.dtype = torch.float32,
) -> DeviceExperts:
    """An executor whose slots are on `device`; without `host_slots` there is no tier between it and the disk.
    `emulated`: it takes torch's products for the grouped kernels'. `share`: what the CPU computes from the tier, by
    these `rates`.
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
    experts = DeviceExperts(
        store=store,
        arena=arena,
        transfers=transfers,
        scheduler=ExpertScheduler(ExpertCache(slots, make_eviction(eviction)), in_flight),
        predictor=make_predictor(predictor),
        stats=EngineStats(),
        prefetch_depth=2,
    )
    experts.accounts.close()
    experts.accounts = Accounts([WatchedExchange(device) for _ in range(PLACES)])
    experts.previews.close()
    watching = [WatchedExchange(device) for _ in range(PREVIEWED)]
    experts.previews = Previews(watching, experts.slots.counts, device.device)
    if emulated:
        experts.slots = EmulatedSlots(store, arena, device)
    if host is not None and share != "off":
        width = store.layout(next(iter(store.keys()))).gate.columns
        shape = ForwardShape(tokens=16, choices=8, hidden=width, itemsize=dtype.itemsize)
        learned = LearnedRates(rates or Rates.unknown())
        experts.cpu = WatchedHostExperts(device, host, watched, shape, share, learned)  # type: ignore[arg-type]
    return experts
