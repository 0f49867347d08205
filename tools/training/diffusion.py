"""The block-diffusion objective (REFERENCE §4): what a training sequence looks like and what its positions may see.

On paper a sequence is [noisy | clean], both L long: a noisy block sees itself and the clean blocks before it, a clean
block itself and the clean blocks before it. Much of that is never looked at: noisy blocks that only repeat the
prompt, the last clean block, and attention from one sample to another. So a sample is laid out as the clean blocks
that some noisy block sees, followed by the noisy blocks that hold an answer (several noisings of them, if wanted, for
the price of one clean half); samples of equal layout form a group that attends in one batch, and everything but
attention runs over the flat tokens of all groups. The loss at masked positions is the same.
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
        rows = maskable.shape[:-1] + (1,)
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
class Group:
    """Samples of one layout inside a batch."""

    span: Span
    samples: int


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
    groups: tuple[Group, ...]


def span_of(example: Example, block_length: int, copies: int) -> Span:
    """The layout that an example needs."""
    first = int(example.maskable.argmax()) // block_length
    return Span(first, len(example.tokens) // block_length, copies)


def pack(samples: Sequence[tuple[Example, int]], noise: Noise, rng: np.random.Generator, block_length: int) -> Batch:
    """Noise and lay out (example, copies) pairs."""
    by_span: dict[Span, list[Example]] = {}
    for example, copies in samples:
        by_span.setdefault(span_of(example, block_length, copies), []).append(example)
    parts: list[tuple[NDArray[np.int64], ...]] = []
    groups = []
    for span in sorted(by_span, key=lambda s: (s.blocks, s.first, s.copies)):
        examples = by_span[span]
        groups.append(Group(span, len(examples)))
        parts.append(_pack_group(span, examples, noise, rng, block_length))
    tokens, clean, positions, noisy = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    masked = np.flatnonzero(tokens != clean)
    return Batch(tokens, positions, np.flatnonzero(noisy), masked, clean[masked], tuple(groups))


def _pack_group(
    span: Span, examples: list[Example], noise: Noise, rng: np.random.Generator, block_length: int
) -> tuple[NDArray[np.int64], ...]:
    """Flat (tokens, tokens before noise, positions, is noisy) of one group."""
    copy, block = np.array(span.rows()).T
    positions = (block[:, None] * block_length + np.arange(block_length)).reshape(-1)
    is_noisy = np.repeat(copy != CLEAN, block_length)
    clean = np.stack([example.tokens for example in examples])[:, positions]
    maskable = np.stack([example.maskable for example in examples])[:, positions] & is_noisy
    tokens = clean.copy()
    for number in range(1, span.copies + 1):
        columns = np.flatnonzero(np.repeat(copy == number, block_length))
        hit = noise.draw(rng, maskable[:, columns])
        tokens[:, columns] = np.where(hit, noise.mask_id, tokens[:, columns])
    rows = len(examples)
    return tokens.reshape(-1), clean.reshape(-1), np.tile(positions, rows), np.tile(is_noisy, rows)


class GroupedAttention:
    """Attention of a flat batch, group by group; a `KeyValues` whose queries and keys are [T, heads, head_dim].

    Written out as products and a softmax: with these short sequences its backward takes half the time of
    `scaled_dot_product_attention` on a CPU.
    """

    def __init__(self, groups: Sequence[Group], block_length: int, dtype: torch.dtype) -> None:
        self.pieces: list[tuple[int, int, Tensor]] = []
        for group in groups:
            mask = torch.from_numpy(np.kron(group.span.block_mask(), np.ones((block_length,) * 2, dtype=bool)))
            bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
            self.pieces.append((group.samples, mask.shape[0], bias))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ARG002
        """See `KeyValues`."""
        sizes = [samples * length for samples, length, _ in self.pieces]
        parts = zip(self.pieces, query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        return torch.cat([_attend(samples, length, bias, q, k, v) for (samples, length, bias), q, k, v in parts])


def _attend(samples: int, length: int, bias: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Masked attention inside each of `samples` sequences of `length` tokens; queries that share a key are folded."""
    kv_heads, size = key.shape[1:]
    share = query.shape[1] // kv_heads
    query = query.view(samples, length, kv_heads, share, size).permute(0, 2, 3, 1, 4)
    query = query.reshape(samples * kv_heads, share * length, size) * size**-0.5
    key, value = (
        x.view(samples, length, kv_heads, size).transpose(1, 2).reshape(samples * kv_heads, length, size)
        for x in (key, value)
    )
    scores = torch.bmm(query, key.mT).view(-1, share, length, length) + bias
    out = torch.bmm(scores.softmax(dim=-1).view(-1, share * length, length), value)
    out = out.view(samples, kv_heads, share, length, size).permute(0, 3, 1, 2, 4)
    return out.reshape(samples * length, kv_heads * share, size)


def masked_logits(
    model: LLaDA2Model, batch: Batch, policy: RoutingPolicy, experts: ExpertExecutor, block_length: int
) -> Tensor:
    """Logits [M, vocab] at the batch's masked tokens. The last layer's feed-forward runs on noisy blocks only."""
    tokens = torch.from_numpy(batch.tokens)
    hidden = model.model.word_embeddings(tokens)
    forward = Forward(
        info=ForwardInfo(Phase.SCORE),
        positions=torch.from_numpy(batch.positions),
        block_ids=torch.arange(len(tokens)) // block_length,
        key_values=GroupedAttention(batch.groups, block_length, hidden.dtype),
        policy=policy,
        experts=experts,
    )
    experts.begin(forward.info)
    *layers, last = model.layers
    angles = rotary_angles(forward.positions, model.config.rotary, model.config.rope_theta, hidden.dtype)
    for layer in layers:
        hidden = layer(hidden, angles, forward)
    hidden = hidden + last.attention(last.input_layernorm(hidden), angles, forward.key_values)
    noisy = torch.from_numpy(batch.noisy)
    hidden = hidden.index_select(0, noisy)
    normed = last.post_attention_layernorm(hidden)
    block_ids = torch.arange(len(noisy)) // block_length
    hidden = hidden + last.mlp(normed, block_ids, policy, experts)
    at_masked = torch.from_numpy(np.searchsorted(batch.noisy, batch.masked))
    return model.logits(model.model.norm(hidden.index_select(0, at_masked)))


def denoising_loss(logits: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """Mean cross-entropy over the masked tokens, and the share of them that the argmax gets right."""
    targets = torch.from_numpy(batch.targets)
    right = float((logits.detach().argmax(dim=-1) == targets).float().mean())
    return F.cross_entropy(logits, targets), right
