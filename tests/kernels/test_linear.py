"""Linear layers in C, on every instruction set that this machine has."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import relative_error
from torch import Tensor

from offload_engine.kernels import dense, linear, serves_linear
from offload_engine.kernels.library import KernelStatus, Library, choose

BF16_OUTPUT = 2.0**-9
"""Of each element: rounding it to bf16 costs half a unit in the last of 8 bits at most."""


def kernels_of(library: Library) -> list[KernelStatus]:
    return [choose(library, name) for name in library.variants]


def layer(tokens: int, columns: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    shapes = ((tokens, columns), (outputs, columns), (outputs,))
    x, weight, bias = (torch.randn(shape, generator=drawn).bfloat16() for shape in shapes)
    return x, weight, bias


def magnitude(x: Tensor, weight: Tensor) -> Tensor:
    """The sum of each product's magnitude, float64: what float32 sums are off by is a part of it."""
    return F.linear(x.double().abs(), weight.double().abs())


@given(
    tokens=st.integers(1, 140),
    columns=st.integers(1, 300),
    outputs=st.integers(1, 120),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(library: Library, tokens: int, columns: int, outputs: int, biased: bool, seed: int) -> None:
    x, weight, bias = layer(tokens, columns, outputs, seed)
    added = bias if biased else None
    exact = F.linear(x.double(), weight.double(), bias.double() if biased else None)
    for kernel in kernels_of(library):
        found = linear(x, weight, added, dtype=torch.float32, kernel=kernel)
        # products are exact in float32, and at most columns + 1 additions round by 2^-24 each; bf16 units by 2^-23
        bound = (magnitude(x, weight) + bias.double().abs()) * (columns + 2) * 2.0**-23
        assert bool(((found.double() - exact).abs() <= bound).all())
        rounded = linear(x, weight, added, kernel=kernel)
        assert torch.equal(rounded, found.bfloat16())


@pytest.mark.parametrize(("columns", "outputs"), [(2048, 3072), (5120, 304), (512, 2048)])
def test_the_sizes_of_a_model(library: Library, columns: int, outputs: int) -> None:
    x, weight, bias = layer(32, columns, outputs)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for kernel in kernels_of(library):
        assert relative_error(linear(x, weight, bias, dtype=torch.float32, kernel=kernel), exact) < 1e-6
        assert relative_error(linear(x, weight, bias, kernel=kernel), exact) < BF16_OUTPUT


def test_neither_threads_nor_neighbours_show_in_a_row(library: Library) -> None:
    x, weight, bias = layer(150, 200, 130)
    for kernel in kernels_of(library):
        together = linear(x, weight, bias, kernel=kernel, threads=1)
        for threads in (2, 3):
            assert torch.equal(linear(x, weight, bias, kernel=kernel, threads=threads), together)
        for first, last in ((0, 1), (1, 4), (4, 9), (9, 41), (41, 73), (73, 150)):
            assert torch.equal(linear(x[first:last], weight, bias, kernel=kernel, threads=1), together[first:last])
        for outputs in (1, 7, 48, 100):
            alone = linear(x, weight[:outputs], bias[:outputs], kernel=kernel, threads=1)
            assert torch.equal(alone, together[:, :outputs])


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
def test_damage_shows_where_it_is_used_and_nowhere_else(library: Library, damage: float) -> None:
    x, weight, bias = layer(7, 70, 50)
    for kernel in kernels_of(library):
        sound = linear(x, weight, bias, kernel=kernel)
        token, row = x.clone(), weight.clone()
        token[2, 3], row[11, 69] = damage, damage
        found = linear(token, weight, bias, kernel=kernel)
        assert not found[2].isfinite().any()
        assert torch.equal(found[[0, 1, 3, 4, 5, 6]], sound[[0, 1, 3, 4, 5, 6]])
        found = linear(x, row, bias, kernel=kernel)
        assert not found[:, 11].isfinite().any()
        found[:, 11] = sound[:, 11]
        assert torch.equal(found, sound)


def test_leading_dimensions_strided_rows_and_none_at_all(library: Library) -> None:
    kernel = choose(library, "auto")
    x, weight, bias = layer(12, 40, 24)
    wanted = linear(x, weight, bias, kernel=kernel)
    assert torch.equal(linear(x.view(3, 4, 40), weight, bias, kernel=kernel), wanted.view(3, 4, 24))
    assert torch.equal(linear(x[0], weight, bias, kernel=kernel), wanted[0])
    spread = torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]
    assert not spread.is_contiguous()
    assert torch.equal(linear(spread, weight, bias, kernel=kernel), wanted)
    assert linear(x[:0], weight, bias, kernel=kernel).shape == (0, 24)


X, W, B = layer(5, 16, 8)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "told"),
    [
        (X.float(), W, B, r"x is float32 \[5, 16\], wanted bfloat16 \[.., 16\]"),
        (X[:, :15], W, B, r"x is bfloat16 \[5, 15\]"),
        (X, W.float(), B, "weight is float32"),
        (X, W.T, B, r"weight is bfloat16 \[16, 8\], not contiguous"),
        (X, W[:0], None, "neither of them 0"),
        (X, W, B[:7], r"bias is bfloat16 \[7\], wanted contiguous bfloat16 \[8\]"),
        (X, W, B.float(), "bias is float32"),
        (X, W.to("meta"), B, "tensors are on cpu, meta"),
    ],
)
def test_what_does_not_fit_is_refused(library: Library, x: Tensor, weight: Tensor, bias: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        linear(x, weight, bias, kernel=choose(library, "auto"))


def test_other_outputs_and_a_missing_kernel_are_refused(library: Library) -> None:
    with pytest.raises(ValueError, match=r"output in torch.float16"):
        linear(X, W, dtype=torch.float16, kernel=choose(library, "auto"))
    with pytest.raises(ValueError, match=r"no kernel is in use: .* is off"):
        linear(X, W, kernel=choose(library, "off"))


def test_who_is_served(library: Library) -> None:
    with patch.object(dense, "status", lambda: choose(library, "auto")):
        assert serves_linear(X, W, B)
        assert serves_linear(X, W)
        assert not serves_linear(X.float(), W)
        assert not serves_linear(X, W.float())
        assert not serves_linear(X, W, B.float())
        assert not serves_linear(X, W.T)
        assert not serves_linear(X, W.to("meta"))
        learning = W.clone().requires_grad_()
        assert not serves_linear(X, learning)
        with torch.no_grad():
            assert serves_linear(X, learning)
    with patch.object(dense, "status", lambda: choose(library, "off")):
        assert not serves_linear(X, W, B)
