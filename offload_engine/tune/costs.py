"""Seconds of virtual time from a machine's rates: the slower of memory and arithmetic, for each part of a layer."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_engine.errors import UsageError
from offload_engine.simulate.replay import Costs


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does per second."""

    transfer: float
    """Bytes of experts into slots."""
    memory: float
    """Bytes of weights read from fast memory."""
    flops: float
    """Operations of 16-bit products."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a model has to do in one forward of a block."""

    expert_bytes: int
    """One expert as it is moved."""
    expert_weights: int
    """Its numbers."""
    layer_bytes: float
    """Of the weights that are no experts, per MoE layer; the head's share included."""
    layer_weights: float
    block_length: int
    top_k: int


def costs_of(work: Work, rates: Rates, experts: float) -> Costs:
    """A roofline: a part takes the longer of reading its weights and of 2 operations per weight and token.

    `experts`: those wanted per layer, among which the block's tokens spread evenly.
    """
    tokens = work.block_length * work.top_k / max(experts, 1.0)
    compute = max(work.expert_bytes / rates.memory, 2 * tokens * work.expert_weights / rates.flops)
    rest = max(work.layer_bytes / rates.memory, 2 * work.block_length * work.layer_weights / rates.flops)
    return Costs(work.expert_bytes / rates.transfer, compute, rest)


def read_rates(path: Path) -> Rates:
    """The rates of a hardware profile, as `dmoe doctor --measure` writes it. Raises `UsageError`.

    Experts of a machine with a GPU come over its link, all others from disk.
    """
    try:
        profile = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror}); wanted a hardware profile") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no hardware profile ({error})") from None
    link = ("link_bandwidth", "link_efficiency") if profile.get("device") == "cuda" else ("disk_bandwidth",)
    return Rates(
        transfer=_product(path, profile, link),
        memory=_product(path, profile, ("memory_bandwidth", "memory_efficiency")),
        flops=_product(path, profile, ("compute", "compute_efficiency")),
    )


def _product(path: Path, profile: dict[str, Any], names: tuple[str, ...]) -> float:
    found = 1.0
    for name in names:
        figure = profile.get(name)
        value = figure.get("value") if isinstance(figure, dict) else None
        if not isinstance(value, int | float) or value <= 0:
            raise UsageError(f"{path}: {name} has no value above 0; wanted {name} = {{ value, unit, source }}")
        found *= value
    return found
