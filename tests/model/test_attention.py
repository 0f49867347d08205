from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.memory import footprint
from offload_engine.model import attention
from offload_engine.model.attention import grouped_attention, padded_positions, prefix_attention


@given(
    tokens=st.integers(1, 70),
    before=st.integers(0, 90),
    groups=st.integers(1, 4),
    shared=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_attention_to_a_prefix_is_attention(
    tokens: int, before: int, groups: int, shared: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(tokens, groups * shared, 16, generator=generator).to(dtype)
    stored = torch.randn(2, tokens + before + 5, groups, 16, generator=generator).to(dtype)
    key, value = stored[:, : tokens + before]
    expected = grouped_attention(query.double(), key.double(), value.double(), None)
    found = prefix_attention(query, key, value)
    assert (found.dtype, found.shape) == (dtype, query.shape)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_blocks_attention_does_not_depend_on_how_many_rows_come_with_it(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(64, heads, 16).to(dtype) for heads in (4, 2, 2))
    whole = prefix_attention(query, key, value)
    halves = torch.cat([prefix_attention(part, key, value) for part in query.split(attention.ATTENTION_ROWS)])
    torch.testing.assert_close(whole, halves, rtol=1e-5, atol=1e-6)


def test_the_plan_counts_the_rows_that_are_held_together() -> None:
    assert footprint.ATTENTION_ROWS == attention.ATTENTION_ROWS


def test_prefixes_are_padded_to_few_lengths() -> None:
    """A primitive is kept for every length, so a long answer must not bring one per block."""
    lengths = {padded_positions(end, 10_000) for end in range(32, 8192, 32)}
    assert len(lengths) <= 20
    assert all(end <= padded_positions(end, 10_000) < 1.5 * end + 1 for end in range(1, 5000))
    assert padded_positions(90, 96) == 96
    assert padded_positions(100, 100) == 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_lies_behind_the_prefix_is_not_seen(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(size, generator=generator).to(dtype) for size in ((8, 4, 16), (40, 2, 16), (40, 2, 16))
    )
    plain = prefix_attention(query, key[:33], value[:33])
    torch.testing.assert_close(prefix_attention(query, key, value, 33), plain, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(prefix_attention(query, key, value).float(), plain.float(), rtol=2e-2, atol=2e-2)
