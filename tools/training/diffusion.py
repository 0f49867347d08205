"""The block-diffusion objective (REFERENCE §4): what a training sequence looks like and what its positions may see.

On paper a sequence is [noisy | clean], both L long: a noisy block sees itself and the clean blocks before it, a clean
block itself and the clean blocks before it. Much of that is never looked at: noisy blocks that only repeat the
prompt, the last clean block, and attention from one sample to another. So a sample is laid out as the clean blocks
that some noisy block sees, followed by the noisy blocks that hold an answer (several noisings of them, if wanted, for
the price of one clean half). A batch is a flat row of such blocks, each with the list of blocks it sees. The loss at
masked positions is the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase
from offload_engine.model.layers import rotary_angles
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertExecutor
from offload_engine.routing import RoutingPolicy

CLEAN = 0
"""Copy index of the clean half; noisings count from 1."""


@dataclass(frozen=True)
class Example:
    """One tokenised training sample, padded to whole blocks."""

    tokens: NDArray[np.int64]
    """[L]"""
    maskable: NDArray[np.bool_]
    """[L]: the positions that noise may mask: the answer and its padding."""


@dataclass(frozen=True)
class Noise:
    """How answers are masked: one sigma per noising, uniform in `low`..`high`; for a share of them in `high`..1."""

    mask_id: int
    low: float = 0.3
    high: float = 0.8
    full_share: float = 0.3

    def draw(self, rng: np.random.Generator, maskable: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which of the maskable positions [.., L] one noising masks."""
        rows = (*maskable.shape[:-1], 1)
        low = rng.uniform(self.low, self.high, rows)
        sigma = np.where(rng.random(rows) < self.full_share, rng.uniform(self.high, 1.0, rows), low)
        return maskable & (rng.random(maskable.shape) < sigma)


@dataclass(frozen=True)
class Span:
    """Layout of one sample: of `blocks` blocks, those from `first` on are denoised, `copies` times over."""

    first: int
    blocks: int
    copies: int

    def rows(self) -> list[tuple[int, int]]:
        """(copy, block) of each block in order: clean ones, then each noising's."""
        clean = [(CLEAN, block) for block in range(self.blocks - 1)]
        noisy = itertools.product(range(1, self.copies + 1), range(self.first, self.blocks))
        return clean + list(noisy)

    def block_mask(self) -> NDArray[np.bool_]:
        """[R, R] over the blocks of `rows`: True where a row's tokens may see a column's."""
        copy, block = np.array(self.rows()).T
        before = (copy == CLEAN) & (block < block[:, None])
        return before | ((copy == copy[:, None]) & (block == block[:, None]))


@dataclass(frozen=True)
class Batch:
    """One training step's input: T flat tokens, group after group, sample after sample."""

    tokens: NDArray[np.int64]
    """[T]"""
    positions: NDArray[np.int64]
    """[T]: the position of each token in its sample."""
    noisy: NDArray[np.int64]
    """Rising indices of the tokens of noisy blocks."""
    masked: NDArray[np.int64]
    """Rising indices of the masked tokens."""
    targets: NDArray[np.int64]
    """What the masked tokens were."""
    visible: NDArray[np.int64]
    """[R, W]: for each of the R = T / block_length blocks, those that it sees; -1 pads."""


def span_of(example: Example, block_length: int, copies: int) -> Span:
    """The layout that an example needs."""
    first = int(example.maskable.argmax()) // block_length
    return Span(first, len(example.tokens) // block_length, copies)


def pack(samples: Sequence[tuple[Example, int]], noise: Noise, rng: np.random.Generator, block_length: int) -> Batch:
    """Noise and lay out (example, copies) pairs."""
    return pack_seeded([(example, copies, rng) for example, copies in samples], noise, block_length)


def pack_seeded(samples: Sequence[tuple[Example, int, np.random.Generator]], noise: Noise, block_length: int) -> Batch:
    """As `pack`, each sample noised by a generator of its own."""
    spans = [span_of(example, block_length, copies) for example, copies, _ in samples]
    masks = [span.block_mask() for span in spans]
    widest = max(int(mask.sum(axis=1).max()) for mask in masks)
    parts, visible, first_row = [], [], 0
    for (example, _, rng), span, mask in zip(samples, spans, masks, strict=True):
        parts.append(_noised(example, span, noise, rng, block_length))
        order = np.argsort(~mask, axis=1, kind="stable")[:, :widest]
        seen = np.where(np.take_along_axis(mask, order, axis=1), order + first_row, -1)
        visible.append(np.pad(seen, ((0, 0), (0, widest - seen.shape[1])), constant_values=-1))
        first_row += len(mask)
    tokens, clean, positions, noisy = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    masked = np.flatnonzero(tokens != clean)
    return Batch(tokens, positions, np.flatnonzero(noisy), masked, clean[masked], np.concatenate(visible))


def _noised(
    example: Example, span: Span, noise: Noise, rng: np.random.Generator, block_length: int
) -> tuple[NDArray[np.int64], ...]:
    """One sample's flat (tokens, tokens before noise, positions, is noisy)."""
    copy, block = np.array(span.rows()).T
    positions = (block[:, None] * block_length + np.arange(block_length)).reshape(-1)
    copy = np.repeat(copy, block_length)
    clean, maskable = example.tokens[positions], example.maskable[positions]
    tokens = clean.copy()
    for number in range(1, span.copies + 1):
        here = copy == number
        tokens[here] = np.where(noise.draw(rng, maskable[here]), noise.mask_id, tokens[here])
    return tokens, clean, positions, copy != CLEAN


class BlockAttention:
    """Attention of a flat batch in which whole blocks see whole blocks; a `KeyValues` for [T, heads, head_dim].

    Each block's keys are gathered, so that all blocks attend in one batched product of one shape whatever the samples
    are. Written out as products and a softmax on a CPU: with so few keys its backward takes half the time of
    `scaled_dot_product_attention`, which a GPU gets.
    """

    def __init__(self, visible: Tensor, block_length: int, dtype: torch.dtype) -> None:
        """`visible` [R, W] as in `Batch`."""
        self.block_length = block_length
        self.fused = visible.is_cuda
        self.seen = visible.clamp(min=0).flatten()
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(visible < 0, -torch.inf)
        self.bias = bias.repeat_interleave(block_length, dim=1)[:, None, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG002
        """See `KeyValues`."""
        (tokens, heads, size), kv_heads = query.shape, key.shape[1]
        blocks, share = tokens // self.block_length, heads // kv_heads
        query = (query * size**-0.5).view(blocks, self.block_length, kv_heads, share, size).permute(0, 2, 3, 1, 4)
        query = query.reshape(blocks * kv_heads, share * self.block_length, size)
        attended = self._fused if self.fused else self._written_out
        out = attended(query, self._gather(key, blocks), self._gather(value, blocks), kv_heads)
        out = out.view(blocks, kv_heads, share, self.block_length, size).permute(0, 3, 1, 2, 4)
        return out.reshape(tokens, heads, size)

    def _written_out(self, query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> Tensor:
        """Queries [R * kv_heads, Q, d], scaled, on keys and values [R * kv_heads, S, d] -> [R * kv_heads, Q, d]."""
        scores = torch.bmm(query, key.mT).unflatten(0, (-1, kv_heads))
        return torch.bmm((scores + self.bias).softmax(dim=-1).flatten(0, 1), value)

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> Tensor:
        """As `_written_out`, without scores in memory."""
        query, key, value = (x.unflatten(0, (-1, kv_heads)) for x in (query, key, value))
        bias = self.bias.to(query.dtype).expand(-1, kv_heads, query.shape[2], -1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0).flatten(0, 1)

    def _gather(self, x: Tensor, blocks: int) -> Tensor:
        """[T, kv_heads, d] -> [R * kv_heads, W * block_length, d]: what each block sees."""
        kv_heads, size = x.shape[1:]
        by_block = x.view(blocks, self.block_length, kv_heads, size).transpose(1, 2).reshape(blocks, -1)
        seen = by_block.index_select(0, self.seen).view(blocks, -1, kv_heads, self.block_length, size)
        return seen.transpose(1, 2).reshape(blocks * kv_heads, -1, size)


def padded(indices: NDArray[np.int64], step: int) -> Tensor:
    """Indices, the last repeated up to a multiple of `step`: oneDNN prepares anew for every number of rows."""
    missing = -len(indices) % step if len(indices) else 0
    return torch.from_numpy(np.pad(indices, (0, missing), mode="edge" if missing else "constant"))


def masked_logits(
    model: LLaDA2Model, batch: Batch, policy: RoutingPolicy, experts: ExpertExecutor, block_length: int
) -> Tensor:
    """Logits [M, vocab] at the batch's masked tokens. The last layer's feed-forward runs on noisy blocks only."""
    device = model.lm_head.weight.device
    tokens = torch.from_numpy(batch.tokens).to(device)
    hidden = model.model.word_embeddings(tokens)
    forward = Forward(
        info=ForwardInfo(Phase.SCORE),
        positions=torch.from_numpy(batch.positions).to(device),
        block_ids=torch.arange(len(tokens), device=device) // block_length,
        key_values=BlockAttention(torch.from_numpy(batch.visible).to(device), block_length, hidden.dtype),
        policy=policy,
        experts=experts,
    )
    experts.begin(forward.info)
    *layers, last = model.layers
    angles = rotary_angles(forward.positions, model.config.rotary, model.config.rope_theta, hidden.dtype)
    for layer in layers:
        hidden = layer(hidden, angles, forward)
    hidden = hidden + last.attention(last.input_layernorm(hidden), angles, forward.key_values)
    rows = last_layer_rows(batch, block_length)
    hidden = hidden.index_select(0, torch.from_numpy(rows).to(device))
    normed = last.post_attention_layernorm(hidden)
    hidden = hidden + last.mlp(normed, torch.arange(len(rows), device=device) // block_length, policy, experts)
    at_masked = padded(np.searchsorted(rows, batch.masked), 128).to(device)
    return model.logits(model.model.norm(hidden.index_select(0, at_masked)))[: len(batch.masked)]


def last_layer_rows(batch: Batch, block_length: int, step: int = 8) -> NDArray[np.int64]:
    """Tokens of the noisy blocks, and of as many clean ones as make their number a multiple of `step`."""
    blocks = np.unique(batch.noisy // block_length)
    others = np.setdiff1d(np.arange(len(batch.visible)), blocks)
    blocks = np.sort(np.concatenate((blocks, others[: -len(blocks) % step])))
    return (blocks[:, None] * block_length + np.arange(block_length)).reshape(-1)


def denoising_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """Mean cross-entropy over the masked tokens, and the share of them that the argmax gets right."""
    targets = torch.from_numpy(batch.targets)
    right = float((logits.detach().argmax(dim=-1) == targets).float().mean())
    return F.cross_entropy(logits, targets), right
