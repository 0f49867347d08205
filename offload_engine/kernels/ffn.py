"""One expert on its tokens, through the C kernels: the checks that keep them within bounds, and the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status

WIDEST = 16384
"""Columns of the widest matrix taken: int8's sums of products stay within int32 (cpu/expert_ffn.c, integer_limit)."""

_BF16, _INT8, _INT4 = range(3)
_KINDS = {torch.bfloat16: _BF16, torch.int8: _INT8, torch.uint8: _INT4}
_SCALES = {_INT8: torch.float32, _INT4: torch.bfloat16}


class Matrix(NamedTuple):
    """A weight matrix [rows, cols] as it is stored."""

    values: Tensor
    """bf16 [rows, cols]; int8 [rows, cols]; or int4, two to a uint8 [rows, cols / 2]: in each group of g columns byte
    i holds column i in its low nibble and column i + g / 2 in its high one, as value + 8."""
    scales: Tensor | None = None
    """int8: float32 [rows]; int4: bf16 [rows, cols / g]; bf16: None."""


def serves(hidden: Tensor, *matrices: Matrix) -> bool:
    """Whether `expert_ffn` takes these: CPU, contiguous, known dtypes, no gradient wanted. Shapes are not looked at."""
    if hidden.device.type != "cpu" or hidden.dtype not in (torch.bfloat16, torch.float32):
        return False
    if status().variant is None or any(matrix.values.dtype not in _KINDS for matrix in matrices):
        return False
    tensors = [hidden, *_tensors(matrices)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return False
    return all(tensor.is_contiguous() for tensor in tensors[1:])


def expert_ffn(
    hidden: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    *,
    kernel: KernelStatus | None = None,
    threads: int | None = None,
) -> Tensor:
    """down(silu(gate(x)) * up(x)): `hidden` [n, H], bf16 or float32, to [n, H] in its dtype.

    `gate` and `up` are [I, H], `down` is [H, I], all three in one format. Products are summed in float32 and the inner
    activation is not rounded to `hidden`'s dtype. Activations meet bf16 and int4 weights as bf16 on AVX512-BF16 and as
    float32 elsewhere; they meet int8 weights as integers of at most 2^31 / (128 cols) of the row's largest. A token's
    result depends neither on the tokens beside it nor on `threads` (default: torch's number).

    `kernel` defaults to `status()`. Raises ValueError for shapes or dtypes that don't fit, or without a kernel.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    kind, inner, group = _check(hidden, gate, up, down)
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    tokens, width = hidden.shape
    if tokens:
        threads = library.threads() if threads is None or library.parallel is None else threads
        pointers = [None if tensor is None else tensor.data_ptr() for matrix in (gate, up, down) for tensor in matrix]
        bf16 = hidden.dtype == torch.bfloat16
        library.run(
            number, kind, bf16, threads, (tokens, width, inner, group), hidden.data_ptr(), *pointers, out.data_ptr()
        )
    return out


def _tensors(matrices: Sequence[Matrix]) -> list[Tensor]:
    return [tensor for matrix in matrices for tensor in matrix if tensor is not None]


def _check(hidden: Tensor, gate: Matrix, up: Matrix, down: Matrix) -> tuple[int, int, int]:
    """Format, width of the expert, columns per int4 scale. Raises ValueError rather than read out of bounds."""
    if hidden.dim() != 2 or hidden.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"hidden is {_told(hidden)}, wanted bf16 or float32 [n, H]")
    kind = _KINDS.get(gate.values.dtype)
    if kind is None or gate.values.dim() != 2:
        raise ValueError(f"gate is {_told(gate.values)}, wanted bf16, int8 or packed int4 (uint8) [I, H]")
    inner, width = gate.values.shape[0], hidden.shape[1]
    if not inner or not 0 < max(inner, width) <= WIDEST:
        raise ValueError(f"an expert of [{inner}, {width}] has an empty side or one above {WIDEST}")
    group = _int4_group(gate, width) if kind == _INT4 else 0
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    for (name, (rows, cols)), matrix in zip(shapes.items(), (gate, up, down), strict=True):
        _check_matrix(name, matrix, kind, rows, cols, group)
    devices = {str(tensor.device) for tensor in [hidden, *_tensors((gate, up, down))]}
    if devices != {"cpu"}:
        raise ValueError(f"tensors are on {', '.join(sorted(devices))}, wanted all on the CPU")
    return kind, inner, group


def _int4_group(gate: Matrix, width: int) -> int:
    if gate.scales is None or gate.scales.dim() != 2 or not gate.scales.shape[1]:
        raise ValueError("gate has no scales [I, H / g], which int4 weights need")
    group = width // gate.scales.shape[1]
    if group * gate.scales.shape[1] != width or group % 2 or not group:
        raise ValueError(f"gate has {gate.scales.shape[1]} scales per row of {width}, wanted groups of even size")
    return group


def _check_matrix(name: str, matrix: Matrix, kind: int, rows: int, cols: int, group: int) -> None:
    values, scales = matrix
    stored = (rows, cols // 2) if kind == _INT4 else (rows, cols)
    if _KINDS.get(values.dtype) != kind or tuple(values.shape) != stored or not values.is_contiguous():
        raise ValueError(f"{name} is {_told(values)}, wanted contiguous {list(stored)} in gate's dtype")
    if kind == _INT4 and cols % group:
        raise ValueError(f"{name} has rows of {cols}, which groups of {group} don't divide")
    if kind == _BF16:
        if scales is not None:
            raise ValueError(f"{name} has scales, which bf16 weights don't")
        return
    wanted = (rows,) if kind == _INT8 else (rows, cols // group)
    if scales is None or tuple(scales.shape) != wanted or scales.dtype != _SCALES[kind] or not scales.is_contiguous():
        told = "absent" if scales is None else _told(scales)
        raise ValueError(f"{name}'s scales are {told}, wanted contiguous {list(wanted)} {_SCALES[kind]}")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
