"""The reference model's expected outputs, read once."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import GOLDEN


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "cases.safetensors") if GOLDEN.is_dir() else {}


@cache
def cases() -> dict[str, Any]:
    path = GOLDEN / "cases.json"
    return json.loads(path.read_text()) if path.is_file() else {"forward": [], "generate": []}


def routing_options(routing: str) -> dict[str, Any]:
    """`original` or `dmoe_{p}` as engine keywords."""
    name, _, p = routing.partition("_")
    return {"routing": name, "top_p": float(p), "min_experts": 16} if p else {"routing": name}


def generate_name(case: dict[str, Any]) -> str:
    """Name of a generate case's expected ids."""
    suffix = f"_eos{case['eos_id']}" if "eos_id" in case else ""
    return f"gen_{case['P']}_{case['threshold']}_{case['routing']}{suffix}"
