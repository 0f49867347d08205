"""The reference checkpoint and its expected outputs; tests that need them skip where the folder is absent."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

CHECKPOINT = Path(__file__).parent.parent.parent / "shared" / "golden" / "llada2_tiny"

needs_golden = pytest.mark.skipif(
    not CHECKPOINT.is_dir(), reason=f"no reference checkpoint at ../shared/golden/{CHECKPOINT.name}"
)


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(CHECKPOINT / "cases.safetensors") if CHECKPOINT.is_dir() else {}


@cache
def cases() -> dict[str, Any]:
    path = CHECKPOINT / "cases.json"
    return json.loads(path.read_text()) if path.is_file() else {"forward": [], "generate": []}


def routing_options(routing: str) -> dict[str, Any]:
    """`original` or `dmoe_{p}` as engine keywords."""
    name, _, p = routing.partition("_")
    return {"routing": name, "top_p": float(p), "min_experts": 16} if p else {"routing": name}
