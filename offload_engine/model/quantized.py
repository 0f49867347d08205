"""Expert matrices in 8 and 4 bits: how they are rounded, laid out, and made numbers again.

Both formats are symmetric (no zero point): weight = value x scale. docs/packed-format.md has them byte by byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

INT8_LIMIT = 127
"""Largest int8 value used: -128 has no counterpart."""
INT4_LOWEST, INT4_HIGHEST = -8, 7
NIBBLE = 4
LOW_NIBBLE = 0x0F

Bits = Literal[4, 8]


@dataclass(frozen=True, slots=True)
class ExpertFormat:
    """How the weights of all experts of a store are kept."""

    dtype: torch.dtype
    """What they are kept in; where they are quantised, what they were before, and are to be computed in."""
    bits: Bits | None = None
    """None: kept as they are."""
    group: int = 0
    """4 bits: columns that share a scale."""

    @property
    def itemsize(self) -> int:
        """Bytes of one stored weight, rounded up to a whole one; scales left out."""
        return self.dtype.itemsize if self.bits is None else 1

    def __str__(self) -> str:
        if self.bits is None:
            return str(self.dtype).removeprefix("torch.")
        return f"int{self.bits} (groups of {self.group})" if self.group else f"int{self.bits}"


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """A matrix [rows, columns] in 8 bits per channel, or in 4 bits per group of columns."""

    values: Tensor
    """8 bits: int8 [rows, columns]. 4 bits: uint8 [rows, columns / 2]; of a group of g columns byte i holds column i in
    its low nibble and column i + g/2 in its high one, each as value + 8."""
    scales: Tensor
    """8 bits: float32 [rows]. 4 bits: bfloat16 [rows, columns / g]."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, stored = self.values.shape
        return rows, stored if self.values.dtype == torch.int8 else 2 * stored

    @property
    def group(self) -> int:
        """Columns that share a scale: all of a row's in 8 bits."""
        return self.shape[1] if self.scales.dim() == 1 else self.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns] in `dtype`, rounded once: the product is taken in float32, for 5 bytes a weight meanwhile."""
        rows, columns = self.shape
        if self.values.dtype == torch.int8:
            return self.values.float().mul_(self.scales.unsqueeze(1)).to(dtype)
        half = self.group // 2
        packed = self.values.view(rows, -1, half)
        numbers = torch.empty(rows, packed.shape[1], 2 * half, device=packed.device)
        numbers[..., :half] = packed & LOW_NIBBLE
        numbers[..., half:] = packed >> NIBBLE
        numbers += INT4_LOWEST
        return numbers.mul_(self.scales.float().unsqueeze(2)).view(rows, columns).to(dtype)


Matrix = Tensor | QuantizedMatrix
"""A matrix of an expert, in whatever format it is stored."""


def in_dtype(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """The matrix as numbers of `dtype`; itself where it is that already."""
    return matrix.dequantize(dtype) if isinstance(matrix, QuantizedMatrix) else matrix.to(dtype)


def quantize_int8(matrix: Tensor) -> QuantizedMatrix:
    """Round [rows, columns] to 8 bits, every row by its own largest magnitude / 127.

    Raises `ValueError` where a weight is not finite.
    """
    numbers = matrix.float()
    scales = _finite(torch.maximum(numbers.amax(dim=1), -numbers.amin(dim=1))) / INT8_LIMIT
    values = _steps(numbers, scales.unsqueeze(1)).clamp_(-INT8_LIMIT, INT8_LIMIT)
    return QuantizedMatrix(values.to(torch.int8), scales)


def quantize_int4(matrix: Tensor, group: int) -> QuantizedMatrix:
    """Round [rows, columns] to 4 bits, every `group` columns of a row by a scale of their own; `group` is even.

    The scale takes the weight of largest magnitude, sign included, to -8, the one value without a counterpart: that
    rounds normal weights with 11 % less error than taking its magnitude to 7, and lets scales be negative. Scales are
    rounded to bfloat16 first, values against what became of them. Raises `ValueError` where a weight is not finite.
    """
    rows, columns = matrix.shape
    if group < 2 or group % 2 or columns % group:
        raise ValueError(f"group is {group}, wanted an even divisor of the {columns} columns")
    groups = matrix.float().view(rows, -1, group)
    lowest, highest = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    extreme = _finite(torch.where(highest > -lowest, highest, lowest))
    scales = (extreme / INT4_LOWEST).to(torch.bfloat16)
    values = _steps(groups, scales.float()).clamp_(INT4_LOWEST, INT4_HIGHEST).sub_(INT4_LOWEST).to(torch.uint8)
    packed = values[..., : group // 2] | (values[..., group // 2 :] << NIBBLE)
    return QuantizedMatrix(packed.reshape(rows, columns // 2), scales.squeeze(2))


def fitting_group(wanted: int, *columns: int) -> int:
    """The largest power of two, `wanted` at most, that divides all of `columns`."""
    group = 1 << (wanted.bit_length() - 1)
    while any(count % group for count in columns):
        group //= 2
    return group


def _finite(extremes: Tensor) -> Tensor:
    if not bool(extremes.isfinite().all()):
        raise ValueError("holds a weight that is not finite")
    return extremes


def _steps(numbers: Tensor, scales: Tensor) -> Tensor:
    """Each number in steps of its scale, rounded half to even; 0 where the scale is 0."""
    return (numbers / scales.masked_fill(scales == 0, 1.0)).round_()
