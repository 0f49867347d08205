"""The GPU that an engine computes on, where it does: which one, what it has to give, and how experts get there."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import torch

from offload_engine import kernels
from offload_engine.config import EngineConfig
from offload_engine.errors import DeviceError, MemoryBudgetError
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.calibration import measure_rates
from offload_engine.experts.cpu_experts import ForwardShape, HostExperts
from offload_engine.experts.cpu_rates import LearnedRates
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.sharing import Rates
from offload_engine.experts.store import ExpertStore
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.cuda_driver import CudaDriver
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.kernels import grouped
from offload_engine.memory.plan import MIN_BLOCK, RUNTIME_BYTES, MemoryPlan, Setup
from offload_engine.model.config import ModelConfig


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

    def context_bytes(self) -> int:
        """What this process takes beside torch's allocations: driver context, code, library handles. As NVML tells, or
        an estimate where it doesn't, as in many containers and on WSL.
        """
        used = _used_by_this_process(self.device)
        return RUNTIME_BYTES["cuda"] if used is None else max(0, used - torch.cuda.memory_reserved(self.device))

    def reachable(self) -> int:
        """What this process has or could have."""
        free, _all = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) + self.context_bytes()

    def free(self) -> int:
        """What could still be allocated: what no process has, and what torch keeps for reuse."""
        free, _all = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        """Let `peak` start over, from what is allocated now."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most that this process has held since `reset_peak`."""
        return torch.cuda.max_memory_reserved(self.device) + self.context_bytes()


def _used_by_this_process(device: torch.device) -> int | None:
    """Bytes of the GPU that the driver charges to this process; None where it can't tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # NVML numbers GPUs that CUDA is not shown
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    found = next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)
    return None if found is None else int(found)


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


def without_kernels(dtype: torch.dtype, gpu: Gpu | None) -> list[str]:
    """What to tell where torch computes the experts and a kernel of ours could."""
    if gpu is not None:
        reason = grouped.why_not(gpu.device)
    else:
        reason = kernels.status().reason if dtype == torch.bfloat16 and kernels.status().variant is None else None
    return [] if reason is None else [f"torch computes the experts, more slowly than our kernel would: {reason}"]


class Moving(NamedTuple):
    """The slots of a GPU and what fills them."""

    arena: DeviceArena
    transfers: CudaTransfers
    notices: tuple[str, ...]
    """What the user should know: whatever makes copies slower than they could be."""


def ignored(config: EngineConfig, gpu: Gpu | None) -> list[str]:
    """What to tell of options that have no effect where the engine runs."""
    told = []
    if gpu is None and isinstance(config.host_mem, int):
        told.append("host_mem is ignored: on the CPU there is no host tier, gpu_mem is RAM already")
    if gpu is None and config.cpu_experts != "off":
        told.append("cpu_experts is ignored: without a GPU the CPU computes every expert anyway")
    if gpu is not None and config.cpu_experts != "off" and config.host_mem is None:
        told.append("cpu_experts is ignored: host_mem is none, so that no expert is in host memory")
    return told


def shared_tokens(config: EngineConfig, gpu: Gpu | None) -> int:
    """Tokens of the largest forward in which the CPU may take over experts: a denoising step that commits the blocks
    before it; 0 where it takes over none.
    """
    if gpu is None or config.cpu_experts == "off" or config.host_mem is None:
        return 0
    return 2 * config.batch_size * MIN_BLOCK


def share_with_cpu(
    config: EngineConfig, model: ModelConfig, setup: Setup, dtype: torch.dtype, experts: OffloadedExperts
) -> None:
    """Have the CPU compute some of the missing `experts`, whose slots nobody uses yet, if that is wanted and there is a
    host tier. Raises `MemoryBudgetError`, `TransferError`.
    """
    transfers = experts.transfers
    if not setup.shared_tokens or not isinstance(experts, DeviceExperts) or not isinstance(transfers, CudaTransfers):
        return
    driver, host = transfers.driver, transfers.host
    if host is None:
        return
    choices = model.num_experts_per_tok if setup.choices is None else setup.choices
    shape = ForwardShape(setup.shared_tokens, choices, model.hidden_size, setup.itemsize)
    auto = config.cpu_experts == "auto"
    rates = measure_rates(driver, experts.store, experts.arena.slab(0), dtype) if auto else Rates.unknown()
    experts.cpu = HostExperts(driver, host, experts.store, shape, config.cpu_experts, LearnedRates(rates))


def moving(gpu: Gpu, config: EngineConfig, store: ExpertStore, plan: MemoryPlan) -> Moving:
    """Allocate slots, bounce buffers, and the host tier if the plan has one and the system gives the memory.

    Raises `MemoryBudgetError` when there is no memory for slots or buffers.
    """
    notices: list[str] = []
    with ExitStack() as undo:
        host = None
        if plan.host_slots:
            try:
                host = HostTier(gpu.driver, plan.host_slots, store.slab_bytes)
                undo.callback(host.close)
            except MemoryBudgetError as error:
                notices.append(f"there is no host tier, experts are read from disk: {error}")
        arena = DeviceArena(plan.slots, store.slab_bytes, gpu.driver.allocate)
        undo.callback(arena.close)
        transfers = CudaTransfers(
            store,
            arena,
            gpu.driver,
            threads=config.reader_threads,
            in_flight=config.transfers_in_flight,
            host=host,
        )
        if transfers.notice is not None:
            notices.append(transfers.notice)
        undo.pop_all()
    return Moving(arena, transfers, tuple(notices))
