"""The kernels in Triton's interpreter, whose two faults that concern us are mended here."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offload_engine.kernels import grouped

INTERPRETING = os.environ.get(grouped.INTERPRETED) == "1" and importlib.util.find_spec("triton") is not None
collect_ignore_glob = ["test_compiled_*.py" if INTERPRETING else "test_interpreted_*.py"]


@pytest.fixture(autouse=True, scope="session")
def bf16_as_on_a_gpu() -> Iterator[None]:
    """Triton 3.9's interpreter keeps bf16 as bits in 16-bit integers, has `tl.dot` multiply the integers, and cuts
    bits off where a GPU rounds to the nearest.
    """
    if not INTERPRETING:
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(self: Any, operand: Any) -> Any:
        return cast(self, operand, tl.block_type(tl.float32, list(operand.data.shape)))

    def mended_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == b.dtype.scalar == tl.bfloat16:
            a, b = widened(self, a), widened(self, b)
        return dot(self, a, b, *rest)

    def mended_cast(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(rounded, tl.bfloat16)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", mended_dot)
        for name in ("cast_impl", "create_fp_trunc"):
            patch.setattr(InterpreterBuilder, name, mended_cast)
        yield
