"""A router's logits in C, on every instruction set that this machine has."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.kernels import router, router_logits, serves_router
from offload_engine.kernels.library import KernelStatus, Library, choose


def kernels_of(library: Library) -> list[KernelStatus]:
    return [choose(library, name) for name in library.variants]


def inputs(tokens: int, columns: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=drawn).bfloat16(), torch.randn(experts, columns, generator=drawn)


def in_order(hidden: Tensor, weight: Tensor) -> Tensor:
    """The same sums in float32, column by column."""
    total = torch.zeros(hidden.shape[0], weight.shape[0])
    for run, weights in zip(hidden.float().split(256, dim=1), weight.split(256, dim=1), strict=True):
        part = torch.zeros_like(total)
        for x, w in zip(run.T, weights.T, strict=True):
            part += x[:, None] * w
        total += part
    return total


@given(tokens=st.integers(1, 140), columns=st.integers(1, 600), experts=st.integers(1, 110), seed=st.integers(0, 99))
def test_any_shape(library: Library, tokens: int, columns: int, experts: int, seed: int) -> None:
    hidden, weight = inputs(tokens, columns, experts, seed)
    exact = F.linear(hidden.double(), weight.double())
    found = [router_logits(hidden, weight, kernel=kernel) for kernel in kernels_of(library)]
    bound = F.linear(hidden.double().abs(), weight.double().abs()) * (columns + 1) * 2.0**-23
    assert bool(((found[0].double() - exact).abs() <= bound).all())
    assert all(torch.equal(other, found[0]) for other in found)


@pytest.mark.parametrize(("tokens", "columns", "experts"), [(3, 5, 2), (17, 700, 11), (66, 256, 9)])
def test_every_instruction_set_sums_in_the_order_of_the_columns(
    library: Library, tokens: int, columns: int, experts: int
) -> None:
    hidden, weight = inputs(tokens, columns, experts)
    for kernel in kernels_of(library):
        assert torch.equal(router_logits(hidden, weight, kernel=kernel), in_order(hidden, weight))


def test_it_errs_hardly_more_than_torch(library: Library) -> None:
    hidden, weight = inputs(64, 2048, 256)
    exact = F.linear(hidden.double(), weight.double())
    ours = (router_logits(hidden, weight, kernel=choose(library, "auto")) - exact).norm()
    torchs = (F.linear(hidden.float(), weight) - exact).norm()
    assert ours < 1.5 * torchs


def test_neither_threads_nor_neighbours_show_in_a_token(library: Library) -> None:
    hidden, weight = inputs(150, 300, 100)
    for kernel in kernels_of(library):
        together = router_logits(hidden, weight, kernel=kernel, threads=1)
        for threads in (2, 3):
            assert torch.equal(router_logits(hidden, weight, kernel=kernel, threads=threads), together)
        for first, last in ((0, 1), (1, 18), (18, 82), (82, 150)):
            assert torch.equal(router_logits(hidden[first:last], weight, kernel=kernel), together[first:last])
        for experts in (1, 7, 49):
            assert torch.equal(router_logits(hidden, weight[:experts], kernel=kernel), together[:, :experts])
        assert router_logits(hidden[:0], weight, kernel=kernel).shape == (0, 100)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damage_shows_where_it_is_used_and_nowhere_else(library: Library, damage: float) -> None:
    hidden, weight = inputs(7, 70, 50)
    for kernel in kernels_of(library):
        sound = router_logits(hidden, weight, kernel=kernel)
        damaged = hidden.clone()
        damaged[2, 3] = damage
        found = router_logits(damaged, weight, kernel=kernel)
        assert not found[2].isfinite().any()
        assert torch.equal(found[[0, 1, 3, 4, 5, 6]], sound[[0, 1, 3, 4, 5, 6]])


H, G = inputs(4, 16, 6)


@pytest.mark.parametrize(
    ("hidden", "weight", "told"),
    [
        (H.float(), G, r"are float32 \[4, 16\] and float32"),
        (H, G.bfloat16(), r"bfloat16 \[6, 16\]"),
        (H, G[:, :15].contiguous(), r"float32 \[6, 15\]"),
        (H, G.T, r"float32 \[16, 6\]"),
        (H, G[:, ::2], r"float32 \[6, 8\]"),
        (H[0], G, r"bfloat16 \[16\]"),
        (H, G[:0], r"float32 \[0, 16\]"),
        (H, G.to("meta"), "on the CPU"),
    ],
)
def test_what_does_not_fit_is_refused(library: Library, hidden: Tensor, weight: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        router_logits(hidden, weight, kernel=choose(library, "auto"))


def test_who_is_served(library: Library) -> None:
    learning = G.clone().requires_grad_()
    with patch.object(router, "status", lambda: choose(library, "auto")):
        assert serves_router(H, G)
        assert not serves_router(H.float(), G)
        assert not serves_router(H, G.bfloat16())
        assert not serves_router(H.T, G)
        assert not serves_router(H, learning)
        with torch.no_grad():
            assert serves_router(H, learning)
    with patch.object(router, "status", lambda: choose(library, "off")):
        assert not serves_router(H, G)
