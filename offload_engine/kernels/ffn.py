"""Experts on their tokens, through the C kernels: the checks that keep them within bounds, and the calls."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine.kernels.library import KernelStatus, status

WIDEST = 16384
"""Columns of the widest int8 matrix taken: its sums of products stay within int32 (cpu/products.c, integer_limit)."""

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


def fits(*matrices: Matrix) -> bool:
    """Whether these weights are on the CPU, contiguous, and of dtypes the kernels know. Shapes are not looked at."""
    return all(matrix.values.dtype in _KINDS for matrix in matrices) and all(
        tensor.is_contiguous() and tensor.is_cpu for tensor in _tensors(matrices)
    )


@dataclass(frozen=True, slots=True, eq=False)
class Expert:
    """One expert's matrices, checked: gate and up [I, H], down [H, I], all three in one format.

    Checking costs more than handing them to the kernel, so that whoever computes an expert often keeps this.
    """

    shape: tuple[int, int, int, int]
    """Format, H, I, and columns per int4 scale; experts of one call share it."""
    pointers: bytes
    """Addresses of values and scales of gate, up and down, as the kernels read them; 0 for none."""
    learning: bool
    """Whether a matrix wants a gradient, which the kernels don't give."""
    held: object
    """So that the memory stays."""

    @staticmethod
    def of(gate: Matrix, up: Matrix, down: Matrix) -> Expert:
        """Raises ValueError for shapes, dtypes or devices that don't fit."""
        matrices = (gate, up, down)
        shape = _check(*matrices)
        pointers = (0 if part is None else part.data_ptr() for matrix in matrices for part in matrix)
        learning = any(tensor.requires_grad for tensor in _tensors(matrices))
        return Expert(shape, struct.pack("6P", *pointers), learning, matrices)

    def moved(self, by: int, held: object) -> Expert:
        """One that lies `by` bytes further on and is the same otherwise, in memory that `held` keeps; unchecked."""
        pointers = struct.unpack("6P", self.pointers)
        return Expert(self.shape, struct.pack("6P", *[at + by if at else 0 for at in pointers]), self.learning, held)


def serves(hidden: Tensor, *experts: Expert) -> bool:
    """Whether `experts_ffn` computes these: there is a kernel, `hidden` is bf16 or float32 on the CPU, and nobody wants
    a gradient.
    """
    if not hidden.is_cpu or hidden.dtype not in (torch.bfloat16, torch.float32) or status().variant is None:
        return False
    return not (torch.is_grad_enabled() and (hidden.requires_grad or any(expert.learning for expert in experts)))


def experts_ffn(
    hidden: Tensor,
    chosen: Tensor | None,
    numbers: Sequence[int],
    experts: Sequence[Expert],
    out: Tensor,
    *,
    kernel: KernelStatus | None = None,
    threads: int | None = None,
) -> None:
    """Experts on the tokens that chose them: down(silu(gate(x)) * up(x)) of rows of `hidden` [T, H], into the rows of
    `out` [T * k, H] whose number in `chosen` [T, k] int64 is theirs; other rows stay as they are. All contiguous,
    `hidden` and `out` bf16 or float32. Without `chosen`, one expert computes all rows.

    Products are summed in float32 and the inner activation is not rounded to `hidden`'s dtype. Activations meet bf16
    and int4 weights as bf16 on AVX512-BF16 and as float32 elsewhere; int4 weights times their scales are rounded to
    bf16 on AVX512-BF16 and AVX2. Activations meet int8 weights as integers of at most 2^31 / (128 cols) of the row's
    largest. A token's result depends neither on the tokens or experts beside it nor on `threads` (default: torch's
    number).

    `kernel` defaults to `status()`. Raises ValueError for shapes or dtypes that don't fit, or without a kernel.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    if not experts or not out.numel():
        return
    _check_activations(hidden, chosen, numbers, experts, out)
    threads = library.threads() if threads is None or library.parallel is None else threads
    table = b"".join([one.pointers for one in experts])
    format_, width, inner, group = experts[0].shape
    sizes = (len(experts), out.shape[0], out.shape[0] // hidden.shape[0], width, inner, group)
    bf16 = hidden.dtype == torch.bfloat16
    where = None if chosen is None else chosen.data_ptr()
    library.experts(number, format_, bf16, threads, sizes, hidden.data_ptr(), where, numbers, table, out.data_ptr())


def expert_ffn(
    hidden: Tensor,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    *,
    kernel: KernelStatus | None = None,
    threads: int | None = None,
) -> Tensor:
    """One expert on all rows of `hidden` [n, H], to [n, H] in its dtype; see `experts_ffn`."""
    return one_expert_ffn(hidden, Expert.of(gate, up, down), kernel=kernel, threads=threads)


def one_expert_ffn(
    hidden: Tensor, expert: Expert, *, kernel: KernelStatus | None = None, threads: int | None = None
) -> Tensor:
    """As `expert_ffn`, of an expert that is checked already."""
    hidden = hidden.contiguous()
    out = torch.empty_like(hidden)
    experts_ffn(hidden, None, [0], [expert], out, kernel=kernel, threads=threads)
    return out


def weighted_sum(outputs: Tensor, experts: Tensor, weights: Tensor, *, kernel: KernelStatus | None = None) -> Tensor:
    """The sum [T, H] over k of `weights` [T, k] float32 times `outputs` [T, k, H] bf16, both contiguous, accumulated in
    float32 in the order of k. Outputs whose expert, of `experts` [T, k] int64, is below 0 count nothing and may hold
    anything. Raises ValueError for shapes or dtypes that don't fit, or without a kernel.
    """
    kernel = kernel or status()
    number, library = kernel.number, kernel.library
    assert library is not None
    tokens, choices, width = outputs.shape
    wanted = ((outputs, torch.bfloat16), (experts, torch.int64), (weights, torch.float32))
    if experts.shape != (tokens, choices) or weights.shape != experts.shape:
        raise ValueError(f"experts are {_told(experts)}, weights {_told(weights)}, wanted both [{tokens}, {choices}]")
    for tensor, dtype in wanted:
        if tensor.dtype != dtype or not tensor.is_contiguous() or not tensor.is_cpu:
            raise ValueError(f"{_told(tensor)} on {tensor.device}, wanted contiguous {dtype} on the CPU")
    out = torch.empty(tokens, width, dtype=outputs.dtype)
    library.weighted_sum(number, (tokens, choices, width), *(tensor.data_ptr() for tensor, _ in wanted), out.data_ptr())
    return out


def _tensors(matrices: Sequence[Matrix]) -> list[Tensor]:
    return [tensor for matrix in matrices for tensor in matrix if tensor is not None]


def _check_activations(
    hidden: Tensor, chosen: Tensor | None, numbers: Sequence[int], experts: Sequence[Expert], out: Tensor
) -> None:
    if hidden.dim() != 2 or hidden.dtype not in (torch.bfloat16, torch.float32) or not hidden.is_contiguous():
        raise ValueError(f"hidden is {_told(hidden)}, wanted contiguous bf16 or float32 [T, H]")
    tokens, width = hidden.shape
    choices = out.shape[0] // tokens
    if out.dtype != hidden.dtype or out.shape != (tokens * choices, width) or not out.is_contiguous():
        raise ValueError(f"out is {_told(out)}, wanted contiguous {hidden.dtype} [{tokens} k, {width}]")
    shape = experts[0].shape
    if shape[1] != width:
        raise ValueError(f"an expert takes {shape[1]} columns, hidden has {width}")
    if any(expert.shape != shape for expert in experts) or not len(set(numbers)) == len(numbers) == len(experts):
        raise ValueError("the experts of one call differ in format or shape, or have not a number each")
    if chosen is None:
        if choices != 1 or len(experts) != 1:
            raise ValueError(f"{len(experts)} experts and {choices} choices per token, but nothing says who chose whom")
    elif chosen.shape != (tokens, choices) or chosen.dtype != torch.int64 or not chosen.is_contiguous():
        raise ValueError(f"chosen is {_told(chosen)}, wanted contiguous int64 [{tokens}, {choices}]")
    if not (hidden.is_cpu and out.is_cpu and (chosen is None or chosen.is_cpu)):
        devices = sorted({tensor.device.type for tensor in (hidden, out, chosen) if tensor is not None})
        raise ValueError(f"tensors are on {', '.join(devices)}, wanted all on the CPU")


def _check(gate: Matrix, up: Matrix, down: Matrix) -> tuple[int, int, int, int]:
    """See `Expert.shape`. Raises ValueError rather than read out of bounds."""
    kind = _KINDS.get(gate.values.dtype)
    if kind is None or gate.values.dim() != 2:
        raise ValueError(f"gate is {_told(gate.values)}, wanted bf16, int8 or packed int4 (uint8) [I, H]")
    inner, stored = gate.values.shape
    width = 2 * stored if kind == _INT4 else stored
    if not inner or not width:
        raise ValueError(f"an expert of [{inner}, {width}] has an empty side")
    if kind == _INT8 and max(inner, width) > WIDEST:
        raise ValueError(f"an int8 expert of [{inner}, {width}] has a side above {WIDEST}")
    group = _int4_group(gate, width) if kind == _INT4 else 0
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    for (name, (rows, cols)), matrix in zip(shapes.items(), (gate, up, down), strict=True):
        _check_matrix(name, matrix, kind, rows, cols, group)
    devices = {str(tensor.device) for tensor in _tensors((gate, up, down))}
    if devices != {"cpu"}:
        raise ValueError(f"tensors are on {', '.join(sorted(devices))}, wanted all on the CPU")
    return kind, width, inner, group


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
