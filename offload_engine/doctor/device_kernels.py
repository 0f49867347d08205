"""The kernels that a GPU would run for us: the CUDA library that selects experts, and Triton, which computes them."""

from __future__ import annotations

import importlib.util

import torch

from offload_engine.doctor.finding import Finding, Level
from offload_engine.kernels import cuda, grouped
from offload_engine.kernels.library import CHOICE

CUDA, TRITON = "CUDA kernels", "Triton"
CHECKOUT = "run `make cuda` in a checkout of the repository: wheels come without CUDA kernels"


def check_cuda_kernels(in_use: bool, reason: str, nvcc: str | None) -> Finding:
    """What `kernels.cuda.status` says; `nvcc` is where CUDA's compiler is, which builds the library."""
    if in_use:
        return Finding(CUDA, reason)
    found = f"torch selects experts, in some dozen launches instead of one: {reason}"
    if "is off" in reason:
        return Finding(CUDA, found, Level.WARNING, f"unset {CHOICE}")
    if cuda.REBUILD in reason:
        way_out = CHECKOUT if nvcc else f"install the CUDA toolkit (nvcc is not on the PATH), then {CHECKOUT}"
        return Finding(CUDA, found, Level.WARNING, way_out)
    return Finding(CUDA, found)  # a card that is too old, or that torch doesn't find, has a line of its own


def check_triton(reason: str | None) -> Finding:
    """Why Triton can't compute experts; None if it can."""
    if reason is None:
        return Finding(TRITON, "computes the experts of a layer in two launches")
    found = f"torch computes the experts of a GPU one by one: {reason}"
    if "is off" in reason:
        return Finding(TRITON, found, Level.WARNING, f"unset {grouped.CHOICE}")
    if "not installed" in reason:
        return Finding(TRITON, found, Level.WARNING, "pip install triton")
    if "fails here" in reason:
        return Finding(
            TRITON, found, Level.WARNING, f"install the version of Triton that torch {torch.__version__} names"
        )
    return Finding(TRITON, found)


def read_cuda_kernels(index: int) -> tuple[bool, str]:
    """Whether the library serves the GPU with this number, and why or why not."""
    status = cuda.status(index)
    return status.library is not None, status.reason


def read_triton(index: int) -> str | None:
    """Why Triton can't compute on the GPU with this number, which is tried out."""
    if torch.cuda.is_available() and index < torch.cuda.device_count():
        return grouped.why_not(torch.device("cuda", index))
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return "torch finds no CUDA device"
