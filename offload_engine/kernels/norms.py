"""RMS norms, and the norm and rotary embedding of attention heads, in bf16 through the C kernels.

Both round to bf16 wherever torch does when it computes them step by step (`offload_engine.model.layers`); squares alone
are summed in another order, in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status

WIDEST_HEAD = 512
"""Columns of the widest head taken (cpu/norms.h)."""


def serves_norm(x: Tensor, weight: Tensor) -> bool:
    """Whether `rms_norm` computes these: there is a kernel, both are bf16 on the CPU and contiguous, and nobody wants a
    gradient. Shapes are not looked at.
    """
    return status().variant is not None and _plain(x) and _plain(weight) and not _learning(x, weight)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, kernel: KernelStatus | None = None, threads: int | None = None
) -> Tensor:
    """`weight` [N] * x / sqrt(mean(x^2) + eps) of rows of `x` [.., N], both contiguous bf16: [.., N] bf16.

    The quotient is rounded before it is multiplied. A row depends neither on others nor on `threads` (default: torch's
    number).

    `kernel` defaults to `status()`. Raises ValueError for shapes, dtypes or strides that don't fit, or without one.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    columns = weight.numel()
    if not (_plain(x) and _plain(weight)) or not columns or not x.dim() or x.shape[-1:] != weight.shape:
        raise ValueError(
            f"x is {_told(x)}, weight {_told(weight)}, wanted contiguous bfloat16 [.., N] and [N] on the CPU"
        )
    out = torch.empty_like(x)
    sizes = (x.numel() // columns, columns)
    library.norm(number, threads, sizes, eps, x.data_ptr(), weight.data_ptr(), out.data_ptr())
    return out


def serves_heads(fused: Tensor, cos: Tensor, sin: Tensor, *weights: Tensor) -> bool:
    """Whether `turn_heads` computes these: there is a kernel, all are bf16 on the CPU and contiguous, angles are given
    for each token of `fused`, its heads are not too wide, and nobody wants a gradient. Other shapes are not looked at.
    """
    if status().variant is None or cos.shape[:-1] != fused.shape[:-2] or fused.shape[-1] > WIDEST_HEAD:
        return False
    tensors = (fused, cos, sin, *weights)
    return all(map(_plain, tensors)) and not _learning(*tensors)


def turn_heads(
    fused: Tensor,
    kv_heads: int,
    angles: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    *,
    kernel: KernelStatus | None = None,
    threads: int | None = None,
) -> None:
    """Norm and turn the queries and keys of `fused` [.., heads + 2 kv_heads, d] where they lie; values stay.

    `angles`: cosines and sines [.., dims], as `rotary_angles` gives them; the first `dims` columns of a head turn.
    `norms`: weights [d] of queries and of keys, or None. All contiguous bf16 on the CPU. A head depends neither on
    others nor on `threads` (default: torch's number).

    `kernel` defaults to `status()`. Raises ValueError for shapes, dtypes or strides that don't fit, or without one.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    cos, sin = angles
    _check_heads(fused, kv_heads, cos, sin, norms)
    tokens = math.prod(fused.shape[:-2])
    sizes = (tokens, fused.shape[-2] - 2 * kv_heads, kv_heads, fused.shape[-1], cos.shape[-1])
    query, key = (None, None) if norms is None else (norms[0].data_ptr(), norms[1].data_ptr())
    library.turn_heads(number, threads, sizes, eps, query, key, cos.data_ptr(), sin.data_ptr(), fused.data_ptr())


def _check_heads(fused: Tensor, kv_heads: int, cos: Tensor, sin: Tensor, norms: tuple[Tensor, Tensor] | None) -> None:
    """Raises ValueError rather than read or write out of bounds."""
    if not all(map(_plain, (fused, cos, sin, *(norms or ())))):
        raise ValueError("fused, angles and norms are wanted contiguous bfloat16 on the CPU, all of them")
    if fused.dim() < 2 or fused.shape[-1] > WIDEST_HEAD or not 0 <= 2 * kv_heads <= fused.shape[-2]:
        raise ValueError(f"fused is {_told(fused)}, wanted [.., heads + 2 * {kv_heads}, d], d at most {WIDEST_HEAD}")
    dims = cos.shape[-1] if cos.dim() else 0
    if cos.shape != sin.shape or cos.shape[:-1] != fused.shape[:-2] or dims % 2 or not 0 < dims <= fused.shape[-1]:
        raise ValueError(
            f"angles are {_told(cos)} and {_told(sin)}, wanted [.., dims] for the tokens of {_told(fused)}"
        )
    if any(weight.shape != fused.shape[-1:] for weight in norms or ()):
        raise ValueError(f"norms are {', '.join(map(_told, norms or ()))}, wanted [{fused.shape[-1]}] each")


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.is_cpu and tensor.is_contiguous()


def _learning(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
