"""A hardware profile of this machine, as `dmoe simulate --gpu FILE` takes it: what was measured, and the rest from a
profile that was fitted to whole runs.
"""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import torch

from offload_engine.bench.bandwidth import (
    DeviceRates,
    HostRates,
    measure_bandwidth,
    measure_device,
    measure_host_experts,
)
from offload_engine.bench.machine import processor
from offload_engine.bench.spec import Bandwidth
from offload_engine.config import EngineConfig, format_bytes
from offload_engine.errors import OffloadError
from offload_engine.files import write_aside
from offload_engine.simulate.profile import UNITS, Figure, Profile, load_profile

BASES = {"cpu": "cpu-disk", "cuda": "rtx4060-8gb"}
"""Where the figures come from that need whole runs of the engine to be measured."""


def measure_profile(config: EngineConfig) -> Profile:
    """Measure this machine, reading the experts of the model of `config`: its GPU if there is one that torch can use,
    unless the device asked for is the CPU. Raises `ModelError`s.
    """
    bandwidth, memory = measure_bandwidth(config), psutil.virtual_memory().total
    if config.device == "cpu" or not torch.cuda.is_available():
        return profile_of(bandwidth, processor()[0], memory)
    device = torch.device("cuda", int(config.device.partition(":")[2] or 0))
    card = torch.cuda.get_device_properties(device)
    host = measure_host_experts(config)
    return profile_of_card(bandwidth, measure_device(device), host, card.name, card.total_memory, memory)


def profile_of(bandwidth: Bandwidth, name: str, memory: int) -> Profile:
    """The profile of a machine that runs models on its CPU. `memory`: bytes of RAM."""
    measured = {
        "memory": Figure(value=memory, unit="B", source="the operating system"),
        "memory_bandwidth": _measured("memory_bandwidth", bandwidth.dram, "a sum over memory that no cache holds"),
        "compute": _measured("compute", bandwidth.gemm, "a bf16 product"),
    }
    return _completed("cpu", name, measured | _disk(bandwidth))


def profile_of_card(
    bandwidth: Bandwidth, rates: DeviceRates, host: HostRates, name: str, memory: int, host_memory: int
) -> Profile:
    """The profile of a machine with a GPU. Sizes in bytes."""
    measured = {
        "memory": Figure(value=memory, unit="B", source="the driver"),
        "memory_bandwidth": _measured("memory_bandwidth", rates.memory, "a sum over memory that no cache holds"),
        "compute": _measured("compute", rates.gemm, "a 16-bit product"),
        "link_bandwidth": _measured("link_bandwidth", rates.pinned, "copies from pinned memory"),
        "link_efficiency": Figure(value=1, unit="1", source="contained in the bandwidth, which was measured"),
        "pageable_bandwidth": _measured("pageable_bandwidth", rates.pageable, "copies from memory that is not pinned"),
        "host_memory": Figure(value=host_memory, unit="B", source="the operating system"),
        "host_bandwidth": _measured("host_bandwidth", host.reading, "the model's experts of one token on the CPU"),
        "host_compute": _measured("host_compute", host.computing, "the further tokens of these"),
    }
    return _completed("cuda", name, measured | _disk(bandwidth))


def _completed(device: str, name: str, measured: dict[str, Figure]) -> Profile:
    """What was measured, and the rest from one of `BASES`, marked as estimates."""
    base = load_profile(BASES[device])
    borrowed = {name: figure for name in UNITS if (figure := getattr(base, name)) is not None}
    values = {
        name: Figure(value=one.value, unit=one.unit, source=f"profile {base.name}: {one.source}", estimate=True)
        for name, one in borrowed.items()
    }
    title = name or "this machine"
    plain = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
    return Profile.model_validate({"name": plain, "title": title, "device": device} | values | measured)


def write_profile(path: Path, profile: Profile) -> None:
    """Write it whole or not at all. Raises `OffloadError`."""
    try:
        write_aside(path, profile.toml().encode())
    except OSError as error:
        raise OffloadError(f"{path}: can't be written ({error.strerror}); name another file with --out") from None


def _disk(bandwidth: Bandwidth) -> dict[str, Figure]:
    """The rate of two reads under way, and what one read at a time loses to latency."""
    way = "direct" if bandwidth.direct else "through the page cache"
    reads = f"whole experts of {format_bytes(bandwidth.slab_bytes)} at random places, {way}"
    best = max(bandwidth.disk.values())
    rate = bandwidth.disk.get(2, best)
    alone = bandwidth.disk.get(1, rate)
    latency = max(0.0, bandwidth.slab_bytes / alone - bandwidth.slab_bytes / rate)
    return {
        "disk_bandwidth": _measured("disk_bandwidth", rate, f"{reads}, two under way"),
        "disk_latency": _measured("disk_latency", latency, f"{reads}: one at a time, less the time at the rate of two"),
    }


def _measured(name: str, value: float, by: str) -> Figure:
    """To three significant digits: no two runs measure the same."""
    return Figure(value=float(f"{value:.3g}"), unit=UNITS[name], source=f"dmoe doctor --measure: {by}")
