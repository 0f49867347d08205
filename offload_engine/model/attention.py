"""Grouped-query attention, and the protocol by which a forward says what its queries may see."""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offload_engine import kernels
from offload_engine.model.config import ModelConfig
from offload_engine.model.layers import Linear, RMSNorm, part, rotate

ATTENTION_ROWS = 32
"""Positions whose scores are held together where nothing fused computes them."""

KERNEL_POSITIONS = 1024
"""Positions up to which our kernel attends where torch can have the CPU multiply bf16. Its copies of values outgrow the
cache then: against the plain products it is 1.9 times as fast at 33 positions, 1.4 times at 432, 1.2 times at 1000, and
slower at 2000.
"""


class KeyValues(Protocol):
    """Where a forward's keys and values go and what its queries see; a cache, or a mask over the sequence itself."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention output [.., T, heads, head_dim].

        `query` [.., T, heads, head_dim], `key` and `value` [.., T, kv_heads, head_dim], norm and rotary applied.
        """


class MaskedSequence:
    """Attention of a sequence to itself under a fixed mask; no cache."""

    def __init__(self, mask: Tensor | None) -> None:
        """`mask` [.., T, T] bool, True where row may see column; None: everything sees everything."""
        self.mask = mask

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG002
        """See `KeyValues`."""
        return grouped_attention(query, key, value, self.mask)


def block_causal_mask(positions: Tensor, block_length: int) -> Tensor:
    """[T, T] bool: position i sees j with floor(j/B) <= floor(i/B) (REFERENCE §1)."""
    blocks = torch.div(positions, block_length, rounding_mode="floor")
    return blocks.unsqueeze(-1) >= blocks.unsqueeze(-2)


def grouped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot-product attention with query heads sharing key-value heads.

    `query` [.., T, heads, d], `key`/`value` [.., S, kv_heads, d], `mask` [.., T, S] bool or None -> [.., T, heads, d].
    """
    if query.dim() == 3:  # without a batch dimension torch takes its math path: scores in memory, and 3 to 7x slower
        return grouped_attention(query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0), mask).squeeze(0)
    if mask is not None and mask.dim() > 2:
        mask = mask.unsqueeze(-3)
    out = F.scaled_dot_product_attention(
        query.transpose(-2, -3),
        key.transpose(-2, -3),
        value.transpose(-2, -3),
        attn_mask=mask,
        enable_gqa=query.shape[-2] != key.shape[-2],
    )
    return out.transpose(-2, -3)


def padded_positions(positions: int, most: int) -> int:
    """Positions that products with a prefix are computed with, at most `most`: powers of two and the middles between.

    oneDNN keeps a primitive of over half a MB for every shape it meets, and a prefix grows by a block at a time.
    """
    power = 1 << max(positions - 1, 1).bit_length()
    return min(most, power // 4 * 3 if positions <= power // 4 * 3 else power)


def kernel_positions() -> float:
    """Positions up to which our kernel attends rather than torch."""
    # Without vectors of bf16, torch multiplies number by number: 60 times as long at 2000 positions (docs/LOG.md).
    return KERNEL_POSITIONS if kernels.status().variant == "avx512_bf16" else math.inf


def prefix_attention(query: Tensor, key: Tensor, value: Tensor, seen: int | None = None) -> Tensor:
    """As `grouped_attention` without a mask or leading dimensions, for inference: every query sees the first `seen`
    keys (None: all). What lies behind them must be finite.

    In bfloat16 on a CPU by our kernel, if it is there and the prefix not too long; or else as plain products, a
    key-value head at a time: where the CPU has vectors of bf16, torch's fused kernel takes 3.5 to 6 times as long. The
    products' scores are rounded to bfloat16 before the softmax in float32, as in the published model's own attention;
    the kernel's are not.
    """
    if query.dtype != torch.bfloat16 or not query.is_cpu:
        return grouped_attention(query, key[:seen], value[:seen], None)
    positions = key.shape[0] if seen is None else seen
    if positions <= kernel_positions() and kernels.serves_attention(query, key, value):
        return kernels.attention(query, key, value, positions)
    return torch.cat([_attention_by_head(rows, key, value, seen) for rows in query.split(ATTENTION_ROWS)])


def _attention_by_head(query: Tensor, key: Tensor, value: Tensor, seen: int | None) -> Tensor:
    tokens, heads, head_dim = query.shape
    groups = key.shape[1]
    rows = query.view(tokens, groups, heads // groups, head_dim).transpose(0, 1).reshape(groups, -1, head_dim)
    out = torch.empty_like(rows)
    for head, queries in enumerate(rows):
        scores = torch.mm(queries, key[:, head].t()).float().mul_(head_dim**-0.5)
        if seen is not None:
            scores[:, seen:] = -torch.inf
        torch.mm(scores.softmax(dim=-1).to(query.dtype), value[:, head], out=out[head])
    return out.view(groups, tokens, heads // groups, head_dim).transpose(0, 1).reshape(tokens, heads, head_dim)


class Attention(nn.Module):
    """One layer's attention: fused QKV, optional RMSNorm of queries and keys, partial rotary (REFERENCE §1)."""

    query_key_value: Linear = part()
    dense: Linear = part()
    query_layernorm: RMSNorm = part()
    key_layernorm: RMSNorm = part()

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        self.query_key_value = Linear(config.hidden_size, width, bias=config.use_qkv_bias)
        self.dense = Linear(self.heads * self.head_dim, config.hidden_size, bias=config.use_bias)
        self.eps = config.rms_norm_eps
        self.use_qk_norm = config.use_qk_norm
        if config.use_qk_norm:
            self.query_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.key_layernorm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, hidden: Tensor, angles: tuple[Tensor, Tensor], key_values: KeyValues) -> Tensor:
        """[.., T, hidden] -> [.., T, hidden]; `angles` from `rotary_angles`."""
        fused = self.query_key_value(hidden).unflatten(-1, (-1, self.head_dim))
        attended = key_values.attend(self.layer, *self._turned(fused, angles))
        out: Tensor = self.dense(attended.flatten(-2))
        return out

    def _turned(self, fused: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `fused` [.., T, heads + 2 kv_heads, head_dim], which may be overwritten: normed
        and turned by `angles`, in bf16 on the CPU by our kernel if no gradient is wanted.
        """
        norms = (self.query_layernorm.weight, self.key_layernorm.weight) if self.use_qk_norm else None
        served = kernels.serves_heads(fused, *angles, *(norms or ()))
        if served:
            kernels.turn_heads(fused, self.kv_heads, angles, norms, self.eps)
        query, key, value = fused.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        if served:
            return query, key, value
        if self.use_qk_norm:
            query, key = self.query_layernorm(query), self.key_layernorm(key)
        return rotate(query, *angles), rotate(key, *angles), value
