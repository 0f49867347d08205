"""Experts in every stored format, and what they should compute, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_engine.kernels import Matrix

FORMATS = ("bf16", "int8", "int4")


class Expert(NamedTuple):
    gate: Matrix
    up: Matrix
    down: Matrix


def random_matrix(form: str, rows: int, cols: int, group: int, generator: torch.Generator) -> Matrix:
    """Any bytes that the format allows, -128 and zero scales included."""
    if form == "bf16":
        return Matrix((torch.randn(rows, cols, generator=generator) * cols**-0.5).bfloat16())
    if form == "int8":
        values = torch.randint(-128, 128, (rows, cols), generator=generator, dtype=torch.int8)
        return Matrix(values, torch.rand(rows, generator=generator) * 0.02 * cols**-0.5)
    values = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, cols // group, generator=generator) * 0.3 * cols**-0.5
    return Matrix(values, scales.bfloat16())


def random_expert(form: str, hidden: int, inner: int, group: int = 16, seed: int = 0) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return Expert(*(random_matrix(form, rows, cols, group, generator) for rows, cols in shapes))


def dense(matrix: Matrix) -> Tensor:
    """The weights that a matrix stands for, float64 [rows, cols]."""
    values, scales = matrix
    if scales is None:
        return values.double()
    if values.dtype == torch.int8:
        return values.double() * scales.double()[:, None]
    groups = values.unflatten(1, (scales.shape[1], -1))
    nibbles = torch.cat([groups & 15, groups >> 4], dim=2).double() - 8
    return (nibbles * scales.double()[..., None]).flatten(1)


def oracle(hidden: Tensor, expert: Expert, *, int4_in_bf16: bool = False) -> Tensor:
    """float64 [n, H]; `int4_in_bf16`: of int4 weights that were rounded to bf16."""
    rounded = int4_in_bf16 and expert[0].values.dtype == torch.uint8
    gate, up, down = (dense(matrix).bfloat16().double() if rounded else dense(matrix) for matrix in expert)
    x = hidden.double()
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def random_hidden(tokens: int, width: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())
