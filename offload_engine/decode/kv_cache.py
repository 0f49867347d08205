"""Keys and values of the blocks that are finished."""

from __future__ import annotations

import torch
from torch import Tensor

from offload_engine.model.attention import block_causal_mask, grouped_attention
from offload_engine.model.config import ModelConfig


class PrefixCache:
    """The exact keys and values of one sequence's finished blocks, allocated once for the whole context.

    A forward writes its own keys and values behind the prefix and attends to both; they stay there only if the forward
    is then committed, and otherwise the next one overwrites them.
    """

    def __init__(self, config: ModelConfig, context: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, context, config.num_key_value_heads, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.context = context
        self.length = 0
        """Positions committed so far."""
        self._mask: Tensor | None = None

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    def release(self) -> None:
        """Give the memory back; the cache can't be used any more."""
        self.keys = self.values = torch.empty(0)

    def begin(self, tokens: int, block_length: int) -> Tensor:
        """The next forward covers `tokens` positions from `length` on. Returns their positions [tokens] int64.

        Inside one block everything sees everything; several blocks at once (prefill) see each other block-causally.
        """
        positions = torch.arange(self.length, self.length + tokens, device=self.keys.device)
        self._mask = None
        if tokens > block_length:
            within = block_causal_mask(positions, block_length)
            self._mask = torch.cat((within.new_ones(tokens, self.length), within), dim=-1)
        return positions

    def commit(self, tokens: int) -> None:
        """The last forward's `tokens` positions are final: they join the prefix."""
        self.length += tokens

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `KeyValues`; here without leading dimensions: [T, heads, d]."""
        end = self.length + key.shape[0]
        self.keys[layer, self.length : end] = key
        self.values[layer, self.length : end] = value
        return grouped_attention(query, self.keys[layer, :end], self.values[layer, :end], self._mask)
