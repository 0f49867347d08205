"""Linear layers straight from their stored bf16 weights, through the C kernels: the checks, and the call."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status

_OUTPUTS = (torch.bfloat16, torch.float32)


def serves_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` computes these: there is a kernel, all are bf16 on the CPU, the weights contiguous, and nobody
    wants a gradient. Shapes are not looked at.
    """
    if status().variant is None or not weight.is_contiguous() or not (_plain(x) and _plain(weight)):
        return False
    if bias is not None and not _plain(bias):
        return False
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    kernel: KernelStatus | None = None,
    threads: int | None = None,
) -> Tensor:
    """A layer, x W^T + b, of `x` [.., K], `weight` [N, K] and `bias` [N], all bf16: [.., N], in bf16 or float32.

    Products are summed in float32, the bias is added to the sum, and only bf16 output is rounded. What a row of `x`
    gives depends neither on the rows beside it nor on `threads` (default: torch's number).

    `kernel` defaults to `status()`. Raises ValueError for shapes, dtypes or strides that don't fit, or without one.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    _check(x, weight, bias, dtype)
    rows, (outputs, columns) = x.contiguous(), weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=dtype)
    tokens = math.prod(x.shape[:-1])
    if not tokens:
        return out
    threads = library.threads() if threads is None or library.parallel is None else threads
    added = None if bias is None else bias.data_ptr()
    sizes = (tokens, columns, outputs)
    rounded = dtype == torch.bfloat16
    library.linear(number, rounded, threads, sizes, rows.data_ptr(), weight.data_ptr(), added, out.data_ptr())
    return out


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Raises ValueError rather than read out of bounds."""
    if weight.dim() != 2 or not weight.numel() or not weight.is_contiguous() or weight.dtype != torch.bfloat16:
        raise ValueError(f"weight is {_told(weight)}, wanted contiguous bfloat16 [N, K], neither of them 0")
    outputs, columns = weight.shape
    if not x.dim() or x.shape[-1] != columns or x.dtype != torch.bfloat16:
        raise ValueError(f"x is {_told(x)}, wanted bfloat16 [.., {columns}]")
    if bias is not None and (bias.shape != (outputs,) or bias.dtype != torch.bfloat16 or not bias.is_contiguous()):
        raise ValueError(f"bias is {_told(bias)}, wanted contiguous bfloat16 [{outputs}]")
    if dtype not in _OUTPUTS:
        raise ValueError(f"output in {dtype}, wanted {' or '.join(map(str, _OUTPUTS))}")
    if not (x.is_cpu and weight.is_cpu and (bias is None or bias.is_cpu)):
        devices = sorted({tensor.device.type for tensor in (x, weight, bias) if tensor is not None})
        raise ValueError(f"tensors are on {', '.join(devices)}, wanted all on the CPU")


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu


def _told(tensor: Tensor) -> str:
    how = "" if tensor.is_contiguous() else ", not contiguous"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}{how}"
