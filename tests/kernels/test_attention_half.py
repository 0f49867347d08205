"""A layer up to its router in one call: what its parts give one by one, bit for bit, on every instruction set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.kernels import (
    AttentionHalf,
    BlockPlace,
    HalfWeights,
    Places,
    attention,
    linear,
    rms_norm,
    router_logits,
    serves_half,
    turn_heads,
)
from offload_engine.kernels import attention_half as half_of
from offload_engine.kernels.library import KernelStatus, Library, choose
from offload_engine.model.layers import rotary_angles

EPS = 1e-6
LAYERS, LAYER = 3, 1


def kernels_of(library: Library) -> list[KernelStatus]:
    return [choose(library, name) for name in library.variants]


class Case(NamedTuple):
    weights: HalfWeights
    hidden: Tensor
    heads: int
    kv_heads: int
    angles: tuple[Tensor, Tensor]

    @property
    def half(self) -> AttentionHalf:
        half = AttentionHalf.of(self.weights, self.heads, self.kv_heads, EPS)
        assert half is not None
        return half


def case(
    tokens: int,
    *,
    shared: int = 2,
    kv_heads: int = 2,
    dim: int = 16,
    width: int = 70,
    experts: int = 9,
    bias: bool = False,
    normed: bool = True,
    seed: int = 0,
) -> Case:
    drawn = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn).bfloat16()

    heads = shared * kv_heads
    outputs = (heads + 2 * kv_heads) * dim
    weights = HalfWeights(
        norm=random(width),
        projection=random(outputs, width) / 8,
        projection_bias=random(outputs) if bias else None,
        query_norm=random(dim) if normed else None,
        key_norm=random(dim) if normed else None,
        dense=random(width, heads * dim) / 8,
        dense_bias=random(width) if bias else None,
        next_norm=random(width),
        router=random(experts, width).float() if experts else None,
    )
    angles = rotary_angles(torch.arange(seed, seed + tokens), dim // 2 // 2 * 2 or 2, 1e4, torch.bfloat16)
    return Case(weights, random(tokens, width), heads, kv_heads, angles)


def cache_of(positions: int, given: Case, seed: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    shape = (LAYERS, positions, given.kv_heads, given.half.head_dim)
    return torch.randn(shape, generator=drawn).bfloat16(), torch.randn(shape, generator=drawn).bfloat16()


def one_by_one(given: Case, blocks: Sequence[BlockPlace], kernel: KernelStatus) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels that there are for each part."""
    weights, hidden, half = given.weights, given.hidden, given.half
    fused = linear(
        rms_norm(hidden, weights.norm, EPS, kernel=kernel), weights.projection, weights.projection_bias, kernel=kernel
    )
    fused = fused.view(len(hidden), -1, half.head_dim)
    norms = None if weights.query_norm is None or weights.key_norm is None else (weights.query_norm, weights.key_norm)
    turn_heads(fused, given.kv_heads, given.angles, norms, EPS, kernel=kernel)
    rows = fused.split([block.tokens for block in blocks])
    for block, own in zip(blocks, rows, strict=True):
        end = block.start + block.tokens
        block.keys[LAYER, block.start : end] = own[:, given.heads : given.heads + given.kv_heads]
        block.values[LAYER, block.start : end] = own[:, given.heads + given.kv_heads :]
    attended = [
        attention(
            own[:, : given.heads], block.keys[LAYER], block.values[LAYER], block.start + block.tokens, kernel=kernel
        )
        for block, own in zip(blocks, rows, strict=True)
    ]
    out = linear(torch.cat(attended).flatten(1), weights.dense, weights.dense_bias, kernel=kernel)
    stream = out + hidden
    normed = rms_norm(stream, weights.next_norm, EPS, kernel=kernel)
    if weights.router is None:
        return stream, normed, torch.empty(len(hidden), 0)
    return stream, normed, router_logits(normed, weights.router, kernel=kernel)


def held(blocks: Sequence[BlockPlace]) -> Places:
    places = Places.of(blocks)
    assert places is not None
    return places


@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    start=st.integers(0, 70),
    shared=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    dim=st.integers(2, 70),
    width=st.integers(1, 300),
    experts=st.integers(0, 60),
    bias=st.booleans(),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_what_its_parts_give(
    library: Library,
    sizes: list[int],
    start: int,
    shared: int,
    kv_heads: int,
    dim: int,
    width: int,
    experts: int,
    bias: bool,
    normed: bool,
    seed: int,
) -> None:
    options = {"shared": shared, "kv_heads": kv_heads, "dim": dim, "width": width, "experts": experts}
    given = case(sum(sizes), **options, bias=bias, normed=normed, seed=seed)
    kept, other = cache_of(start + sum(sizes) + 3, given, 1), cache_of(90, given, 2)
    for kernel in kernels_of(library):
        found_caches, wanted_caches = ([[part.clone() for part in one] for one in (kept, other)] for _ in range(2))
        found = half_of(
            given.half, held(blocks_of(sizes, start, found_caches)), LAYER, given.hidden, given.angles, kernel=kernel
        )
        wanted = one_by_one(given, blocks_of(sizes, start, wanted_caches), kernel)
        assert all(map(torch.equal, found, wanted))
        for mine, its in zip(found_caches, wanted_caches, strict=True):
            assert all(map(torch.equal, mine, its)), "keys and values, those of other layers and positions too"


def blocks_of(sizes: list[int], start: int, caches: Sequence[Sequence[Tensor]]) -> list[BlockPlace]:
    """Blocks one behind the other in the first cache, but the last of several, which is in the other."""
    (keys, values), (other_keys, other_values) = caches
    blocks = []
    for size in sizes:
        blocks.append(BlockPlace(keys, values, start, size))
        start += size
    if len(sizes) > 1:
        blocks[-1] = BlockPlace(other_keys, other_values, 5, sizes[-1])
    return blocks


def test_a_layer_of_the_size_of_a_models(library: Library) -> None:
    given = case(64, shared=4, kv_heads=4, dim=128, width=2048, experts=256)
    caches = [cache_of(200, given, seed) for seed in (1, 2)]
    for kernel in kernels_of(library):
        wanted = one_by_one(given, blocks_of([32, 32], 96, caches), kernel)
        for threads in (1, 2, 3):
            places = held(blocks_of([32, 32], 96, [[part.clone() for part in one] for one in caches]))
            found = half_of(given.half, places, LAYER, given.hidden, given.angles, kernel=kernel, threads=threads)
            assert all(map(torch.equal, found, wanted)), "whatever the number of threads"


GIVEN = case(4)
KEYS, VALUES = cache_of(8, GIVEN, 1)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm": torch.ones(69).bfloat16()}, r"norm is \[69\], wanted \[70\]"),
        ({"projection_bias": torch.ones(1).bfloat16()}, r"projection_bias is \[1\], wanted \[128\]"),
        ({"query_norm": torch.ones(15).bfloat16()}, r"query_norm is \[15\], wanted \[16\]"),
        ({"key_norm": None}, "both or neither"),
        ({"dense": torch.ones(70, 63).bfloat16()}, r"dense is \[70, 63\], wanted \[70, 64\]"),
        ({"router": torch.ones(9, 71)}, r"router is \[9, 71\], wanted \[9, 70\]"),
    ],
)
def test_weights_that_do_not_fit_each_other_are_refused(changes: dict[str, Tensor | None], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        AttentionHalf.of(GIVEN.weights._replace(**changes), GIVEN.heads, GIVEN.kv_heads, EPS)


def test_weights_of_another_kind_are_left_to_others() -> None:
    for changes in (
        {"norm": GIVEN.weights.norm.float()},
        {"projection": GIVEN.weights.projection.T.contiguous().T},
        {"router": torch.ones(9, 70).bfloat16()},
        {"dense": GIVEN.weights.dense.to("meta")},
    ):
        assert AttentionHalf.of(GIVEN.weights._replace(**changes), GIVEN.heads, GIVEN.kv_heads, EPS) is None
    assert AttentionHalf.of(case(1, dim=514).weights, 4, 2, EPS) is None, "wider heads than the kernel has room for"


def test_places_outside_a_cache_are_refused() -> None:
    for start, tokens in ((5, 4), (-1, 4), (0, 0)):
        with pytest.raises(ValueError, match=f"a block of {tokens} at {start} is not within 8 positions"):
            Places.of([BlockPlace(KEYS, VALUES, start, tokens)])
    with pytest.raises(ValueError, match="wanted both"):
        Places.of([BlockPlace(KEYS, VALUES[:, :7].contiguous(), 0, 4)])
    for odd in (KEYS.float(), KEYS[:, ::2], KEYS.to("meta")):
        assert Places.of([BlockPlace(odd, odd, 0, 1)]) is None
    assert Places.of([]) is None


@pytest.mark.parametrize(
    ("layer", "hidden", "angles", "told"),
    [
        (3, GIVEN.hidden, GIVEN.angles, "layer 3 of a cache of 3"),
        (-1, GIVEN.hidden, GIVEN.angles, "layer -1"),
        (0, GIVEN.hidden[:3], GIVEN.angles, r"hidden is bfloat16 \[3, 70\], wanted contiguous bfloat16 \[4, 70\]"),
        (0, GIVEN.hidden.float(), GIVEN.angles, "hidden is float32"),
        (0, torch.ones(70, 4).bfloat16().T, GIVEN.angles, "not contiguous, wanted"),
        (0, GIVEN.hidden, (GIVEN.angles[0][:3], GIVEN.angles[1][:3]), r"angles are bfloat16 \[3, 8\]"),
        (0, GIVEN.hidden, (GIVEN.angles[0], GIVEN.angles[1].float()), "and float32"),
        (0, GIVEN.hidden, rotary_angles(torch.arange(4), 18, 1e4, torch.bfloat16), "at most 16"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    library: Library, layer: int, hidden: Tensor, angles: tuple[Tensor, Tensor], told: str
) -> None:
    places = held([BlockPlace(KEYS, VALUES, 0, 4)])
    with pytest.raises(ValueError, match=told):
        half_of(GIVEN.half, places, layer, hidden, angles, kernel=choose(library, "auto"))


def test_a_cache_of_other_heads_is_refused(library: Library) -> None:
    wide = torch.zeros(LAYERS, 8, 2, 32).bfloat16()
    with pytest.raises(ValueError, match=r"heads \[2, 32\], wanted \[2, 16\]"):
        half_of(
            GIVEN.half,
            held([BlockPlace(wide, wide, 0, 4)]),
            0,
            GIVEN.hidden,
            GIVEN.angles,
            kernel=choose(library, "auto"),
        )


def test_who_is_served(library: Library) -> None:
    with patch.dict(serves_half.__globals__, status=lambda: choose(library, "auto")), torch.no_grad():
        assert serves_half(GIVEN.hidden)
        assert not serves_half(GIVEN.hidden.float())
        assert not serves_half(GIVEN.hidden[None])
        assert not serves_half(GIVEN.hidden.T)
        assert not serves_half(GIVEN.hidden.to("meta"))
        with torch.enable_grad():
            assert not serves_half(GIVEN.hidden)
    with patch.dict(serves_half.__globals__, status=lambda: choose(library, "off")), torch.no_grad():
        assert not serves_half(GIVEN.hidden)
