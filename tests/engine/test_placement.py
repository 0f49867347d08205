"""Which GPU is chosen, as torch tells of them."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from offload_engine.config import EngineConfig
from offload_engine.engine import placement
from offload_engine.engine.assembly import compute_dtype
from offload_engine.engine.placement import Gpu, choice_notice, find_gpu, without_kernels
from offload_engine.errors import DeviceError
from offload_engine.model.config import ModelConfig
from tests.checkpoints import tiny_config


class Driver:
    def __init__(self, device: torch.device) -> None:
        self.device = device


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine with two, the second current; what becomes current is noted."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(6, 1), (8, 9)][index])
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_61", "sm_75", "sm_80"])
    monkeypatch.setattr(placement, "CudaDriver", Driver)
    return chosen


@pytest.mark.parametrize(("name", "index"), [("auto", 1), ("cuda", 1), ("cuda:0", 0), ("cuda:1", 1)])
def test_one_gpu_is_chosen(two_gpus: list[int], name: str, index: int) -> None:
    gpu = find_gpu(EngineConfig(device=name))
    assert gpu is not None
    assert gpu.device == torch.device("cuda", index)
    assert two_gpus == [index]


def test_a_gpu_that_is_not_there_is_refused(two_gpus: list[int]) -> None:
    with pytest.raises(DeviceError, match=r"'cuda:2', but torch finds 2 here, cuda:0 to cuda:1"):
        find_gpu(EngineConfig(device="cuda:2"))
    assert not two_gpus


def test_cpu_means_cpu(two_gpus: list[int]) -> None:
    assert find_gpu(EngineConfig(device="cpu")) is None
    assert not two_gpus


@pytest.mark.parametrize("built", [False, True])
def test_without_any_gpu_auto_is_the_cpu_and_cuda_says_what_to_do(monkeypatch: pytest.MonkeyPatch, built: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    assert find_gpu(EngineConfig(device="auto")) is None
    with pytest.raises(DeviceError, match="install an NVIDIA driver" if built else "a build of torch with CUDA"):
        find_gpu(EngineConfig(device="cuda"))


@pytest.mark.parametrize(
    ("stored", "has_bfloat16", "wanted"),
    [
        (torch.bfloat16, True, torch.bfloat16),
        (torch.bfloat16, False, torch.float16),
        (torch.float16, False, torch.float16),
        (torch.float32, True, torch.float32),
    ],
)
def test_a_card_without_bf16_computes_in_fp16(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, has_bfloat16: bool, wanted: torch.dtype
) -> None:
    def supported(**options: Any) -> bool:
        assert options == {"including_emulation": False}
        return has_bfloat16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = Gpu(Driver(torch.device("cuda", 0)))  # type: ignore[arg-type]
    model = ModelConfig.from_dict(tiny_config())
    assert compute_dtype(EngineConfig(), model, stored, gpu) == wanted
    assert compute_dtype(EngineConfig(dtype="float32"), model, stored, gpu) == torch.float32


class Nvml:
    """What of pynvml is asked; `used` by this process, None where NVML doesn't say, and by another beside it."""

    class NVMLError(Exception):
        pass

    def __init__(self, used: int | None, fails: str = "", mine: bool = True) -> None:
        self.used, self.fails, self.mine = used, fails, mine
        self.cards = 1
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802 (its name)
        self.fail("init")
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return self.cards

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 12_020

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "535.1"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        return ["NVIDIA Small", "NVIDIA Large"][handle]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.fail("handle")
        assert uuid == "GPU-0123-4567"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        assert handle == "handle"
        mine = SimpleNamespace(pid=os.getpid() if self.mine else -1, usedGpuMemory=self.used)
        return [SimpleNamespace(pid=-2, usedGpuMemory=10**6), mine]

    def fail(self, where: str) -> None:
        if self.fails == where:
            raise self.NVMLError(where)


@pytest.mark.parametrize(
    ("nvml", "context"),
    [
        (Nvml(900), 400),
        (Nvml(None), None),
        (Nvml(900, mine=False), None),
        (Nvml(900, fails="init"), None),
        (Nvml(900, fails="handle"), None),
    ],
    ids=["told", "not told", "another namespace", "no NVML", "no such GPU"],
)
def test_memory_is_what_torch_holds_and_the_context_by_nvml_or_by_estimate(
    monkeypatch: pytest.MonkeyPatch, nvml: Nvml, context: int | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: SimpleNamespace(uuid="0123-4567"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 200)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 700)
    gpu = Gpu(Driver(torch.device("cuda", 0)))  # type: ignore[arg-type]
    beside = placement.RUNTIME_BYTES["cuda"] if context is None else context
    assert gpu.context_bytes() == beside
    assert gpu.reachable() == 1500 + beside
    assert gpu.free() == 1300
    assert gpu.peak() == 700 + beside
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("built", "built_for", "wanted"),
    [
        (False, None, "install a build of torch with CUDA"),
        (
            True,
            "13.0",
            "a newer driver, for 535.1 runs CUDA 12.2 at most and this torch wants 13.0, or install a build",
        ),
        (True, "12.8", "install an NVIDIA driver new enough for this torch"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, built: bool, built_for: str | None, wanted: str
) -> None:
    nvml = Nvml(None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    config = EngineConfig(device="auto")
    assert find_gpu(config) is None
    notice = choice_notice(config, None)
    assert notice is not None
    assert notice.startswith("there is a GPU, NVIDIA Small, that torch can't use, so the model runs on the CPU; ")
    assert wanted in notice
    with pytest.raises(DeviceError, match=wanted):
        find_gpu(EngineConfig(device="cuda"))
    assert choice_notice(EngineConfig(device="cpu"), None) is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choice_notice(config, None) is None, "somebody hides it"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    nvml.cards = 0
    assert choice_notice(config, None) is None
    nvml.cards, nvml.fails = 1, "init"
    assert choice_notice(config, None) is None
    assert nvml.open == 0


@pytest.mark.parametrize(("name", "told"), [("auto", True), ("cuda", True), ("cuda:0", False), ("cuda:1", False)])
def test_which_of_several_gpus_is_used_is_told_where_nobody_chose(two_gpus: list[int], name: str, told: bool) -> None:
    config = EngineConfig(device=name)
    notice = choice_notice(config, find_gpu(config))
    assert notice == ("of 2 GPUs cuda:1 is used, and no other; device cuda:N (--device) chooses one" if told else None)


def test_one_gpu_alone_is_no_news(two_gpus: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(device="auto")
    gpu = find_gpu(config)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choice_notice(config, gpu) is None


@pytest.mark.parametrize(
    ("builds", "served"),
    [
        (["sm_75", "sm_80", "sm_86"], True),
        (["sm_90a", "sm_89"], True),
        (["sm_75", "sm_90"], False),
        (["sm_90", "sm_120", "compute_120"], False),
        (["sm_75", "compute_75"], True),
        ([], False),
    ],
)
def test_a_card_that_torch_has_no_code_for_is_left_alone_or_refused(
    two_gpus: list[int], monkeypatch: pytest.MonkeyPatch, builds: list[str], served: bool
) -> None:
    nvml = Nvml(None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: builds)
    config = EngineConfig(device="auto")
    gpu = find_gpu(config)
    assert (gpu is not None) == bool(two_gpus) == served
    if served:
        return
    notice = choice_notice(config, gpu)
    assert notice is not None
    assert f"compute capability 8.9, and this torch code for {', '.join(builds)} alone: install a build" in notice
    with pytest.raises(DeviceError, match=r"device is 'cuda:1', but it has compute capability 8\.9"):
        find_gpu(EngineConfig(device="cuda:1"))


def test_a_gpu_without_the_grouped_kernels_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(Driver(torch.device("cuda", 0)))  # type: ignore[arg-type]
    monkeypatch.setattr(placement.grouped, "why_not", lambda _device: None)
    assert without_kernels(torch.float16, gpu) == []
    monkeypatch.setattr(placement.grouped, "why_not", lambda device: f"no Triton for {device}")
    told = "torch computes the experts, more slowly than our kernel would: no Triton for cuda:0"
    assert without_kernels(torch.float16, gpu) == [told]
