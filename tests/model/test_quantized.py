"""Rounding to 8 and 4 bits, and back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine import kernels
from offload_engine.model.moe import ExpertWeights, expert_ffn
from offload_engine.model.quantized import (
    ExpertFormat,
    QuantizedMatrix,
    fitting_group,
    quantize_int4,
    quantize_int8,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def drawn(rows: int, columns: int, seed: int, dtype: torch.dtype, scale: float) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 999), st.sampled_from(DTYPES), st.sampled_from([1e-3, 5]))
@settings(max_examples=60)
def test_int8_is_within_half_a_step_of_its_row(rows, columns, seed, dtype, scale):
    matrix = drawn(rows, columns, seed, dtype, scale)
    found = quantize_int8(matrix)
    assert (found.values.dtype, found.values.shape) == (torch.int8, (rows, columns))
    assert (found.scales.dtype, found.scales.shape) == (torch.float32, (rows,))
    assert (found.shape, found.group) == ((rows, columns), columns)
    torch.testing.assert_close(found.scales, matrix.float().abs().amax(dim=1) / 127)
    error = (found.dequantize(torch.float32) - matrix.float()).abs()
    assert bool((error <= found.scales.unsqueeze(1) * 0.5001).all())


@given(st.integers(1, 9), st.sampled_from([2, 8, 32]), st.integers(1, 5), st.integers(0, 999), st.sampled_from(DTYPES))
@settings(max_examples=60)
def test_int4_is_within_a_step_of_its_group(rows, group, groups, seed, dtype):
    matrix = drawn(rows, group * groups, seed, dtype, 0.7)
    found = quantize_int4(matrix, group)
    assert (found.values.dtype, found.values.shape) == (torch.uint8, (rows, group * groups // 2))
    assert (found.scales.dtype, found.scales.shape) == (torch.bfloat16, (rows, groups))
    assert (found.shape, found.group) == ((rows, group * groups), group)
    steps = found.scales.float().abs().repeat_interleave(group, dim=1)
    error = (found.dequantize(torch.float32) - matrix.float()).abs()
    # Half a step, but for what lies opposite of the extreme: 7 stands for all that is above 7.
    assert bool((error <= steps * 1.05).all())
    inside = matrix.float() / found.scales.float().repeat_interleave(group, dim=1) <= 7.5
    assert bool((error <= steps * 0.5001)[inside].all())


def test_where_a_nibble_lies():
    """The value of column i of a group of g is in byte i, low; that of column i + g/2 in the same byte, high."""
    matrix = torch.tensor([[-8.0, 1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 16, 2, -2, 14]])
    found = quantize_int4(matrix, 8)
    assert found.scales.tolist() == [[1.0], [-2.0]]
    assert found.values[0].tolist() == [0x0 | 0xC << 4, 0x9 | 0xD << 4, 0xA | 0xE << 4, 0xB | 0xF << 4]
    assert found.values[1].tolist() == [0x8 | 0x0 << 4, 0x8 | 0x7 << 4, 0x8 | 0x9 << 4, 0x8 | 0x1 << 4]
    assert torch.equal(found.dequantize(torch.float32), matrix)
    two = quantize_int4(matrix[:1], 4)
    assert two.values[0, 0] & 0xF == 0
    assert two.scales.shape == (1, 2)


def test_the_extreme_to_minus_8_beats_its_magnitude_to_7():
    groups = drawn(256, 2048, 3, torch.float32, 1.0)
    limit = groups.view(256, -1, 32).abs().amax(dim=2, keepdim=True) / 7
    plain = ((groups.view(256, -1, 32) / limit).round() * limit).view(256, 2048)
    ours = quantize_int4(groups, 32).dequantize(torch.float32)
    assert (ours - groups).norm() < 0.9 * (plain - groups).norm()


@pytest.mark.parametrize("quantize", [quantize_int8, lambda matrix: quantize_int4(matrix, 4)])
def test_zeros_stay_zeros_and_what_is_not_finite_is_refused(quantize):
    assert not quantize(torch.zeros(3, 8)).dequantize(torch.bfloat16).any()
    tiny = torch.full((1, 8), 1e-45)
    assert bool(quantize(tiny).dequantize(torch.float32).isfinite().all())
    for bad in (float("nan"), float("inf")):
        matrix = torch.zeros(3, 8)
        matrix[1, 5] = bad
        with pytest.raises(ValueError, match="not finite"):
            quantize(matrix)


def test_groups_that_do_not_divide_the_columns_are_refused():
    for group in (0, 1, 3, 16):
        with pytest.raises(ValueError, match=f"group is {group}"):
            quantize_int4(torch.zeros(2, 24), group)


@given(st.integers(2, 300), st.integers(1, 64), st.integers(1, 64))
def test_the_group_is_the_largest_power_of_two_that_fits(wanted, one, other):
    found = fitting_group(wanted, one, other)
    fits = [size for size in (2**power for power in range(9)) if size <= wanted and one % size == other % size == 0]
    assert found == max(fits)


def test_formats_have_names():
    assert str(ExpertFormat(torch.bfloat16)) == "bfloat16"
    assert str(ExpertFormat(torch.bfloat16, 8)) == "int8"
    assert str(ExpertFormat(torch.bfloat16, 4, 32)) == "int4 (groups of 32)"
    assert [ExpertFormat(torch.float32, bits).itemsize for bits in (None, 8, 4)] == [4, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantize", [quantize_int8, lambda matrix: quantize_int4(matrix, 8)])
@pytest.mark.usefixtures("torch_computes")
def test_an_expert_computes_with_its_dequantised_weights(dtype, quantize):
    gate, up, down = (quantize(drawn(*shape, 1, torch.float32, 0.3)) for shape in ((16, 32), (16, 32), (32, 16)))
    hidden = drawn(5, 32, 2, dtype, 1.0)
    plain = ExpertWeights(*(matrix.dequantize(dtype) for matrix in (gate, up, down)))
    assert isinstance(gate, QuantizedMatrix)
    found = expert_ffn(hidden, ExpertWeights(gate, up, down))
    assert torch.equal(found, expert_ffn(hidden, plain))
    wanted = F.linear(F.silu(F.linear(hidden, plain.gate)) * F.linear(hidden, plain.up), plain.down)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("quantize", [quantize_int8, lambda matrix: quantize_int4(matrix, 8)])
def test_the_kernel_takes_them_as_they_are(quantize):
    """Against float32 with the very weights; in bf16 an activation is rounded to 8 bits three times on the way."""
    if not kernels.status().variant:
        pytest.skip(kernels.status().reason)
    weights = ExpertWeights(
        *(quantize(drawn(*shape, 1, torch.float32, 0.3)) for shape in ((16, 32), (16, 32), (32, 16)))
    )
    hidden = drawn(5, 32, 2, torch.bfloat16, 1.0)
    found = expert_ffn(hidden, weights)
    assert found.dtype == torch.bfloat16
    plain = ExpertWeights(*(matrix.dequantize(torch.float32) for matrix in weights))
    torch.testing.assert_close(found.float(), expert_ffn(hidden.float(), plain), rtol=0.03, atol=0.03)
