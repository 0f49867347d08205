"""Has the libraries load what a forward needs of them, so that the process can be measured before a plan is made."""

from __future__ import annotations

from functools import cache

import torch

from offload_engine.core import ForwardInfo, Phase, SamplingParams
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.decode.sampler import propose
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertWeights, ResidentExperts
from offload_engine.routing import make_policy

BLOCK = 32
CPU = torch.device("cpu")
_TINY = {
    "model_type": "llada2_moe",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "n_group": 4,
    "topk_group": 2,
    "max_position_embeddings": 256,
}
"""A model that runs every kernel a large one does, in a few milliseconds once they are loaded."""


@cache
def warm_up(dtype: torch.dtype, device: torch.device = CPU) -> None:
    """Prefill four blocks, denoise one and draw tokens from it, with a tiny model in `dtype` on `device`; once.

    The first forward has the matrix libraries map code, compile kernels and start threads: 35 MB (bf16, 1 thread) that
    stay for good, and that a process measured before it would not show.
    """
    config = ModelConfig.from_dict(_TINY)
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        model = LLaDA2Model(config).eval().to(dtype)
        noise = torch.Generator(device).manual_seed(0)
        for tensor in model.state_dict().values():
            tensor.normal_(std=0.05, generator=generator)
        hidden = _forwards(config, model.to(device), dtype, device)
        propose(model.logits(hidden), 0, SamplingParams(temperature=1.0, top_p=0.9), noise)


def _forwards(config: ModelConfig, model: LLaDA2Model, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    wide = torch.zeros(config.moe_intermediate_size, config.hidden_size, dtype=dtype, device=device)
    weights = ExpertWeights(wide, wide, wide.T.contiguous())
    experts = ResidentExperts(lambda _layer, _expert: weights)
    cache = PrefixCache(config, 5 * BLOCK, dtype, device)
    policy = make_policy("dmoe", config.router)

    def forward(phase: Phase, tokens: int) -> Forward:
        span = cache.span(tokens, BLOCK)
        blocks = torch.arange(tokens, device=device) // BLOCK
        return Forward(ForwardInfo(phase), span.positions, blocks, span, policy, experts)

    model.prefill(torch.arange(4 * BLOCK), [forward(Phase.PREFILL, 4 * BLOCK)])
    cache.commit(range(4 * BLOCK))
    hidden: torch.Tensor = model(torch.arange(BLOCK), forward(Phase.DENOISE, BLOCK))
    return hidden
