"""Profiles made of what was measured, and the measurements themselves on the one device there is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offload_engine.bench import bandwidth
from offload_engine.bench.bandwidth import DeviceRates, HostRates, measure_device, measure_host_experts
from offload_engine.bench.spec import Bandwidth
from offload_engine.config import EngineConfig
from offload_engine.doctor import profile as module
from offload_engine.doctor.profile import measure_profile, profile_of, profile_of_card, write_profile
from offload_engine.errors import OffloadError
from offload_engine.experts import calibration
from offload_engine.simulate.profile import UNITS, Profile, load_profile

GB = 10**9
DISK = Bandwidth(slab_bytes=6_300_000, disk={1: 1.111e9, 2: 2.2222e9, 4: 2.1e9}, direct=True, dram=3e10, gemm=4e11)
RATES = DeviceRates(memory=2.5e11, gemm=2e13, pinned=1.3e10, pageable=6e9)
HOST = HostRates(reading=3.456e10, computing=4e11)


def measured(profile: Profile) -> set[str]:
    return {name for name in UNITS if (figure := getattr(profile, name)) is not None and not figure.estimate}


def test_a_machine_without_a_gpu(tmp_path: Path) -> None:
    profile = profile_of(DISK, 'A CPU "fast"', 16 * GB)
    assert (profile.name, profile.title, profile.device) == ("a-cpu-fast", 'A CPU "fast"', "cpu")
    assert profile.disk_bandwidth.value == 2.22e9
    assert profile.disk_latency.value == pytest.approx(6.3e6 / 1.111e9 - 6.3e6 / 2.2222e9, rel=0.01)
    assert (profile.memory_bandwidth.value, profile.compute.value, profile.memory.value) == (3e10, 4e11, 16 * GB)
    assert measured(profile) == {"memory", "memory_bandwidth", "compute", "disk_bandwidth", "disk_latency"}
    write_profile(tmp_path / "here.toml", profile)
    assert load_profile(str(tmp_path / "here.toml")) == profile


def test_a_machine_with_a_gpu(tmp_path: Path) -> None:
    profile = profile_of_card(DISK, RATES, HOST, "RTX 4060", 8 * GB, 32 * GB)
    assert (profile.device, profile.memory.value) == ("cuda", 8 * GB)
    assert profile.link_bandwidth is not None
    assert profile.link_bandwidth.value == 1.3e10
    assert profile.host_memory is not None
    assert profile.host_memory.value == 32 * GB
    assert {"link_bandwidth", "pageable_bandwidth", "compute", "memory_bandwidth"} <= measured(profile)
    assert {"host_bandwidth", "host_compute"} <= measured(profile)
    assert profile.shares
    assert profile.host_bandwidth is not None
    assert profile.host_bandwidth.value == 3.46e10
    assert not {"launch", "link_latency", "layer"} & measured(profile)
    write_profile(tmp_path / "here.toml", profile)
    assert load_profile(str(tmp_path / "here.toml")) == profile


def test_reads_that_gain_nothing_from_company_have_no_latency() -> None:
    alone = DISK.model_copy(update={"disk": {1: 2e9, 2: 1.9e9}})
    assert profile_of(alone, "", GB).disk_latency.value == 0
    assert profile_of(DISK.model_copy(update={"disk": {4: 1e9}}), "", GB).disk_bandwidth.value == 1e9
    assert profile_of(alone, "", GB).title == "this machine"


def test_a_profile_that_has_nowhere_to_go(tmp_path: Path) -> None:
    with pytest.raises(OffloadError, match="--out"):
        write_profile(tmp_path / "absent" / "here.toml", profile_of(DISK, "", GB))


def test_a_device_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "DRAM_BYTES", 2**20)
    monkeypatch.setattr(bandwidth, "LINK_BYTES", 2**20)
    monkeypatch.setattr(bandwidth, "GEMM_SIZE", 64)
    assert all(rate > 0 for rate in measure_device(torch.device("cpu")))


def test_experts_on_the_cpu_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the built-in model: 15,360 bytes, and twice as many operations per token as weights."""
    assert all(0 < rate < 1e14 for rate in measure_host_experts(EngineConfig()))
    seconds = {1: 2e-6, 32: 33e-6}
    monkeypatch.setattr(calibration, "_cpu_seconds", lambda _weights, tokens, _dtype, _clock: seconds[tokens])
    assert measure_host_experts(EngineConfig()) == pytest.approx((15360 / 2e-6, 15360 / 1e-6))


@pytest.mark.parametrize(
    ("wanted", "there", "found"),
    [("auto", True, "cuda"), ("cuda:1", True, "cuda"), ("cpu", True, "cpu"), ("auto", False, "cpu")],
)
def test_the_gpu_is_measured_where_torch_can_use_one(
    monkeypatch: pytest.MonkeyPatch, wanted: str, there: bool, found: str
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(module, "measure_bandwidth", lambda _config: DISK)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    card = SimpleNamespace(name="RTX 4060", total_memory=8 * GB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: card)
    monkeypatch.setattr(module, "measure_device", lambda device: asked.append(device) or RATES)
    monkeypatch.setattr(module, "measure_host_experts", lambda _config: HOST)
    assert measure_profile(EngineConfig(device=wanted)).device == found
    assert asked == ([torch.device(wanted if ":" in wanted else "cuda:0")] if found == "cuda" else [])
