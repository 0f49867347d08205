"""Attention to a prefix that every query sees all of, through the C kernels: the checks, and the call."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status


def serves_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` computes these: there is a kernel, all are bf16 on the CPU, keys and values contiguous, and
    nobody wants a gradient. Shapes are not looked at.
    """
    tensors = (query, key, value)
    if status().variant is None or not (key.is_contiguous() and value.is_contiguous()):
        return False
    if any(tensor.dtype != torch.bfloat16 or not tensor.is_cpu for tensor in tensors):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: int,
    *,
    kernel: KernelStatus | None = None,
    threads: int | None = None,
) -> Tensor:
    """What `query` [T, heads, d] makes of the first `seen` of `key` and `value` [S, kv_heads, d], all bf16; as `query`.

    softmax(q k^T / sqrt(d)) v, consecutive query heads sharing a key-value head. Scores stay float32; the exponentials
    are rounded to bf16 for the product with the values, and their sum divides it. What a query gives depends neither on
    the queries beside it, nor on what lies behind the prefix, nor on `threads` (default: torch's number).

    `kernel` defaults to `status()`. Raises ValueError for shapes, dtypes or strides that don't fit, or without one.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    _check(query, key, value, seen)
    rows = query.contiguous()
    out = torch.empty_like(rows)
    if not out.numel():
        return out
    threads = library.threads() if threads is None or library.parallel is None else threads
    tokens, heads, head_dim = query.shape
    sizes = (tokens, heads, key.shape[1], head_dim, seen)
    pointers = (rows.data_ptr(), key.data_ptr(), value.data_ptr(), out.data_ptr())
    library.attention(number, threads, sizes, head_dim**-0.5, *pointers)
    return out


def _check(query: Tensor, key: Tensor, value: Tensor, seen: int) -> None:
    """Raises ValueError rather than read out of bounds."""
    if query.dim() != 3 or query.dtype != torch.bfloat16:
        raise ValueError(f"query is {_told(query)}, wanted bfloat16 [T, heads, d]")
    _tokens, heads, head_dim = query.shape
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 or tensor.shape[2] != head_dim or tensor.dtype != torch.bfloat16:
            raise ValueError(f"{name} is {_told(tensor)}, wanted bfloat16 [S, kv_heads, {head_dim}]")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is {_told(tensor)}, but not contiguous")
    positions, kv_heads, _head_dim = key.shape
    if value.shape != key.shape or not kv_heads or heads % kv_heads:
        raise ValueError(f"key is {_told(key)}, value {_told(value)}, wanted one shape, its heads a divisor of {heads}")
    if not 0 < seen <= positions:
        raise ValueError(f"{seen} positions are to be seen, wanted 1 to {positions}")
    if not (query.is_cpu and key.is_cpu and value.is_cpu):
        devices = sorted({tensor.device.type for tensor in (query, key, value)})
        raise ValueError(f"tensors are on {', '.join(devices)}, wanted all on the CPU")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
