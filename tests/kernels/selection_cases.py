"""Routings to ask the kernels about, and what torch decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.kernels import selection
from offload_engine.kernels.library import KernelStatus
from offload_engine.routing import RouterShape

LLADA2 = RouterShape(256, 8, 8, 4, True, 2.5)
SHAPES = [
    LLADA2,
    RouterShape(256, 8, 1, 1, True, 1.0),
    RouterShape(16, 4, 4, 2, False, 1 / 3),
    RouterShape(12, 12, 3, 1, True, 2.0),
    RouterShape(8, 3, 8, 2, True, 0.1),
    RouterShape(6, 9, 2, 5, True, 1.0),
    RouterShape(1, 1, 1, 1, True, 1.0),
]
STRANGE = [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38, 1e-42, -1.0, 100.0]


def by(kernel: KernelStatus, call: Callable[[], Any]) -> Any:
    """What `call` gives with this kernel."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(selection, "status", lambda: kernel)
        return call()


def same(found: Tensor | None, wanted: Tensor | None) -> bool:
    """Bit for bit, but that one NaN is like another."""
    if found is None or wanted is None:
        return found is wanted
    if found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    if found.dtype != torch.float32:
        return torch.equal(found, wanted)
    bits = found.view(torch.int32) == wanted.view(torch.int32)
    return bool((bits | (found.isnan() & wanted.isnan())).all())


@st.composite
def routings(draw: st.DrawFn) -> tuple[RouterShape, Tensor, Tensor | None, Tensor]:
    """Random numbers, few distinct ones, or all equal; some strange; blocks with gaps, pads anywhere."""
    shape = draw(st.sampled_from(SHAPES))
    tokens = draw(st.integers(0, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logits = torch.randn(tokens, shape.num_experts, generator=generator) * draw(st.sampled_from([0.0, 0.1, 2.0, 30.0]))
    bias = torch.randn(shape.num_experts, generator=generator) * draw(st.sampled_from([0.0, 0.05, 1.0]))
    levels = draw(st.sampled_from([1, 4, 0]))
    if levels:
        logits, bias = (logits * levels).round() / levels, (bias * levels).round() / levels
    for values in (logits, bias):
        share = draw(st.sampled_from([0.0, 0.0, 0.02, 0.5]))
        strange = torch.tensor(draw(st.lists(st.sampled_from(STRANGE), min_size=1, max_size=3)))
        drawn = strange[torch.randint(len(strange), values.shape, generator=generator)]
        values.copy_(drawn.where(torch.rand(values.shape, generator=generator) < share, values))
    block_ids = torch.arange(tokens) // draw(st.integers(1, 40)) * draw(st.integers(1, 2))
    pads = torch.rand(tokens, generator=generator) < draw(st.sampled_from([0.0, 0.2, 1.0]))
    if draw(st.booleans()):
        block_ids = block_ids[torch.randperm(tokens, generator=generator)]
    return shape, logits, bias if draw(st.booleans()) else None, block_ids.masked_fill(pads, -1)
