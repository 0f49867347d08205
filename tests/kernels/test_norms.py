"""RMS norms and the turning of heads in C: what torch computes, on every instruction set that this machine has."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.kernels import norms, rms_norm, serves_heads, serves_norm, turn_heads
from offload_engine.kernels.library import KernelStatus, Library, choose
from offload_engine.model.layers import rotary_angles, rotate

EPS = 1e-6


def kernels_of(library: Library) -> list[KernelStatus]:
    return [choose(library, name) for name in library.variants]


def torch_norm(x: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    """As `RMSNorm` computes it without a kernel."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)).to(x.dtype)


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """bf16, whose squares sum exactly in whatever order."""
    return torch.randint(-15, 16, shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def differing(found: Tensor, wanted: Tensor) -> float:
    """The share of elements that differ; none by more than the step between neighbouring bf16."""
    torch.testing.assert_close(found.float(), wanted.float(), rtol=2.0**-6, atol=2.0**-16)
    return float((found != wanted).float().mean())


@given(rows=st.integers(1, 20), columns=st.integers(1, 300), seed=st.integers(0, 99))
def test_the_norm_is_torchs_bit_for_bit_where_the_sum_of_squares_is_exact(
    library: Library, rows: int, columns: int, seed: int
) -> None:
    x, weight = whole_numbers(rows, columns, seed=seed), random(columns, seed=seed)
    wanted = torch_norm(x, weight)
    for kernel in kernels_of(library):
        assert torch.equal(rms_norm(x, weight, EPS, kernel=kernel), wanted)


@pytest.mark.parametrize("columns", [128, 2048, 4096, 2050])
def test_rounding_of_the_sum_hardly_ever_shows(library: Library, columns: int) -> None:
    x, weight = random(64, columns), random(columns, seed=1)
    found = [rms_norm(x, weight, EPS, kernel=kernel) for kernel in kernels_of(library)]
    assert differing(found[0], torch_norm(x, weight)) < 1e-3
    assert all(torch.equal(other, found[0]) for other in found)


def test_neither_threads_nor_neighbours_show_in_a_norm(library: Library) -> None:
    x, weight = random(37, 200), random(200, seed=1)
    for kernel in kernels_of(library):
        together = rms_norm(x, weight, EPS, kernel=kernel, threads=1)
        for threads in (2, 3):
            assert torch.equal(rms_norm(x, weight, EPS, kernel=kernel, threads=threads), together)
        for first, last in ((0, 1), (1, 6), (6, 37)):
            assert torch.equal(rms_norm(x[first:last], weight, EPS, kernel=kernel), together[first:last])
        assert torch.equal(rms_norm(x[None], weight, EPS, kernel=kernel), together[None])
        assert rms_norm(x[:0], weight, EPS, kernel=kernel).shape == (0, 200)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damage_shows_in_its_row_alone(library: Library, damage: float) -> None:
    x, weight = random(5, 70), random(70, seed=1)
    damaged = x.clone()
    damaged[2, 69] = damage
    for kernel in kernels_of(library):
        found, sound = (rms_norm(rows, weight, EPS, kernel=kernel) for rows in (damaged, x))
        torch.testing.assert_close(found, torch_norm(damaged, weight), equal_nan=True)
        assert torch.equal(found[[0, 1, 3, 4]], sound[[0, 1, 3, 4]])


def torch_heads(
    fused: Tensor, kv_heads: int, angles: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor] | None
) -> Tensor:
    heads = fused.shape[-2] - 2 * kv_heads
    query, key, value = fused.split((heads, kv_heads, kv_heads), dim=-2)
    if weights is not None:
        query, key = torch_norm(query, weights[0]), torch_norm(key, weights[1])
    return torch.cat((rotate(query, *angles), rotate(key, *angles), value), dim=-2)


def turned(
    fused: Tensor,
    kv_heads: int,
    angles: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor] | None,
    kernel: KernelStatus,
    threads: int | None = None,
) -> Tensor:
    out = fused.clone()
    turn_heads(out, kv_heads, angles, weights, EPS, kernel=kernel, threads=threads)
    return out


@given(
    tokens=st.integers(1, 12),
    heads=st.integers(0, 5),
    kv_heads=st.integers(0, 3),
    half=st.integers(1, 40),
    rest=st.integers(0, 60),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_heads_are_torchs_bit_for_bit_where_the_sum_of_squares_is_exact(
    library: Library, tokens: int, heads: int, kv_heads: int, half: int, rest: int, normed: bool, seed: int
) -> None:
    dim = 2 * half + rest
    fused = whole_numbers(tokens, heads + 2 * kv_heads, dim, seed=seed)
    angles = rotary_angles(torch.arange(seed, seed + tokens), 2 * half, 1e4, torch.bfloat16)
    weights = (random(dim, seed=1), random(dim, seed=2)) if normed else None
    wanted = torch_heads(fused, kv_heads, angles, weights)
    for kernel in kernels_of(library):
        assert torch.equal(turned(fused, kv_heads, angles, weights, kernel), wanted)


def test_heads_of_a_model(library: Library) -> None:
    fused = random(2, 33, 24, 128)
    angles = rotary_angles(torch.arange(66).view(2, 33), 64, 6e5, torch.bfloat16)
    weights = random(128, seed=1), random(128, seed=2)
    found = [turned(fused, 4, angles, weights, kernel) for kernel in kernels_of(library)]
    assert differing(found[0], torch_heads(fused, 4, angles, weights)) < 1e-3
    assert all(torch.equal(other, found[0]) for other in found)


def test_neither_threads_nor_neighbours_show_in_heads(library: Library) -> None:
    fused, weights = random(33, 8, 64), (random(64, seed=1), random(64, seed=2))
    cos, sin = rotary_angles(torch.arange(33), 32, 1e4, torch.bfloat16)
    for kernel in kernels_of(library):
        together = turned(fused, 2, (cos, sin), weights, kernel, threads=1)
        for threads in (2, 3):
            assert torch.equal(turned(fused, 2, (cos, sin), weights, kernel, threads), together)
        for first, last in ((0, 1), (1, 6), (6, 33)):
            part = turned(fused[first:last], 2, (cos[first:last], sin[first:last]), weights, kernel)
            assert torch.equal(part, together[first:last])


X, W = random(4, 16), random(16)
COS, SIN = rotary_angles(torch.arange(4), 8, 1e4, torch.bfloat16)
FUSED = random(4, 5, 16)


@pytest.mark.parametrize(
    ("x", "weight", "told"),
    [
        (X.float(), W, r"x is float32 \[4, 16\]"),
        (X, W[:15], r"weight bfloat16 \[15\]"),
        (X.T, W[:4], "wanted contiguous"),
        (X.to("meta"), W, "on the CPU"),
        (X[:, :0], W[:0], r"\[0\], wanted"),
    ],
)
def test_norms_that_do_not_fit_are_refused(library: Library, x: Tensor, weight: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rms_norm(x, weight, EPS, kernel=choose(library, "auto"))


@pytest.mark.parametrize(
    ("fused", "kv_heads", "angles", "weights", "told"),
    [
        (FUSED.float(), 1, (COS, SIN), (W, W), "wanted contiguous bfloat16"),
        (FUSED, 3, (COS, SIN), (W, W), r"heads \+ 2 \* 3"),
        (random(4, 5, 514), 1, (COS, SIN), None, "d at most 512"),
        (FUSED, 1, (COS[:3], SIN[:3]), (W, W), r"angles are bfloat16 \[3, 8\]"),
        (FUSED, 1, (COS, SIN[:3]), (W, W), "angles are"),
        (FUSED, 1, (random(4, 7), random(4, 7)), (W, W), "angles are"),
        (FUSED, 1, (random(4, 18), random(4, 18)), (W, W), "angles are"),
        (FUSED, 1, (COS, SIN), (W, W[:8]), r"norms are bfloat16 \[16\], bfloat16 \[8\]"),
    ],
)
def test_heads_that_do_not_fit_are_refused(
    library: Library,
    fused: Tensor,
    kv_heads: int,
    angles: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor] | None,
    told: str,
) -> None:
    with pytest.raises(ValueError, match=told):
        turn_heads(fused, kv_heads, angles, weights, EPS, kernel=choose(library, "auto"))


def test_who_is_served(library: Library) -> None:
    learning = W.clone().requires_grad_()
    with patch.object(norms, "status", lambda: choose(library, "auto")):
        assert serves_norm(X, W)
        assert not serves_norm(X.float(), W)
        assert not serves_norm(X, W.float())
        assert not serves_norm(X, learning)
        assert serves_heads(FUSED, COS, SIN, W, W)
        assert serves_heads(FUSED, COS, SIN)
        assert not serves_heads(FUSED, COS[:3], SIN[:3])
        assert not serves_heads(FUSED, COS, SIN, W, learning)
        assert not serves_heads(random(4, 5, 514), COS, SIN)
        assert not serves_heads(FUSED.float(), COS, SIN)
        with torch.no_grad():
            assert serves_norm(X, learning)
            assert serves_heads(FUSED, COS, SIN, W, learning)
    with patch.object(norms, "status", lambda: choose(library, "off")):
        assert not serves_norm(X, W)
        assert not serves_heads(FUSED, COS, SIN)
