"""The processes that train together: one, or those that `torchrun` starts, with the weights sharded among them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from offload_engine.errors import DeviceError
from tools.training.trainer import Network

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """One process among those of a run."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` on the CPU over all processes."""
        if self.count == 1:
            return values
        values = values.to(self.device)
        dist.all_reduce(values)
        return values.cpu()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


def known_device(name: str | None) -> str:
    """The device to train on; None: cuda where there is one. Raises `DeviceError` for one that isn't here."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    if re.fullmatch(r"cuda(:\d+)?", name) is None:
        raise DeviceError(f"--device is {name!r}, wanted cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if int(name.partition(":")[2] or 0) >= count:
        raise DeviceError(f"--device is {name}, but torch finds {count} CUDA devices here; choose one of them, or cpu")
    return name


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """One process and its fellows, as `torchrun` has set them up; alone where it hasn't."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=torch.device(device))
        return
    rank, kind = int(os.environ["RANK"]), torch.device(device).type
    mine = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield Processes(rank, count, mine)
    finally:
        dist.destroy_process_group()


def shard(network: Network, among: Processes) -> Network:
    """Split every weight over the processes (FSDP2); attention, feed-forward and experts are gathered when they run."""
    if among.count == 1:
        return network
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")  # which nobody writes to
    mesh = init_device_mesh(among.device.type, (among.count,))
    for layer in network.model.layers:
        fully_shard(layer.attention, mesh=mesh)
        fully_shard(layer.mlp, mesh=mesh)
    for experts in network.experts.layers.values():
        fully_shard(experts, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_whole(source: Tensor, target: Tensor) -> None:
    """Fill `target`, which may be sharded, from all of its values: each process takes its share, nothing is sent."""
    if isinstance(target, DTensor):
        share = distribute_tensor(source.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(share.to_local())
    else:
        target.copy_(source)
