"""Experts and linear layers computed on the CPU straight from their stored weights, where a C library of ours is built
and can run.

`expert_ffn` and `one_expert_ffn` compute one expert, `experts_ffn` several at once, `weighted_sum` adds up what they
gave; `fits` and `serves` say whether they would take such weights. `linear` is a layer of its own, `rms_norm` a norm,
`turn_heads` the norm and rotary embedding of queries and keys, `router_logits` a router, `attention` the queries of a
block and `likeliest` a token for each position, each if its `serves_` says so; `attention_half` is most of these in one
call. `status` says what is in use and why.
"""

from __future__ import annotations

from offload_engine.kernels.attention import attention, serves_attention
from offload_engine.kernels.attention_half import (
    AttentionHalf,
    BlockPlace,
    HalfWeights,
    Places,
    attention_half,
    serves_half,
)
from offload_engine.kernels.dense import linear, serves_linear
from offload_engine.kernels.ffn import (
    Expert,
    Matrix,
    expert_ffn,
    experts_ffn,
    fits,
    one_expert_ffn,
    serves,
    weighted_sum,
)
from offload_engine.kernels.library import KernelStatus, status
from offload_engine.kernels.likeliest import likeliest, serves_likeliest
from offload_engine.kernels.norms import rms_norm, serves_heads, serves_norm, turn_heads
from offload_engine.kernels.router import router_logits, serves_router

__all__ = [
    "AttentionHalf",
    "BlockPlace",
    "Expert",
    "HalfWeights",
    "KernelStatus",
    "Matrix",
    "Places",
    "attention",
    "attention_half",
    "expert_ffn",
    "experts_ffn",
    "fits",
    "likeliest",
    "linear",
    "one_expert_ffn",
    "rms_norm",
    "router_logits",
    "serves",
    "serves_attention",
    "serves_half",
    "serves_heads",
    "serves_likeliest",
    "serves_linear",
    "serves_norm",
    "serves_router",
    "status",
    "turn_heads",
    "weighted_sum",
]
