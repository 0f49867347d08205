"""Layers that our kernel computes where it can, and torch otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F

from offload_engine.kernels import dense, ffn, status
from offload_engine.kernels.library import KernelStatus
from offload_engine.model.layers import Linear, SwiGLU

WITHOUT = KernelStatus(None, "switched off")


@pytest.fixture
def no_kernel() -> Iterator[None]:
    with patch.object(dense, "status", lambda: WITHOUT), patch.object(ffn, "status", lambda: WITHOUT):
        yield


def swiglu(dtype: torch.dtype) -> SwiGLU:
    torch.manual_seed(0)
    return SwiGLU(96, 40).to(dtype)


def by_torch(layer: SwiGLU, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (part.weight.to(x.dtype) for part in (layer.gate_proj, layer.up_proj, layer.down_proj))
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def test_float32_and_training_stay_with_torch_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = swiglu(dtype), torch.randn(5, 96, dtype=dtype)
        assert torch.equal(layer(x), by_torch(layer, x))  # gradients are wanted
        linear = Linear(96, 24).to(dtype)
        assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    with torch.inference_mode():
        layer, x = swiglu(torch.float32), torch.randn(5, 96)
        assert torch.equal(layer(x), by_torch(layer, x))


@pytest.mark.usefixtures("no_kernel")
def test_without_a_kernel_torch_computes() -> None:
    with torch.inference_mode():
        layer, x = swiglu(torch.bfloat16), torch.randn(5, 96).bfloat16()
        assert torch.equal(layer(x), by_torch(layer, x))
        linear = Linear(96, 24).bfloat16()
        wanted = F.linear(x, linear.weight, linear.bias)
        assert torch.equal(linear(x), wanted)
        assert torch.equal(linear.unrounded(x), wanted.float())


@pytest.mark.skipif(status().variant is None, reason="the kernels are not built")
def test_the_kernel_agrees_with_float64_and_rounds_less() -> None:
    with torch.inference_mode():
        layer, x = swiglu(torch.bfloat16), torch.randn(2, 7, 96).bfloat16()
        exact = by_torch(layer, x.double())
        assert (layer(x) - exact).norm() < 0.01 * exact.norm()
        linear = Linear(96, 24).bfloat16()
        exact = F.linear(x.double(), linear.weight.double(), linear.bias.double())
        assert (linear.unrounded(x) - exact).norm() < 1e-6 * exact.norm()
        assert torch.equal(linear(x), linear.unrounded(x).bfloat16())


@pytest.mark.skipif(status().variant is None, reason="the kernels are not built")
def test_weights_that_are_replaced_or_learn_after_a_first_use_are_seen() -> None:
    layer, x = swiglu(torch.bfloat16), torch.randn(5, 96).bfloat16()
    with torch.inference_mode():
        before = layer(x)
        assert torch.equal(layer(x), before)
    layer.up_proj.weight.data = layer.up_proj.weight.data * 2
    with torch.inference_mode():
        doubled = layer(x)
    torch.testing.assert_close(doubled, before * 2)
    layer.gate_proj.weight = torch.nn.Parameter(torch.zeros_like(layer.gate_proj.weight))
    with torch.inference_mode():
        assert not layer(x).any()
    with torch.no_grad():
        assert not layer(x).any()
    layer(x).sum().backward()
    assert layer.gate_proj.weight.grad is not None, "torch computes where a gradient is wanted"
    with torch.inference_mode():
        assert torch.equal(layer.float()(x.float()), by_torch(layer, x.float()))


def test_parts_are_those_that_the_module_has_now() -> None:
    layer = swiglu(torch.float32)
    first, other = layer.gate_proj, Linear(96, 40, bias=False)
    assert first is dict(layer.named_children())["gate_proj"]
    layer.gate_proj = other
    assert layer.gate_proj is other
    assert [name for name, _module in layer.named_children()] == ["gate_proj", "up_proj", "down_proj"]
    del layer.gate_proj
    assert not hasattr(layer, "gate_proj")
    with pytest.raises(AttributeError, match=r"no attribute 'gate_proj'"):
        _ = layer.gate_proj
    layer.gate_proj = first
    assert copy.deepcopy(layer).gate_proj is not first
    assert Linear(4, 4, bias=False).bias is None
    assert set(Linear(4, 4).state_dict()) == {"weight", "bias"}
