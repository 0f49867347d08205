"""Traces, machines and models small enough to reckon with."""

from __future__ import annotations

from typing import Any

from offload_engine.core import Phase
from offload_engine.simulate.profile import HOST, LINK, UNITS, Profile
from offload_engine.simulate.timing import ModelShape
from offload_engine.trace import TraceRecord

SHAPE = ModelShape(
    layers=3,
    moe_layers=2,
    hidden=10,
    heads=2,
    kv_heads=1,
    head_dim=5,
    dense_width=20,
    expert_width=10,
    shared_width=0,
    num_experts=8,
    top_k=2,
    vocabulary=100,
    expert_bytes=600,
)


def record(layer: int, experts: tuple[int, ...] = (0, 1), /, **place: Any) -> TraceRecord:
    values: dict[str, Any] = {"phase": Phase.DENOISE, "sequence": 0, "block": 0, "step": 0}
    scores = tuple(float(len(experts) - rank) for rank in range(len(experts)))
    return TraceRecord(**values | place, layer=layer, experts=experts, scores=scores)


def steps(*wanted: tuple[int, ...], block: int = 0, sequence: int = 0) -> list[TraceRecord]:
    """One denoising step for each of `wanted`, which both layers, 1 and 2, want."""
    return [
        record(layer, experts, block=block, step=number, sequence=sequence)
        for number, experts in enumerate(wanted)
        for layer in (1, 2)
    ]


def machine(device: str = "cuda", **values: float) -> Profile:
    """Every figure 0 or, where that is refused, 1; a roofline."""
    figures: dict[str, Any] = {}
    for name, unit in UNITS.items():
        if device == "cuda" or name not in (*LINK, *HOST):
            figures[name] = {"value": 0.0 if unit == "s" else 1.0, "unit": unit, "source": "made up"}
    figures |= {name: figures[name] | {"value": value} for name, value in values.items()}
    return Profile(name="abacus", title="an abacus", device=device, **figures)
