"""Attention to a prefix in C, on every instruction set that this machine has."""

from __future__ import annotations

from math import inf
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import relative_error
from torch import Tensor

from offload_engine.kernels import attention as attend
from offload_engine.kernels import serves_attention
from offload_engine.kernels.library import KernelStatus, Library, choose
from offload_engine.model import attention as model_attention
from offload_engine.model.attention import grouped_attention, prefix_attention

ROUNDING = 1.1 * 2.0**-7
"""Exponentials and output are rounded to bf16, by 2^-8 of each at most; the rest is for float32."""


def kernels_of(library: Library) -> list[KernelStatus]:
    return [choose(library, name) for name in library.variants]


def inputs(
    tokens: int, positions: int, shared: int, kv_heads: int, dim: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    shapes = ((tokens, shared * kv_heads, dim), (positions, kv_heads, dim), (positions, kv_heads, dim))
    query, key, value = (torch.randn(shape, generator=drawn).bfloat16() for shape in shapes)
    return query, key, value


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return grouped_attention(query.double(), key.double(), value.double(), None)


@given(
    tokens=st.integers(1, 70),
    positions=st.integers(1, 150),
    behind=st.integers(0, 20),
    shared=st.integers(1, 4),
    kv_heads=st.integers(1, 3),
    dim=st.integers(1, 140),
    seed=st.integers(0, 99),
)
def test_any_shape(
    library: Library, tokens: int, positions: int, behind: int, shared: int, kv_heads: int, dim: int, seed: int
) -> None:
    query, key, value = inputs(tokens, positions + behind, shared, kv_heads, dim, seed)
    seen = key[:positions], value[:positions]
    bound = ROUNDING * exact(query, seen[0], seen[1].abs())
    key[positions:], value[positions:] = torch.nan, torch.nan
    for kernel in kernels_of(library):
        found = attend(query, key, value, positions, kernel=kernel)
        assert bool(((found.double() - exact(query, *seen)).abs() <= bound).all())


@pytest.mark.parametrize("positions", [33, 432, 1100])
def test_the_sizes_of_a_model_and_half_the_error_of_plain_products(library: Library, positions: int) -> None:
    query, key, value = inputs(32, positions, 4, 4, 128)
    wanted = exact(query, key, value)
    with patch.object(model_attention, "kernel_positions", lambda: 0):
        plain = relative_error(prefix_attention(query, key, value), wanted)
    for kernel in kernels_of(library):
        assert relative_error(attend(query, key, value, positions, kernel=kernel), wanted) < 0.75 * plain


@pytest.mark.parametrize(("variant", "most"), [("avx512_bf16", 1024), ("avx2", inf), ("generic", inf)])
def test_how_long_a_prefix_may_be(variant: str, most: float) -> None:
    with patch.object(model_attention.kernels, "status", lambda: KernelStatus(variant, "as a test wants")):
        assert model_attention.kernel_positions() == most


def test_neither_threads_nor_neighbours_show_in_a_query(library: Library) -> None:
    query, key, value = inputs(70, 130, 3, 2, 72)
    for kernel in kernels_of(library):
        together = attend(query, key, value, 130, kernel=kernel, threads=1)
        for threads in (2, 3):
            assert torch.equal(attend(query, key, value, 130, kernel=kernel, threads=threads), together)
        for first, last in ((0, 1), (1, 12), (12, 44), (44, 70)):
            assert torch.equal(attend(query[first:last], key, value, 130, kernel=kernel), together[first:last])
        alone = attend(query[:, :3], key[:, :1].contiguous(), value[:, :1].contiguous(), 130, kernel=kernel)
        assert torch.equal(alone, together[:, :3])
        assert attend(query[:0], key, value, 130, kernel=kernel).shape == (0, 6, 72)


def test_large_and_equal_scores(library: Library) -> None:
    query, key, value = inputs(9, 50, 2, 2, 64)
    for kernel in kernels_of(library):
        loud = attend(query * 512, key, value, 50, kernel=kernel)
        assert relative_error(loud, exact(query * 512, key, value)) < ROUNDING
        flat = attend(query * 0, key, value, 50, kernel=kernel)
        mean = value.double().mean(0).repeat_interleave(2, dim=0).expand_as(flat)
        assert bool(((flat.double() - mean).abs() <= ROUNDING * value.double().abs().mean(0).max()).all())


@pytest.mark.parametrize("damage", [float("nan"), -float("nan"), float("inf")])
def test_damage_shows_where_it_is_used_and_nowhere_else(library: Library, damage: float) -> None:
    query, key, value = inputs(5, 40, 2, 2, 64)
    for kernel in kernels_of(library):
        sound = attend(query, key, value, 40, kernel=kernel)
        token, seen = query.clone(), key.clone()
        token[2, 1, 3], seen[39, 1, 5] = damage, damage
        found = attend(token, key, value, 40, kernel=kernel)
        assert not found[2, 1].isfinite().any()
        found[2, 1] = sound[2, 1]
        assert torch.equal(found, sound)
        found = attend(query, seen, value, 40, kernel=kernel)
        assert torch.equal(found[:, :2], sound[:, :2])
        if damage != damage:
            assert found[:, 2:].isnan().all()


Q, K, V = inputs(3, 10, 2, 2, 16)


@pytest.mark.parametrize(
    ("query", "key", "value", "seen", "told"),
    [
        (Q.float(), K, V, 10, r"query is float32 \[3, 4, 16\]"),
        (Q, K[..., :15], V, 10, r"key is bfloat16 \[10, 2, 15\], wanted bfloat16 \[S, kv_heads, 16\]"),
        (Q, K, V.float(), 10, "value is float32"),
        (Q, K[::2], V[::2], 5, "not contiguous"),
        (Q, K, V[:9], 9, "wanted one shape"),
        (Q[:, :3], K, V, 10, "a divisor of 3"),
        (Q, K, V, 11, "11 positions are to be seen, wanted 1 to 10"),
        (Q, K, V, 0, "0 positions"),
        (Q, K.to("meta"), V, 10, "tensors are on cpu, meta"),
    ],
)
def test_what_does_not_fit_is_refused(
    library: Library, query: Tensor, key: Tensor, value: Tensor, seen: int, told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        attend(query, key, value, seen, kernel=choose(library, "auto"))


def test_who_is_served(library: Library) -> None:
    with patch.dict(serves_attention.__globals__, status=lambda: choose(library, "auto")):
        assert serves_attention(Q, K, V)
        assert serves_attention(Q[:, ::2], K, V)
        assert not serves_attention(Q.float(), K, V)
        assert not serves_attention(Q, K[::2], V)
        learning = K.clone().requires_grad_()
        assert not serves_attention(Q, learning, V)
        with torch.no_grad():
            assert serves_attention(Q, learning, V)
    with patch.dict(serves_attention.__globals__, status=lambda: choose(library, "off")):
        assert not serves_attention(Q, K, V)
