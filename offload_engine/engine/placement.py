"""The GPU that an engine computes on, where it does: which one, what it has to give, and how experts get there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from offload_engine import kernels
from offload_engine.config import EngineConfig
from offload_engine.errors import DeviceError, MemoryBudgetError
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.calibration import measure_rates
from offload_engine.experts.cpu_experts import ForwardShape, HostExperts
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.scheduling.cpu_rates import LearnedRates
from offload_engine.experts.scheduling.sharing import Rates
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.experts.transfer.cuda_driver import CudaDriver
from offload_engine.experts.transfer.driver import StreamDriver
from offload_engine.experts.transfer.host_tier import HostTier
from offload_engine.kernels import grouped
from offload_engine.memory.plan import MIN_BLOCK, RUNTIME_BYTES, MemoryPlan, Setup
from offload_engine.model.config import ModelConfig
from offload_engine.model.cuda_graphs import CudaRecorder
from offload_engine.model.graphs import LayerGraphs, Recorder

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. All bytes are of its own memory."""

    driver: StreamDriver

    @property
    def device(self) -> torch.device:
        """As torch names it."""
        return self.driver.device

    @property
    def name(self) -> str:
        """The card's, as the driver has it."""
        return str(torch.cuda.get_device_name(self.device))

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bf16 itself; older ones only pretend to, slowly."""
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    def recorder(self) -> Recorder:
        """A new one."""
        return CudaRecorder(self.device)

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
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # NVML numbers GPUs that CUDA is not shown

    def ask(nvml: Any) -> int | None:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByUUID(uuid))
        found = next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)
        return None if found is None else int(found)

    return _nvml(ask)


class Driver(NamedTuple):
    """NVIDIA's driver, as NVML tells of it."""

    version: str
    cuda: tuple[int, int]
    """Newest version of CUDA that it runs."""
    card: str
    """The first GPU."""


def _driver() -> Driver | None:
    """None where there is none, or no card."""

    def ask(nvml: Any) -> Driver | None:
        if not nvml.nvmlDeviceGetCount():
            return None
        newest = nvml.nvmlSystemGetCudaDriverVersion_v2()
        card = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(0))
        return Driver(str(nvml.nvmlSystemGetDriverVersion()), (newest // 1000, newest % 1000 // 10), str(card))

    return _nvml(ask)


def _nvml(ask: Callable[[Any], Answer | None]) -> Answer | None:
    """What NVML answers; None where it doesn't."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return ask(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


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
    unserved = _unserved(index)
    if unserved is not None and name == "auto":
        return None
    if unserved is not None:
        raise DeviceError(f"device is {name!r}, but {unserved}; use device cpu or auto, or {_OTHER_BUILD}")
    torch.cuda.set_device(index)  # what doesn't say where it computes computes there
    return Gpu(CudaDriver(torch.device("cuda", index)))


def choice_notice(config: EngineConfig, gpu: Gpu | None) -> str | None:
    """What the user should know of the choice that `find_gpu` made unasked: of several GPUs one is used; or none is,
    for torch can't use the one that is there. None where there was nothing to choose.
    """
    if gpu is None:
        driver = _driver() if config.device == "auto" and not _hidden() else None
        if driver is None:
            return None
        return f"there is a GPU, {driver.card}, that torch can't use, so the model runs on the CPU; {_why_none()}"
    count = torch.cuda.device_count() if ":" not in config.device else 1
    if count < 2:
        return None
    return f"of {count} GPUs {gpu.device} is used, and no other; device cuda:N (--device) chooses one"


def _hidden() -> bool:
    """Whether somebody keeps every GPU from us."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def _unserved(index: int) -> str | None:
    """Why this torch has no code for the GPU with this number, None if it has: machine code of the same generation, not
    newer, or an older intermediate one to translate.
    """
    major, minor = torch.cuda.get_device_capability(index)
    builds = torch.cuda.get_arch_list()
    for kind, number in re.findall(r"(sm|compute)_(\d+)", " ".join(builds)):
        generation, version = divmod(int(number), 10)
        if (generation, version) <= (major, minor) and (kind == "compute" or generation == major):
            return None
    return f"it has compute capability {major}.{minor}, and this torch code for {', '.join(builds)} alone"


_OTHER_BUILD = "install a build of torch that has code for it"


def _why_none() -> str:
    """What to do for a GPU to be found."""
    if torch.cuda.is_available():
        return f"{_unserved(torch.cuda.current_device())}: {_OTHER_BUILD}"
    if not torch.backends.cuda.is_built():
        return "install a build of torch with CUDA"
    built_for, driver = torch.version.cuda, _driver()
    if driver is not None and built_for is not None and int(built_for.partition(".")[0]) > driver.cuda[0]:
        newest = ".".join(map(str, driver.cuda))
        return (
            f"install a newer driver, for {driver.version} runs CUDA {newest} at most and this torch wants "
            f"{built_for}, or install a build of torch for an older CUDA"
        )
    return "install an NVIDIA driver new enough for this torch, and see that CUDA_VISIBLE_DEVICES is not empty"


def layer_graphs(config: EngineConfig, gpu: Gpu | None) -> LayerGraphs | None:
    """What replays attention and routers; None where there is no GPU, or nobody wants it."""
    if gpu is None or config.cuda_graphs == "off":
        return None
    return LayerGraphs(gpu.recorder(), required=config.cuda_graphs == "on")


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
    """What the user should know, beside what the transfers tell of themselves."""


def sharing_notice(config: EngineConfig, gpu: Gpu | None) -> str | None:
    """Why the CPU computes no experts beside a GPU although that was asked for; None where it does, or nobody asked."""
    if config.cpu_experts == "off":
        return None
    if gpu is None:
        return "cpu_experts is ignored: without a GPU the CPU computes every expert anyway"
    if config.host_mem is None:
        return "cpu_experts is ignored: host_mem is none, so that no expert is in host memory"
    return None


def shared_tokens(config: EngineConfig, *, on_gpu: bool) -> int:
    """Tokens of the largest forward in which the CPU may take over experts: a denoising step that commits the blocks
    before it; 0 where it takes over none.
    """
    if not on_gpu or config.cpu_experts == "off" or config.host_mem is None:
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
    transfers.times.wanted = auto
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
        undo.pop_all()
    return Moving(arena, transfers, tuple(notices))
