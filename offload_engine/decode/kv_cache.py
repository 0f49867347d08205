"""Keys and values of the blocks that are finished."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from offload_engine import kernels
from offload_engine.disk_file import align_up
from offload_engine.errors import MemoryBudgetError
from offload_engine.model.attention import KeyValues, padded_positions, prefix_attention
from offload_engine.model.config import ModelConfig
from offload_engine.pages import PIECE_BYTES, Toucher, huge_pages
from offload_engine.routing.base import RoutingPolicy


class PrefixCache:
    """The exact keys and values of one sequence's finished blocks, allocated once for the whole context; on the host in
    huge pages, which the system is asked for meanwhile (`wait_touched`). Raises `MemoryBudgetError` where it refuses.

    A forward writes its own keys and values behind the prefix and attends to both; they stay there only if they are
    then committed, and otherwise the next forward overwrites them.
    """

    def __init__(self, config: ModelConfig, context: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.num_hidden_layers, context, config.num_key_value_heads, config.head_dim)
        self._toucher: Toucher | None = None
        """Of host memory that is worth a thread."""
        if device.type == "cpu":
            self.keys, self.values = self._on_the_host(shape, dtype)
        else:
            self.keys = torch.zeros(shape, dtype=dtype, device=device)
            self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.context = context
        self.ids: list[int] = []
        """The tokens of the positions committed so far."""
        self.policy: RoutingPolicy | None = None
        """Who routed them; None: nobody whose keys and values are to be used again."""
        self.block_length = 0
        """Of the blocks that they are in."""
        self.written = 0
        """Positions that a forward may have left something in."""

    def _on_the_host(self, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        nbytes = 2 * math.prod(shape) * dtype.itemsize
        try:
            memory = torch.frombuffer(huge_pages(align_up(nbytes)), dtype=torch.uint8)
        except (OSError, OverflowError) as error:
            raise MemoryBudgetError(
                f"the system refused {nbytes} bytes for keys and values ({error}); ask for a smaller max_context"
            ) from None
        if nbytes > PIECE_BYTES:
            self._toucher = Toucher(memory)
        keys, values = memory[:nbytes].view(dtype).view(2, *shape)
        return keys, values

    @property
    def length(self) -> int:
        """Positions committed so far."""
        return len(self.ids)

    def reset(self) -> None:
        """Forget everything."""
        self.keep(0)

    def keep(self, positions: int) -> None:
        """Forget all but the first `positions`. Attention multiplies what lies behind a prefix by 0, so it must not be
        NaN.
        """
        del self.ids[positions:]
        self.values[:, positions : self.written] = 0
        self.written = min(self.written, positions)

    def begin_like(self, other: PrefixCache, positions: int) -> None:
        """Hold the first `positions` that `other` holds, and nothing else."""
        self.reset()
        self.written = positions
        self.keys[:, :positions] = other.keys[:, :positions]
        self.values[:, :positions] = other.values[:, :positions]
        self.ids += other.ids[:positions]

    def held_by(self, policy: RoutingPolicy, block_length: int) -> list[int]:
        """The tokens committed, if this very policy routed them in blocks of this length; else none."""
        return self.ids if self.policy is policy and self.block_length == block_length else []

    def wait_touched(self) -> None:
        """Wait until all memory is there. Raises `MemoryBudgetError` if the system did not give it."""
        refused = 0 if self._toucher is None else self._toucher.wait()
        if refused:
            raise MemoryBudgetError(
                f"the system refused {refused} bytes of those for keys and values; ask for a smaller max_context"
            )

    def release(self) -> None:
        """Give the memory back; the cache can't be used any more."""
        if self._toucher is not None:
            self._toucher.stop()
        self.keys = self.values = torch.empty(0)

    def span(self, tokens: int, block_length: int, offset: int = 0) -> Span:
        """Where a forward's `tokens` go: `offset` positions behind the prefix."""
        return Span(self, self.length + offset, tokens, block_length)

    def commit(self, ids: Sequence[int]) -> None:
        """The positions of these tokens, behind the prefix, are final: they join it."""
        self.ids += ids


class _LayerSpan(NamedTuple):
    """What a forward reads and writes of one layer."""

    keys: Tensor
    """[T, kv_heads, d], where its own go; so are the values."""
    values: Tensor
    seen: list[tuple[Tensor, Tensor]]
    """Keys and values [S, kv_heads, d] that each of its blocks attends to, and some behind them."""


class Span:
    """Consecutive positions of one sequence, in whole blocks; a `KeyValues` for one forward over them.

    Everything in a block sees everything in it and before it. So blocks attend one by one, each to a prefix that it
    sees all of: no mask is needed, and what a block computes does not depend on those that follow it in the forward.
    """

    def __init__(self, cache: PrefixCache, start: int, tokens: int, block_length: int) -> None:
        self.cache, self.start, self.tokens, self.block_length = cache, start, tokens, block_length

    @property
    def positions(self) -> Tensor:
        """[tokens] int64."""
        return torch.arange(self.start, self.start + self.tokens, device=self.cache.keys.device)

    @property
    def place(self) -> tuple[int, ...]:
        """Everything that `attend` depends on beside its arguments: spans of the same place do the same."""
        cache = self.cache
        return cache.keys.data_ptr(), cache.values.data_ptr(), self.start, self.tokens, self.block_length

    def claim(self) -> None:
        """Something will be left here, by `attend` or by a replay of what it did."""
        self.cache.written = max(self.cache.written, self.start + self.tokens)

    @cached_property
    def _ends(self) -> list[int]:
        """Where what each block sees ends."""
        behind = self.start + self.tokens
        return [min(first + self.block_length, behind) for first in range(self.start, behind, self.block_length)]

    @property
    def places(self) -> list[kernels.BlockPlace]:
        """Where the keys and values of its blocks go."""
        keys, values, start = self.cache.keys, self.cache.values, self.start
        starts = range(start, start + self.tokens, self.block_length)
        return [kernels.BlockPlace(keys, values, at, end - at) for at, end in zip(starts, self._ends, strict=True)]

    @cached_property
    def _layers(self) -> list[_LayerSpan]:
        """By layer; cut out for all layers together, by a few operations instead of six in each."""
        keys, values, behind = self.cache.keys, self.cache.values, self.start + self.tokens
        seen: list[list[tuple[Tensor, Tensor]]] = [[] for _layer in keys]
        for end in self._ends:
            positions = padded_positions(end, self.cache.context)
            pairs = zip(keys[:, :positions].unbind(), values[:, :positions].unbind(), strict=True)
            for blocks, pair in zip(seen, pairs, strict=True):
                blocks.append(pair)
        own = keys[:, self.start : behind].unbind(), values[:, self.start : behind].unbind()
        return list(map(_LayerSpan, *own, seen))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `KeyValues`; here without leading dimensions: [T, heads, d]."""
        self.claim()
        keys, values, seen = self._layers[layer]
        keys.copy_(key)
        values.copy_(value)
        if len(seen) == 1:
            return prefix_attention(query, *seen[0], self._ends[0])
        blocks = zip(query.split(self.block_length), seen, self._ends, strict=True)
        return torch.cat([prefix_attention(rows, *both, end) for rows, both, end in blocks])


class SideBySide:
    """The spans of several sequences in one forward, their tokens one after the other."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.sizes = [span.tokens for span in spans]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `KeyValues`; here without leading dimensions: [T, heads, d]."""
        parts = zip(self.spans, query.split(self.sizes), key.split(self.sizes), value.split(self.sizes), strict=True)
        return torch.cat([span.attend(layer, *of_span) for span, *of_span in parts])


def places_of(spans: Sequence[Span]) -> kernels.Places | None:
    """Where the keys and values of all of `spans` go, if our kernels put them there; they will."""
    for span in spans:
        span.claim()
    return kernels.Places.of([place for span in spans for place in span.places])


def side_by_side(spans: Sequence[Span]) -> KeyValues:
    """Where the tokens of all of `spans` go."""
    return spans[0] if len(spans) == 1 else SideBySide(spans)
