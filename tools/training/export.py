"""A trained network as a published checkpoint: config.json and bfloat16 weights under the published names.

python -m tools.training.export runs/tiny/last.pt offload_engine/assets/tiny
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor

from offload_engine.files import write_aside
from offload_engine.model.config import ModelConfig
from tools.training import checkpoint
from tools.training.data import Vocabulary


def config_json(words: Vocabulary, options: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model to be trained, with the keys that LLaDA2 checkpoints are published with."""
    heads_size = 32
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "torch_dtype": "bfloat16",
        "vocab_size": -(-words.tokenizer.get_vocab_size() // 64) * 64,
        "hidden_size": options["hidden"],
        "intermediate_size": options["ffn"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": options["heads"],
        "num_key_value_heads": options["kv_heads"],
        "head_dim": heads_size,
        "first_k_dense_replace": 1,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "num_shared_experts": options["shared"],
        "moe_intermediate_size": options["expert_width"],
        "n_group": 8,
        "topk_group": 4,
        "score_function": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "rotary_dim": heads_size // 2,
        "rope_scaling": None,
        "max_position_embeddings": 2048,
        "use_qk_norm": True,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_rmsnorm": True,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "pad_token_id": words.eos,
        "eos_token_id": words.eos,
        "mask_token_id": words.mask,
    }


def published_tensors(
    weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Training weights (names of `Network`) under the published names, experts split; weights in `dtype`."""
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.startswith("model."):
            tensors[name.removeprefix("model.")] = weight
            continue
        _, kind, layer = name.split(".")
        for expert, matrix in enumerate(weight):
            prefix = f"model.layers.{layer}.mlp.experts.{expert}"
            if kind == "down":
                tensors[f"{prefix}.down_proj.weight"] = matrix
            else:
                gate, up = matrix.chunk(2)
                tensors[f"{prefix}.gate_proj.weight"], tensors[f"{prefix}.up_proj.weight"] = gate, up
    tensors = {name: tensor.detach().to(dtype) for name, tensor in tensors.items()}
    tensors |= {f"model.layers.{layer}.mlp.gate.expert_bias": based(bias) for layer, bias in biases.items()}
    return {name: tensor.clone().contiguous() for name, tensor in tensors.items()}


def based(bias: Tensor) -> Tensor:
    """An expert bias in float32, shifted to start at 0.

    A shift changes no choice of experts, but training lets biases drift to where bfloat16 can no longer tell experts
    apart (at 5 its steps are 0.03; that cost 27 points of accuracy once), and dMoE's votes want scores above 0.
    """
    return (bias.float() - bias.float().min()).detach()


def export(folder: Path, raw_config: Mapping[str, Any], tensors: dict[str, Tensor]) -> int:
    """Write config.json and model.safetensors; returns the bytes of both."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = to_safetensors(tensors, metadata={"format": "pt"})
    config = (json.dumps(dict(raw_config), indent=2) + "\n").encode()
    write_aside(folder / "model.safetensors", weights)
    write_aside(folder / "config.json", config)
    return len(weights) + len(config)


def from_published(tensors: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inverse of `published_tensors`: weights under the names of `Network`, and the expert biases by layer."""
    weights, biases = {}, {}
    for name, tensor in tensors.items():
        if name.endswith("expert_bias"):
            biases[name.split(".")[2]] = tensor
        elif ".experts." not in name:
            weights[f"model.{name}"] = tensor
    for layer in config.moe_layers:
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{expert}.{kind}_proj.weight"] for expert in range(config.num_experts)])
            for kind in ("gate", "up", "down")
        )
        weights[f"experts.gate_up.{layer}"], weights[f"experts.down.{layer}"] = torch.cat((gate, up), dim=1), down
    return weights, biases


@click.command()
@click.argument("run", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
def main(run: Path, folder: Path) -> None:
    """Export the averaged weights of the training checkpoint RUN to FOLDER."""
    state = checkpoint.load(run)
    size = export(folder, state["config"], published_tensors(state["trainer"]["average"], state["trainer"]["biases"]))
    print(f"{folder}: {size} bytes, averaged weights of step {state['trainer']['steps']}")


if __name__ == "__main__":
    main()
