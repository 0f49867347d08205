"""The tensors of a LLaDA2-MoE checkpoint: names, shapes and dtypes as published (REFERENCE §1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from offload_engine.core import ExpertKey
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import LLaDA2Model
from tools.sharded_writer import Blank


def blanks(config: ModelConfig, dtype: torch.dtype) -> Iterator[Blank]:
    """Every tensor, in the model's order; a layer's experts come before its router."""
    with torch.device("meta"):
        resident = LLaDA2Model(config).state_dict()
    gates = {f"model.layers.{layer}.mlp.gate.weight": layer for layer in config.moe_layers}
    for name, tensor in resident.items():
        if name in gates:
            for expert in range(config.num_experts):
                yield from expert_blanks(config, ExpertKey(gates[name], expert), dtype)
        kept_wide = name.endswith("expert_bias")  # selection scores are compared in float32
        yield Blank(name, tuple(tensor.shape), torch.float32 if kept_wide else dtype)


def expert_blanks(config: ModelConfig, key: ExpertKey, dtype: torch.dtype) -> tuple[Blank, Blank, Blank]:
    """Gate, up and down of one routed expert."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    of_expert = f"model.layers.{key.layer}.mlp.experts.{key.expert}"
    return (
        Blank(f"{of_expert}.gate_proj.weight", (width, hidden), dtype),
        Blank(f"{of_expert}.up_proj.weight", (width, hidden), dtype),
        Blank(f"{of_expert}.down_proj.weight", (hidden, width), dtype),
    )
