"""Every variation of the architecture against an independent float64 implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.engine.engine import Engine
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.reference_model import ReferenceModel

VARIATIONS: dict[str, dict[str, Any]] = {
    "as published": {},
    "qkv bias": {"use_qkv_bias": True},
    "dense bias": {"use_bias": True},
    "both biases": {"use_bias": True, "use_qkv_bias": True},
    "no qk-norm": {"use_qk_norm": False},
    "no shared expert": {"num_shared_experts": 0},
    "two shared experts": {"num_shared_experts": 2},
    "full rotary": {"partial_rotary_factor": 1.0},
    "quarter rotary": {"partial_rotary_factor": 0.25},
    "one group": {"n_group": 1, "topk_group": 1},
    "eight groups": {"n_group": 8, "topk_group": 4},
    "two groups of which one": {"n_group": 2, "topk_group": 1},
    "top-2": {"num_experts_per_tok": 2},
    "top-6": {"num_experts_per_tok": 6},
    "two dense layers": {"first_k_dense_replace": 2, "num_hidden_layers": 4},
    "no dense layer": {"first_k_dense_replace": 0},
    "tied embeddings": {"tie_word_embeddings": True},
    "no expert bias": {"moe_router_enable_expert_bias": False},
    "as many kv heads as heads": {"num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "other scaling": {"routed_scaling_factor": 1.0},
    "other theta": {"rope_theta": 10000.0},
    "coarse norm": {"rms_norm_eps": 1e-2},
}


@pytest.mark.parametrize("dmoe", [None, (0.6, 6)], ids=["original", "dmoe"])
@pytest.mark.parametrize("name", VARIATIONS)
def test_logits_experts_and_weights(tmp_path: Path, name: str, dmoe: tuple[float, int] | None) -> None:
    config = tiny_config(**VARIATIONS[name])
    tensors = random_tensors(config, dtype=torch.float32, layout="split", seed=3)
    reference = ReferenceModel(config, tensors)
    ids = torch.randint(0, 94, (21,), generator=torch.Generator().manual_seed(5)).tolist()
    expected = reference.logits(ids, 8, dmoe)
    write_checkpoint(tmp_path, config, seed=3)
    routing = {"routing": "dmoe", "top_p": dmoe[0], "min_experts": dmoe[1]} if dmoe else {"routing": "original"}
    with Engine.from_pretrained(tmp_path, gpu_mem="3GB", expert_mem=10 * 4 * 4096, **routing) as engine:
        torch.testing.assert_close(engine.logits(ids, block_length=8).double(), expected, rtol=1e-3, atol=1e-4)
        layers = engine.routing(ids, block_length=8)
    assert len(layers) == len(reference.chosen)
    for ours, theirs in zip(layers, reference.chosen, strict=True):
        for token, weights in enumerate(theirs):
            pairs = zip(ours.experts[token].tolist(), ours.weights[token].tolist(), strict=True)
            found = {expert: weight for expert, weight in pairs if expert >= 0}
            assert found.keys() == weights.keys()
            assert found == pytest.approx(weights, rel=1e-3)
