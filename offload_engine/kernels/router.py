"""A router's logits from bf16 activations and float32 weights, through the C kernels: the checks, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status


def serves_router(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `router_logits` computes these: there is a kernel, `hidden` is contiguous bf16 and `weight` contiguous
    float32, both on the CPU, and nobody wants a gradient. Shapes are not looked at.
    """
    if status().variant is None or not _fits(hidden, weight):
        return False
    return not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad))


def router_logits(
    hidden: Tensor, weight: Tensor, *, kernel: KernelStatus | None = None, threads: int | None = None
) -> Tensor:
    """`hidden` [T, H] bf16 times `weight` [E, H] float32, both contiguous: [T, E] float32.

    Products are rounded to float32 and summed in it, 256 columns at a time and then those sums, in the order of the
    columns: every instruction set gives the same bits, and a token's logits depend neither on the tokens beside it nor
    on `threads` (default: torch's number).

    `kernel` defaults to `status()`. Raises ValueError for shapes, dtypes or strides that don't fit, or without one.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    shapes_fit = hidden.dim() == 2 and weight.dim() == 2 and hidden.shape[-1] == weight.shape[-1] and weight.numel()
    if not shapes_fit or not _fits(hidden, weight):
        told = " and ".join(f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" for x in (hidden, weight))
        raise ValueError(
            f"hidden and weight are {told}, wanted contiguous bfloat16 [T, H] and float32 [E, H] on the CPU"
        )
    tokens, columns = hidden.shape
    experts = weight.shape[0]
    out = torch.empty(tokens, experts, dtype=torch.float32)
    sizes = (tokens, columns, experts)
    library.router(number, threads, sizes, hidden.data_ptr(), weight.data_ptr(), out.data_ptr())
    return out


def _fits(hidden: Tensor, weight: Tensor) -> bool:
    tensors = (hidden, weight)
    if hidden.dtype != torch.bfloat16 or weight.dtype != torch.float32:
        return False
    return all(tensor.is_cpu and tensor.is_contiguous() for tensor in tensors)
