"""The grouped kernels compile for every GPU they are meant for, into what makes them fast; no GPU takes part."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from offload_engine.kernels import grouped

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

CAPABILITIES = (80, 86, 89, 90, 120)
FORMS = {"bf16": ("bf16", "bf16", 0), "int8": ("i8", "fp32", 1), "int4": ("u8", "bf16", 128)}
"""Dtypes of values and scales; group."""
POINTERS = dict.fromkeys(("order", "tile_experts", "tile_rows", "starts", "places"), "*i64") | {"slots": "*i32"}
MINI = {"choices": 8, "depth": 2048, "width": 512}
"""LLaDA2.0-mini: experts of [512, 2048], 8 to a token."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel: str, capability: int, types: dict[str, str], constants: dict[str, int]) -> str:
    """The PTX, once ptxas has taken it too."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function: Any = getattr(grouped._kernels(), kernel)
    places = {name: (function.arg_names.index(name),) for name in (*types, *constants)}
    source = ASTSource(
        function,
        signature={name: types.get(name, "constexpr") for name in function.arg_names},
        constexprs={places[name]: value for name, value in constants.items()},
        attrs={places[name]: [["tt.divisibility", 16]] for name in types},
    )
    target = GPUTarget("cuda", capability, 32)
    assembly = triton.compile(source, target=target, options={"enable_fp_fusion": True}).asm
    assert len(assembly["cubin"]) > 0
    return str(assembly["ptx"])


def product(kernel: str, capability: int, form: str, shape: dict[str, int], **activations: str) -> str:
    values, scales, group = FORMS[form]
    constants = {
        **shape,
        "group": group,
        "aligned": grouped.ALIGNMENT,
        "block_rows": 16,
        "block_columns": 64,
        "block_depth": grouped.block_depth(group),
    }
    types = {**activations, **POINTERS, "values": f"*{values}", "scales": f"*{scales}", "slab_bytes": "i32"}
    return compiled(kernel, capability, types, constants)


def check_fast(ptx: str) -> None:
    assert "mma.sync" in ptx or "wgmma" in ptx, "products run on the tensor cores"
    assert "cp.async.cg.shared.global" in ptx, "weights come 16 bytes at a time, ahead of their use"
    assert "ld.global.b8" not in ptx, "and not one by one"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_gate_and_up(capability: int, form: str) -> None:
    check_fast(product("gate_up", capability, form, MINI, hidden="*bf16", inner="*bf16"))


@pytest.mark.parametrize("form", FORMS)
def test_down(form: str) -> None:
    shape = {"depth": 512, "width": 2048}
    check_fast(product("down", 89, form, shape, inner="*fp16", outputs="*fp16"))


def test_float32_is_not_rounded_to_less() -> None:
    types = {**POINTERS, "hidden": "*fp32", "inner": "*fp32", "values": "*fp32", "scales": "*fp32", "slab_bytes": "i32"}
    blocks = {"block_rows": 16, "block_columns": 64, "block_depth": 64}
    ptx = compiled("gate_up", 89, types, {**MINI, "group": 0, "aligned": grouped.ALIGNMENT, **blocks})
    assert "fma.rn.f32" in ptx
    assert "tf32" not in ptx


def test_the_grouping() -> None:
    sizes = {"rows": "i32", "experts": "i32"}
    assert compiled("sort_rows", 89, {"chosen": "*i64", "order": "*i64", **sizes}, {"block": 64})
    tables = dict.fromkeys(("chosen", "starts", "tile_experts", "tile_rows"), "*i64")
    blocks = {"block_rows": 16, "block_experts": 512, "block": 32}
    assert compiled("cut_tiles", 89, {**tables, **sizes, "tiles": "i32"}, blocks)


def test_the_weighted_sum() -> None:
    types = {"outputs": "*bf16", "chosen": "*i64", "weights": "*fp32", "out": "*bf16"}
    ptx = compiled("weighted_sum", 89, types, {"choices": 8, "width": 2048, "block": 1024})
    assert "ld.global.v4.b32" in ptx, "rows come 16 bytes at a time"
