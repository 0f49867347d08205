"""LLaDA2-MoE (REFERENCE §1). Parameters are named as in the published checkpoints, routed experts excepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from offload_engine import kernels
from offload_engine.core import ForwardInfo, RoutingDecision
from offload_engine.errors import InternalError
from offload_engine.model.attention import Attention, KeyValues, kernel_positions
from offload_engine.model.config import ModelConfig
from offload_engine.model.graphs import Attended, StepGraphs
from offload_engine.model.layers import Linear, RMSNorm, SwiGLU, part, rotary_angles
from offload_engine.model.moe import ExpertExecutor, MoEBlock
from offload_engine.model.prefill import prefill
from offload_engine.routing.base import Route, RoutingPolicy, SituatedPolicy


@dataclass(frozen=True, slots=True)
class Forward:
    """Everything about one forward but the tokens: what attention sees, who routes, who runs the experts."""

    info: ForwardInfo
    positions: Tensor
    """[.., T] int64, absolute."""
    block_ids: Tensor
    """[T] int64 over the flattened tokens: which block of this forward each belongs to; -1 for a pad."""
    key_values: KeyValues
    policy: RoutingPolicy
    experts: ExpertExecutor
    graphs: StepGraphs | None = None
    """Replays what comes before the experts, where earlier forwards did the same."""
    places: kernels.Places | None = None
    """Where `key_values` has its tokens' keys and values, for a kernel that puts them there itself."""
    situated: SituatedPolicy | None = field(init=False)
    """`policy`, if it is one; asked once, for of an abstract class that is a dear question."""

    def __post_init__(self) -> None:
        situated = self.policy if isinstance(self.policy, SituatedPolicy) else None
        object.__setattr__(self, "situated", situated)

    def policy_at(self, layer: int, *, preview: bool = False) -> Route:
        """How `layer` routes in this forward; a `preview` leaves no trace."""
        return self.policy if self.situated is None else self.situated.at(layer, self.info, preview=preview)


def residual_sum(out: Tensor, hidden: Tensor) -> Tensor:
    """The residual stream `hidden` with `out` added to it, in the memory of `out`: fresh memory costs more."""
    return out.add_(hidden)


class DecoderLayer(nn.Module):
    """Attention and a feed-forward, each behind its norm, each added to the residual stream."""

    input_layernorm: RMSNorm = part()
    attention: Attention = part()
    post_attention_layernorm: RMSNorm = part()
    mlp: MoEBlock | SwiGLU = part()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if layer in config.moe_layers:
            self.mlp = MoEBlock(config, layer)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self._half: kernels.AttentionHalf | None = None
        self._half_places: tuple[int, ...] = ()
        """Where the weights lay when `_half` was made of them."""

    def attend(self, hidden: Tensor, angles: tuple[Tensor, Tensor], key_values: KeyValues) -> Tensor:
        """What attention adds to the residual stream: [.., T, H] -> [.., T, H]."""
        out: Tensor = self.attention(self.input_layernorm(hidden), angles, key_values)
        return out

    def feed_forward(self, hidden: Tensor, forward: Forward) -> Tensor:
        """What the layer's second half adds to the residual stream: [.., T, H] -> [.., T, H]."""
        normed, mlp = self.post_attention_layernorm(hidden), self.mlp
        if isinstance(mlp, MoEBlock):
            out: Tensor = mlp(normed, forward.block_ids, forward.policy_at(self.layer), forward.experts)
        else:
            out = mlp(normed)
        return out

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor], forward: Forward) -> Tensor:
        """[.., T, H] -> [.., T, H]."""
        mlp = self.mlp
        if forward.graphs is not None and isinstance(mlp, MoEBlock):
            work = partial(self.attended, angles, forward.key_values)
            attended = forward.graphs.run(self.layer, self.attention.query_key_value.weight, hidden, work)
        elif (at_once := self.at_once(hidden, angles, forward.places)) is not None:
            attended = at_once
        else:
            hidden = residual_sum(self.attend(hidden, angles, forward.key_values), hidden)
            return residual_sum(self.feed_forward(hidden, forward), hidden)
        hidden, normed, logits = attended
        if isinstance(mlp, MoEBlock):
            out = mlp.routed(normed, logits, forward.block_ids, forward.policy_at(self.layer), forward.experts)
        else:
            out = mlp(normed)
        return residual_sum(out, hidden)

    def at_once(self, hidden: Tensor, angles: tuple[Tensor, Tensor], places: kernels.Places | None) -> Attended | None:
        """The layer up to its router, or to its dense feed-forward, by one call of our kernels, for `hidden` [T, H] at
        `places`; None where it takes several. Bit for bit what several give.
        """
        if places is None or places.longest > kernel_positions() or not kernels.serves_half(hidden):
            return None
        weights = self._half_weights()
        if weights.places != self._half_places:
            heads, kv_heads, eps = self.attention.heads, self.attention.kv_heads, self.attention.eps
            self._half, self._half_places = kernels.AttentionHalf.of(weights, heads, kv_heads, eps), weights.places
        if self._half is None:
            return None
        return Attended(*kernels.attention_half(self._half, places, self.layer, hidden, angles))

    def _half_weights(self) -> kernels.HalfWeights:
        attention, mlp = self.attention, self.mlp
        projection, dense = attention.query_key_value, attention.dense
        normed = attention.use_qk_norm
        return kernels.HalfWeights(
            norm=self.input_layernorm.weight,
            projection=projection.weight,
            projection_bias=projection.bias,
            query_norm=attention.query_layernorm.weight if normed else None,
            key_norm=attention.key_layernorm.weight if normed else None,
            dense=dense.weight,
            dense_bias=dense.bias,
            next_norm=self.post_attention_layernorm.weight,
            router=mlp.gate.weight if isinstance(mlp, MoEBlock) else None,
        )

    def attended(self, angles: tuple[Tensor, Tensor], key_values: KeyValues, hidden: Tensor) -> Attended:
        """The MoE layer up to its router, for `hidden` [T, H]."""
        hidden = residual_sum(self.attend(hidden, angles, key_values), hidden)
        normed = self.post_attention_layernorm(hidden)
        return Attended(hidden, normed, cast("MoEBlock", self.mlp).gate(normed))

    def preview(self, hidden: Tensor, forward: Forward) -> RoutingDecision:
        """How this layer would route `hidden` [.., T, H] as it stands (the cross-layer gate of REFERENCE §3)."""
        if not isinstance(self.mlp, MoEBlock):
            raise InternalError(f"layer {self.layer} is dense and routes nothing")
        policy = forward.policy_at(self.layer, preview=True)
        return self.mlp.route(self.post_attention_layernorm(hidden), forward.block_ids, policy)


class Decoder(nn.Module):
    """The embedding, the layers and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, token_ids: Tensor, device: torch.device) -> Tensor:
        """[.., T] int64 -> [.., T, H] on `device`: rows are gathered where the table is, and only they move."""
        rows: Tensor = self.word_embeddings(token_ids.to(self.word_embeddings.weight.device))
        return rows.to(device)


class LLaDA2Model(nn.Module):
    """The whole network without its routed experts, which the executor of each forward supplies."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.word_embeddings.weight

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, in the order they run."""
        return cast("list[DecoderLayer]", list(self.model.layers))

    def forward(self, token_ids: Tensor, forward: Forward) -> Tensor:
        """Hidden states [.., T, H] after the final norm, for `token_ids` [.., T] int64."""
        forward.experts.begin(forward.info)
        hidden = self.model.embed(token_ids, forward.positions.device)
        angles = rotary_angles(forward.positions, self.config.rotary, self.config.rope_theta, hidden.dtype)
        routing = self.config.moe_layers
        for index, layer in enumerate(self.layers):
            if index in routing:
                forward.experts.prepare(index, partial(self.preview, hidden, forward))
            hidden = layer(hidden, angles, forward)
        normed: Tensor = self.model.norm(hidden)
        return normed

    def preview(self, hidden: Tensor, forward: Forward, layer: int) -> RoutingDecision:
        """See `DecoderLayer.preview`, of `layer`."""
        return self.layers[layer].preview(hidden, forward)

    def prefill(
        self, token_ids: Tensor, pieces: Sequence[Forward], cancelled: Callable[[], bool] = lambda: False
    ) -> bool:
        """See `offload_engine.model.prefill`."""
        return prefill(self, token_ids, pieces, cancelled)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [.., vocab] float32 of hidden states [.., H]: only for the positions that need them."""
        return self.lm_head.unrounded(hidden)
