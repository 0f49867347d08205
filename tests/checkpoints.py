"""Small random checkpoints, written as the hub publishes them, for any variation of the architecture."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import LLaDA2Model

Layout = Literal["split", "merged"]
GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "llada2_tiny"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden vectors of ../shared are not here")
MATRICES = ("gate_proj", "up_proj", "down_proj")


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A config.json of a few thousand parameters: one dense and two MoE layers of 16 experts, top-4, 4 groups / 2."""
    config = {
        "model_type": "llada2_moe",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "partial_rotary_factor": 0.5,
        "rope_theta": 600000,
        "max_position_embeddings": 1024,
        "eos_token_id": 94,
        "pad_token_id": 94,
        "mask_token_id": 95,
    }
    return {**config, **overrides}


def random_tensors(config: dict[str, Any], *, dtype: torch.dtype, layout: Layout, seed: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by published name; unit-gain matrices, so that experts and router matter."""
    parsed = ModelConfig.from_dict(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        resident = LLaDA2Model(parsed).state_dict()
    if parsed.tie_word_embeddings:
        del resident["lm_head.weight"]
    tensors = {name: _random(name, tuple(blank.shape), dtype, generator) for name, blank in resident.items()}
    hidden, width = parsed.hidden_size, parsed.moe_intermediate_size
    for layer, which in itertools.product(parsed.moe_layers, MATRICES):
        shape = (hidden, width) if which == "down_proj" else (width, hidden)
        prefix = f"model.layers.{layer}.mlp.experts"
        stacked = _random(f"{prefix}.{which}", (parsed.num_experts, *shape), dtype, generator)
        if layout == "merged":
            tensors[f"{prefix}.{which}"] = stacked
        else:
            tensors |= {f"{prefix}.{expert}.{which}.weight": row.clone() for expert, row in enumerate(stacked)}
    return tensors


def _random(name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator)
    if name.endswith("expert_bias"):
        return drawn * 0.05
    if name.endswith("bias"):
        return (drawn * 0.1).to(dtype)
    if len(shape) == 1:
        return (1 + drawn * 0.1).to(dtype)
    fan_in = 1 if name.endswith("word_embeddings.weight") else shape[-1]
    return (drawn / math.sqrt(fan_in)).to(dtype)


def write_tensors(directory: Path, tensors: dict[str, Tensor], *, shards: int = 1) -> None:
    """Write `model.safetensors`, or that many shards and their index."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(
    directory: Path,
    config: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    layout: Layout = "split",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Write config.json and random weights for `config` into `directory` (made if absent) and return it.

    The same config and seed give the same weights in every layout and number of shards; `expert_bias` is float32
    whatever `dtype` is.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory, random_tensors(config, dtype=dtype, layout=layout, seed=seed), shards=shards)
    return directory
