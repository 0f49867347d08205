"""LLaDA2-MoE (REFERENCE §1). Parameters are named as in the published checkpoints, routed experts excepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from offload_engine.core import ForwardInfo, RoutingDecision
from offload_engine.errors import InternalError
from offload_engine.model.attention import Attention, KeyValues
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
        if forward.graphs is not None and isinstance(self.mlp, MoEBlock):
            work = partial(self.attended, angles, forward.key_values)
            hidden, normed, logits = forward.graphs.run(self.layer, self.attention.query_key_value.weight, hidden, work)
            policy = forward.policy_at(self.layer)
            return residual_sum(self.mlp.routed(normed, logits, forward.block_ids, policy, forward.experts), hidden)
        hidden = residual_sum(self.attend(hidden, angles, forward.key_values), hidden)
        return residual_sum(self.feed_forward(hidden, forward), hidden)

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
