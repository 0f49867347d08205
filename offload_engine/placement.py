"""The GPU that an engine computes on, where it does: which one, what it has to give, what was taken of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from offload_engine.config import EngineConfig
from offload_engine.errors import DeviceError
from offload_engine.experts.transfer.cuda_driver import CudaDriver
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.memory.plan import RUNTIME_BYTES


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. All bytes are of its own memory."""

    driver: StreamDriver

    @property
    def device(self) -> torch.device:
        """As torch names it."""
        return self.driver.device

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bf16 itself; older ones only pretend to, slowly."""
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def reachable(self) -> int:
        """What this process has or could have: what is free, what torch holds, and its context, by estimate."""
        free, _all = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) + RUNTIME_BYTES["cuda"]

    def free(self) -> int:
        """What could still be allocated."""
        return self.reachable() - torch.cuda.memory_allocated(self.device) - RUNTIME_BYTES["cuda"]

    def reset_peak(self) -> None:
        """Let `peak` start over, from what is allocated now."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most that torch held at a time since `reset_peak`, and its context, by estimate."""
        return torch.cuda.max_memory_reserved(self.device) + RUNTIME_BYTES["cuda"]


def find_gpu(config: EngineConfig) -> Gpu | None:
    """The GPU that `config` asks for; None for the CPU, which is also what "auto" is where there is no GPU.

    Raises `DeviceError` when the GPU asked for isn't there.
    """
    name = config.device
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return None
    if not torch.cuda.is_available():
        raise DeviceError(f"device is {name!r}, but torch finds no GPU here; use device cpu or auto, or {_why_none()}")
    index, count = int(name.partition(":")[2] or torch.cuda.current_device()), torch.cuda.device_count()
    if index >= count:
        raise DeviceError(
            f"device is {name!r}, but torch finds {count} here, cuda:0 to cuda:{count - 1}; use one of these"
        )
    torch.cuda.set_device(index)  # what doesn't say where it computes computes there
    return Gpu(CudaDriver(torch.device("cuda", index)))


def _why_none() -> str:
    """What to do for a GPU to be found."""
    if not torch.backends.cuda.is_built():
        return "install a build of torch with CUDA"
    return "install an NVIDIA driver new enough for this torch, and see that CUDA_VISIBLE_DEVICES is not empty"
