"""The quick ways to select are the plain full sort, ties and infinities included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.routing.base import RouterShape, group_limited, max_by_block, tally, top_indices


@st.composite
def scores(draw: st.DrawFn, width: st.SearchStrategy[int]) -> Tensor:
    """[T, E] of few or many distinct values, some of them -inf."""
    rows, columns, seed = draw(st.integers(1, 30)), draw(width), draw(st.integers(0, 10_000))
    generator = torch.Generator().manual_seed(seed)
    levels = draw(st.sampled_from([1, 2, 8, 10_000]))
    drawn = torch.randint(-levels, levels + 1, (rows, columns), generator=generator) / levels
    holes = torch.rand(rows, columns, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    return drawn.masked_fill(holes, -torch.inf)


@settings(max_examples=150, deadline=None)
@given(scores(st.integers(1, 40)), st.integers(1, 45))
def test_top_indices_is_the_stable_sort(values: Tensor, k: int) -> None:
    assert torch.equal(top_indices(values, k), values.sort(dim=-1, descending=True, stable=True).indices[:, :k])


def test_one_tie_in_many_rows_is_broken_in_its_row() -> None:
    values = torch.rand(5000, 256, generator=torch.Generator().manual_seed(0))
    last = values[4321].sort(descending=True)
    values[4321, last.indices[8]] = last.values[7]  # the eighth and the ninth
    best = top_indices(values, 8)
    assert torch.equal(best, values.sort(dim=-1, descending=True, stable=True).indices[:, :8])
    assert best[4321, 7] == last.indices[7:9].min()


@settings(max_examples=100, deadline=None)
@given(scores(st.sampled_from([8, 16])), st.sampled_from([(2, 1), (4, 2), (8, 3), (1, 1), (4, 4)]))
def test_group_limiting_by_hand(values: Tensor, groups: tuple[int, int]) -> None:
    n_group, topk_group = groups
    shape = RouterShape(values.shape[1], 1, n_group, topk_group)
    size = values.shape[1] // n_group
    for row, limited in zip(values, group_limited(values, shape), strict=True):
        worth = [
            row[group * size : (group + 1) * size].sort(descending=True).values[:2].sum() for group in range(n_group)
        ]
        kept = sorted(range(n_group), key=lambda group: (-worth[group].item(), group))[:topk_group]
        expected = [x if i // size in kept else -torch.inf for i, x in enumerate(row.tolist())]
        assert limited.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(0, 1000))
def test_sums_and_maxima_by_block(tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(tokens, 6, generator=generator)
    blocks = torch.randint(-1, 4, (tokens,), generator=generator)
    named = torch.stack([torch.randperm(6, generator=generator)[:3] for _ in range(tokens)])
    named[torch.rand(tokens, 3, generator=generator) < 0.2] = -1
    sums, anyone = tally(values, named, blocks)
    largest = max_by_block(values, blocks)
    assert sums.shape == anyone.shape == largest.shape == (max(int(blocks.max()), 0) + 1, 6)
    for block in range(sums.shape[0]):
        members = [token for token in range(tokens) if blocks[token] == block]
        for expert in range(6):
            votes = [values[token, expert].item() for token in members if expert in named[token]]
            assert sums[block, expert].item() == pytest.approx(sum(votes))
            assert bool(anyone[block, expert]) == bool(votes)
            best = max((values[token, expert].item() for token in members), default=-torch.inf)
            assert largest[block, expert].item() == best
