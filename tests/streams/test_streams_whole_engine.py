"""`Engine` with device cuda, its GPU simulated: the same answers as on the CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from offload_engine import Engine, SamplingParams, assembly
from offload_engine.errors import DeviceError, MemoryBudgetError
from tests.streams.simulator import SimulatedDevice, WatchedStore

PROMPT = "Anna has 37 apples. Tom gives her 58 more. How many apples does Anna have now?"
PARAMS = SamplingParams(max_new_tokens=64)


@dataclass
class SimulatedGpu:
    """As `Gpu`."""

    driver: SimulatedDevice
    has_bfloat16: bool = True
    size: int = 8 * 10**9
    device = torch.device("cpu")

    def reachable(self) -> int:
        return self.size

    def free(self) -> int:
        return self.size

    def reset_peak(self) -> None: ...

    def peak(self) -> int:
        return 12345


@pytest.fixture(scope="module")
def on_cpu() -> list[int]:
    with Engine.from_pretrained(gpu_mem="2GB", dtype="float32") as engine:
        return engine.generate(PROMPT, PARAMS).token_ids


def on_gpu(monkeypatch: pytest.MonkeyPatch, device: SimulatedDevice, **options: Any) -> Engine:
    size = options.pop("size", SimulatedGpu.size)
    opened = assembly.open_store
    monkeypatch.setattr(assembly, "find_gpu", lambda _config: SimulatedGpu(device, size=size))
    monkeypatch.setattr(assembly, "open_store", lambda *given, **named: WatchedStore(opened(*given, **named), device))
    settings = {"gpu_mem": "1GB", "dtype": "float32", "expert_mem": "4MB"} | options
    return Engine.from_pretrained(device="cuda", **settings)


@pytest.mark.parametrize("order", [[0], [1, 0, 2, 5], [7, 3]])
def test_answers_are_those_of_the_cpu(monkeypatch: pytest.MonkeyPatch, on_cpu: list[int], order: list[int]) -> None:
    device = SimulatedDevice(order)
    with on_gpu(monkeypatch, device) as engine:
        assert engine.plan.device == "cuda"
        assert engine.plan.slots < engine.plan.all_experts, "experts have to move"
        assert engine.generate(PROMPT, PARAMS).token_ids == on_cpu
        assert engine.stats.misses > 0
        assert engine.stats.measured_peak_bytes == 12345
    device.check()


def test_a_refusal_to_pin_is_a_notice_of_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice(pinning="code 2")
    with on_gpu(monkeypatch, device) as engine:
        assert any("refused to pin" in notice for notice in engine.notices)
    device.check()


def test_a_card_smaller_than_asked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MemoryBudgetError, match="this machine has only"):
        on_gpu(monkeypatch, SimulatedDevice(), size=610 * 10**6)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for name in ("cuda", "cuda:1"):
        with pytest.raises(DeviceError, match=f"device is '{name}', but torch finds no GPU here"):
            Engine.from_pretrained(device=name)
