"""A forward for the sake of its keys and values: layer by layer, each layer's experts needed once for all tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.model.layers import rotary_angles
from offload_engine.model.moe import MoEBlock

if TYPE_CHECKING:
    from offload_engine.model.llada2 import DecoderLayer, Forward, LLaDA2Model


def prefill(
    model: LLaDA2Model, token_ids: Tensor, pieces: Sequence[Forward], cancelled: Callable[[], bool] = lambda: False
) -> bool:
    """Have `key_values` of every piece take the keys and values of its share of `token_ids` [T]. No hidden states come
    of it, and the last layer's feed-forward, which none of them depends on, is left out.

    `pieces` are consecutive in the sequence and belong to one forward: one `info`, one executor. Activations besides
    the residual stream are bounded by the largest piece; its experts see the tokens of all of them at once. `cancelled`
    is asked before every layer; once it says so the result is False, and the keys and values are incomplete. For
    inference mode only: the residual stream is added to in place.
    """
    experts = pieces[0].experts
    experts.begin(pieces[0].info)
    sizes = [piece.positions.shape[0] for piece in pieces]
    config = model.config
    hidden = model.model.embed(token_ids, pieces[0].positions.device)
    rows = hidden.split(sizes)
    angles = [rotary_angles(piece.positions, config.rotary, config.rope_theta, hidden.dtype) for piece in pieces]
    *layers, last = model.layers
    for index, layer in enumerate(layers):
        if cancelled():
            return False
        if index in config.moe_layers:
            experts.prepare(index, partial(model.preview, rows[-1], pieces[-1]))
        for piece, part, turned in zip(pieces, rows, angles, strict=True):
            part += layer.attend(part, turned, piece.key_values)
        _feed_forward(layer, hidden, pieces)
    if cancelled():
        return False
    for piece, part, turned in zip(pieces, rows, angles, strict=True):
        last.attend(part, turned, piece.key_values)
    return True


def _feed_forward(layer: DecoderLayer, hidden: Tensor, pieces: Sequence[Forward]) -> None:
    """Add to `hidden` [T, H] what the layer's second half makes of it."""
    sizes = [piece.positions.shape[0] for piece in pieces]
    if len(pieces) == 1 or not isinstance(layer.mlp, MoEBlock):
        for piece, part in zip(pieces, hidden.split(sizes), strict=True):
            part += layer.feed_forward(part, piece)
        return
    normed = torch.empty_like(hidden)
    decisions = []
    for piece, part, ready in zip(pieces, hidden.split(sizes), normed.split(sizes), strict=True):
        ready.copy_(layer.post_attention_layernorm(part))
        decisions.append(layer.mlp.route(ready, piece.block_ids, piece.policy_at(layer.layer)))
    routed = pieces[0].experts.sweep(layer.layer, normed, joined(decisions), rows=max(sizes))
    for part, ready, out in zip(hidden.split(sizes), normed.split(sizes), routed.split(sizes), strict=True):
        part += layer.mlp.with_shared(out.to(part.dtype), ready)


def joined(decisions: Sequence[RoutingDecision]) -> RoutingDecision:
    """The decisions of consecutive pieces as one: the tokens of all, in their order, and the block scores summed up,
    since coresets and scores of each block of a long prompt would take memory that nobody has a use for.
    """
    scores = [one.block_scores.sum(dim=0, keepdim=True) for one in decisions if one.block_scores is not None]
    return RoutingDecision(
        torch.cat([one.experts for one in decisions]),
        torch.cat([one.weights for one in decisions]),
        block_scores=torch.cat(scores).sum(dim=0, keepdim=True) if scores else None,
    )
