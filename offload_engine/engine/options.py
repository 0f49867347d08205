"""The keywords of `Engine.from_pretrained`, for type checkers: what `EngineConfig` takes, as a user may spell it."""

from __future__ import annotations

from typing import Literal, TypedDict

import torch

from offload_engine.engine.extending import MakeEviction, MakePredictor, MakeRouting

Size = int | str
"""Bytes, or text such as "8GB"."""


class EngineOptions(TypedDict, total=False):
    """Any of `EngineConfig`'s fields but the model; what each means is said there."""

    device: str | torch.device
    dtype: str | torch.dtype
    gpu_mem: Size
    host_mem: Size | None
    expert_mem: Size | None
    max_context: int | None
    routing: str | MakeRouting | None
    top_p: float | None
    min_experts: int | None
    top_k_experts: int
    des_k: int
    des_beta: float
    expert_capacity: int | None
    residency_bonus: float
    hold_steps: int
    eviction: str | MakeEviction
    predictor: str | MakePredictor
    prefetch_depth: int
    hot_set: Literal["on", "off"]
    tuned: Literal["on", "off"]
    transfers_in_flight: int
    cpu_experts: Literal["off", "auto"] | float
    reader_threads: int
    verify: Literal["first", "always", "never"]
    cuda_graphs: Literal["auto", "on", "off"]
    prefill_chunk: int
    batch_size: int
    lanes_together: int | Literal["auto"]
    prefix_reuse: Literal["auto", "on", "off"]
    fused_commit: bool
    threads: int | None
    mask_token_id: int | None
    eos_token_id: int | None
