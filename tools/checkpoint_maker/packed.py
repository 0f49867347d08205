"""Experts of random weights straight into the packed layout, without the published one in between."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from offload_engine.cli.progress import Progress
from offload_engine.errors import UsageError
from offload_engine.experts.storage.conversion import DEFAULT_GROUP
from offload_engine.experts.storage.layout import packed_layout
from offload_engine.experts.storage.packed_header import PACKED_FILE, Description
from offload_engine.experts.storage.packed_writer import PackedWriter, packed_format
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.quantized import fitting_group
from offload_engine.model.weights import expert_keys
from tools.checkpoint_maker.tensors import expert_blanks
from tools.checkpoint_maker.weights import RoutingStatistics, Weights


def describe(config: Mapping[str, Any], kind: str, seed: int, statistics: RoutingStatistics) -> Description:
    """The packed file's header for a config.json; its identity is that of everything the weights follow from.

    Raises `UsageError` where matrices can't be split into groups for int4.
    """
    model, dtype = ModelConfig.from_dict(config), getattr(torch, config["torch_dtype"])
    hidden, width = model.hidden_size, model.moe_intermediate_size
    group = fitting_group(DEFAULT_GROUP, hidden, width)
    if kind == "int4" and group < 2:
        raise UsageError(f"--packed int4: matrices of {hidden} and {width} columns have no groups; use int8")
    made = json.dumps([dict(config), kind, seed, asdict(statistics)], sort_keys=True)
    identity = f"random weights {hashlib.sha256(made.encode()).hexdigest()[:16]}"
    return Description.of(packed_format(kind, dtype, group), hidden, width, identity)


def write_experts(
    folder: Path, description: Description, model: ModelConfig, dtype: torch.dtype, weights: Weights, progress: Progress
) -> None:
    """Draw every expert in `dtype`, as the published layout holds it, and pack it. Lets `OSError` through."""
    keys = list(expert_keys(model))
    with PackedWriter(folder / PACKED_FILE, description, keys) as writer:
        for key in keys:
            drawn = (
                torch.cat(list(weights.draw(blank))).view(blank.shape) for blank in expert_blanks(model, key, dtype)
            )
            writer.write(key, ExpertWeights(*drawn))
            progress.advance(writer.slab_bytes)
        writer.finish()


def packed_bytes(description: Description, model: ModelConfig) -> int:
    """Bytes of the slabs, the header left out."""
    layout, _payload = packed_layout(description.format, description.hidden_size, description.moe_intermediate_size)
    return layout.nbytes * len(list(expert_keys(model)))
