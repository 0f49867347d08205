"""The sizes a checkpoint can have, and its config.json (REFERENCE §1)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from offload_engine.engine.assembly import LLADA2_EOS, LLADA2_MASK

LLADA2_VOCAB = 157184


class Preset(NamedTuple):
    """What distinguishes one size from another; the rest is LLaDA2's."""

    layers: int
    hidden: int
    dense_ffn: int
    expert_ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


PRESETS = {  # layers, hidden, dense and expert FFN, heads, KV heads, head_dim, vocab
    "llada2-nano": Preset(4, 256, 640, 32, 4, 1, 64, 8192),
    "llada2-micro": Preset(6, 512, 1280, 128, 4, 1, 128, 8192),
    "llada2-2gb": Preset(6, 1024, 2560, 256, 8, 2, 128, 8192),
    "llada2-mini": Preset(20, 2048, 5120, 512, 16, 4, 128, LLADA2_VOCAB),
    "llada2-flash": Preset(32, 4096, 9216, 1024, 32, 4, 128, LLADA2_VOCAB),
}


def config_of(preset: Preset, dtype: torch.dtype, layers: int | None = None) -> dict[str, Any]:
    """A config.json. The special ids are LLaDA2's in its vocabulary, and end a smaller one, as the golden one's do."""
    published = preset.vocab == LLADA2_VOCAB
    eos, mask = (LLADA2_EOS, LLADA2_MASK) if published else (preset.vocab - 4, preset.vocab - 1)
    return {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "vocab_size": preset.vocab,
        "hidden_size": preset.hidden,
        "intermediate_size": preset.dense_ffn,
        "num_hidden_layers": layers or preset.layers,
        "num_attention_heads": preset.heads,
        "num_key_value_heads": preset.kv_heads,
        "head_dim": preset.head_dim,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": preset.expert_ffn,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "rms_norm_eps": 1e-6,
        "rope_theta": 600000,
        "rope_scaling": None,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 16384,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": True,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "pad_token_id": eos,
        "eos_token_id": eos,
        "mask_token_id": mask,
    }
