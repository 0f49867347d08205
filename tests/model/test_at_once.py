"""A decoder layer's first half by one kernel call: the same bits as by several, and only where it may."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase
from offload_engine.decode.kv_cache import PrefixCache, Span, places_of, side_by_side
from offload_engine.kernels import status
from offload_engine.model import llada2
from offload_engine.model.config import ModelConfig
from offload_engine.model.layers import rotary_angles
from offload_engine.model.llada2 import DecoderLayer, Forward, LLaDA2Model
from offload_engine.model.moe import ExpertWeights, ResidentExperts
from offload_engine.routing import make_policy
from tests.checkpoints import tiny_config

BLOCK = 8
CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(status().variant is None, reason="the kernels are not built")


def model_of(dtype: torch.dtype = torch.bfloat16, **config: object) -> LLaDA2Model:
    drawn = torch.Generator().manual_seed(0)
    model = LLaDA2Model(ModelConfig.from_dict(tiny_config(**config))).eval().requires_grad_(False).to(dtype)
    for name, tensor in model.state_dict().items():
        tensor.normal_(std=0.3, generator=drawn)
        if "layernorm" in name:
            tensor.add_(1)
    for layer in model.layers[1:]:
        layer.mlp.gate.float()
    return model


def cache_of(model: LLaDA2Model, committed: int) -> PrefixCache:
    """With something in it."""
    cache = PrefixCache(model.config, 64, torch.bfloat16, CPU)
    drawn = torch.Generator().manual_seed(committed)
    cache.keys.normal_(generator=drawn)
    cache.values.normal_(generator=drawn)
    cache.commit(range(committed))
    return cache


def forward_over(model: LLaDA2Model, spans: Sequence[Span]) -> Forward:
    width, hidden = model.config.moe_intermediate_size, model.config.hidden_size
    drawn = torch.Generator().manual_seed(1)
    experts = [
        ExpertWeights(
            *(torch.randn(shape, generator=drawn).bfloat16() for shape in ((width, hidden),) * 2 + ((hidden, width),))
        )
        for _expert in range(model.config.num_experts)
    ]
    positions = torch.cat([span.positions for span in spans])
    return Forward(
        info=ForwardInfo(Phase.DENOISE),
        positions=positions,
        block_ids=torch.arange(len(positions)) // BLOCK,
        key_values=side_by_side(spans),
        policy=make_policy("dmoe", model.config.router),
        experts=ResidentExperts(lambda _layer, expert: experts[expert]),
        places=places_of(spans),
    )


def calls_of(model: LLaDA2Model, forward: Forward, token_ids: Tensor) -> tuple[Tensor, list[bool]]:
    """Hidden states, and for each layer whether one call did it."""
    plain, done = DecoderLayer.at_once, []

    def noted(layer: DecoderLayer, *arguments: object) -> object:
        out = plain(layer, *arguments)
        done.append(out is not None)
        return out

    with patch.object(DecoderLayer, "at_once", noted), torch.inference_mode():
        return model(token_ids, forward), done


@needs_kernels
@pytest.mark.parametrize(
    "config",
    [{}, {"use_qkv_bias": True, "use_bias": True}, {"use_qk_norm": False}],
    ids=["plain", "biased", "unnormed"],
)
@pytest.mark.parametrize("lanes", [((0, 1),), ((16, 1),), ((8, 2),), ((24, 2), (0, 1), (40, 1))], ids=str)
def test_one_call_gives_what_several_give(config: dict[str, bool], lanes: tuple[tuple[int, int], ...]) -> None:
    """`lanes`: (positions committed, blocks of the forward)."""
    model = model_of(**config)
    token_ids = torch.arange(sum(blocks for _committed, blocks in lanes) * BLOCK) % 90
    found = []
    for at_once in (True, False):
        caches = [cache_of(model, committed) for committed, _blocks in lanes]
        spans = [cache.span(blocks * BLOCK, BLOCK) for cache, (_, blocks) in zip(caches, lanes, strict=True)]
        forward = forward_over(model, spans)
        hidden, done = calls_of(model, forward if at_once else replace(forward, places=None), token_ids)
        assert done == [at_once] * model.config.num_hidden_layers
        assert [cache.written for cache in caches] == [committed + blocks * BLOCK for committed, blocks in lanes]
        found.append([hidden, *itertools.chain(*((cache.keys, cache.values) for cache in caches))])
    assert all(map(torch.equal, *found))


@needs_kernels
def test_who_goes_the_long_way() -> None:
    model = model_of()
    layer, hidden = model.layers[1], torch.randn(BLOCK, model.config.hidden_size).bfloat16()
    span = cache_of(model, 16).span(BLOCK, BLOCK)
    places = places_of([span])
    assert places is not None
    assert places.longest == 16 + BLOCK
    angles = rotary_angles(span.positions, model.config.rotary, 1e4, torch.bfloat16)
    with torch.inference_mode():
        assert layer.at_once(hidden, angles, places) is not None
        assert layer.at_once(hidden, angles, None) is None
        assert layer.at_once(hidden.float(), angles, places) is None
        with patch.object(llada2, "kernel_positions", lambda: 23):
            assert layer.at_once(hidden, angles, places) is None, "the kernel's attention is slow over long prefixes"
    assert layer.at_once(hidden, angles, places) is None, "a gradient may be wanted"


@needs_kernels
def test_weights_that_are_replaced_after_a_first_use_are_seen() -> None:
    model = model_of()
    layer, hidden = model.layers[1], torch.randn(BLOCK, model.config.hidden_size).bfloat16()
    span = cache_of(model, 16).span(BLOCK, BLOCK)
    angles, places = rotary_angles(span.positions, model.config.rotary, 1e4, torch.bfloat16), places_of([span])

    def same() -> bool:
        with torch.inference_mode():
            found, plain = layer.at_once(hidden, angles, places), layer.attended(angles, span, hidden)
            return found is not None and all(map(torch.equal, found, plain))

    assert same()
    layer.mlp.gate.weight.data = layer.mlp.gate.weight.data * 2
    assert same()
    layer.attention.dense.weight = torch.nn.Parameter(layer.attention.dense.weight * 3, requires_grad=False)
    assert same()
    layer.mlp.gate.bfloat16()
    with torch.inference_mode():
        assert layer.at_once(hidden, angles, places) is None, "our kernel's routers are float32"
    layer.mlp.gate.float()
    assert same()


def test_places_are_for_keys_and_values_in_bf16_on_the_cpu() -> None:
    config = ModelConfig.from_dict(tiny_config())
    for dtype, device in ((torch.float32, CPU), (torch.bfloat16, torch.device("meta"))):
        span = PrefixCache(config, 64, dtype, device).span(16, BLOCK)
        assert places_of([span]) is None
        assert span.cache.written == 16, "what is put there the long way is known of as well"
