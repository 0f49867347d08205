"""Random weights whose routing behaves as a trained model's.

What a router sees of a position is made of three parts, so that the spread of routing over positions and its change
over denoising steps can be set apart:

- *shared*: a direction that every embedding carries. Its image in a router is a popularity of experts, the same always.
- *position*: what the heads of layer 0 bring from fixed distances of a block and more ahead. It differs between the
  positions of a block and stays as it is while the block is denoised.
- *token*: the rest of the position's own embedding. It is the same for all masks, and new when a token takes its place.

The LM head sees neither the shared direction nor what all masks have in common, so that answers vary as the prompt's
tokens do, and never favours the eos, so that they have the length asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod, sqrt

import torch
from torch import Tensor

from offload_engine.errors import UsageError
from offload_engine.model.config import ModelConfig
from tools.sharded_writer import Blank

CHUNK = 2**20
"""Elements drawn at a time, at most, in whole rows; part of what the bytes depend on."""
SHARED = 0.2
"""Share of the shared direction in what a router sees."""
ROUTER_GAIN = 1.0
"""Standard deviation of a router's logits."""
BRANCH_GAIN = 0.2
"""Of what layers add to the residual stream, layer 0's attention excepted: 20 of them should not outweigh it."""
DISTANCES = (32, 48, 64, 96)
"""How far back the heads of layer 0 look, by turns: a block or more, where tokens no longer change."""
SHARPNESS = 40.0
"""Attention logit of layer 0 at its distance; the next position is 4 lower."""
LEAST_SIMILAR, MOST_SIMILAR = 0.1, 0.95
"""Without a share of the position all answers would be the same few tokens, without one of the token none differ."""
WIDEST_BIAS = 1.0
"""A bias that far apart outweighs every router."""

Adjust = Callable[[Tensor, int], Tensor]
"""Given standard normal rows of a tensor and the index of the first: what the rows are."""


@dataclass(frozen=True, slots=True)
class RoutingStatistics:
    """What decides how routing spreads and how fast it changes.

    The defaults come near what is reported of LLaDA2.0-mini (REFERENCE §3): 69.5 and 16.6 unique experts, a CV of 16
    to 18 %, and a cosine of 0.985 between the expert counts of adjacent steps.
    Raises `UsageError` for a value out of range.
    """

    similarity: float = 0.5
    """Share of the position in position and token together: higher is more alike from step to step."""
    bias_spread: float = 0.1
    """Standard deviation of `expert_bias`: higher is fewer experts per block."""

    def __post_init__(self) -> None:
        for option, value, least, most in (
            ("--similarity", self.similarity, LEAST_SIMILAR, MOST_SIMILAR),
            ("--bias-spread", self.bias_spread, 0.0, WIDEST_BIAS),
        ):
            if not least <= value <= most:
                raise UsageError(f"{option} is {value:g}; wanted a number from {least:g} to {most:g}")


class Weights:
    """The weights that a seed stands for. Equal seeds give equal bytes on one kind of CPU and build of torch, whatever
    the shard size, and fewer layers are the first layers of more.
    """

    def __init__(self, config: ModelConfig, seed: int, statistics: RoutingStatistics) -> None:
        self.config, self.seed, self.statistics = config, seed, statistics
        size = config.hidden_size
        self._shared = _unit(self._normal("shared direction", size))
        self._mask = self._normal("mask", size)
        self._token = (1 - SHARED) * (1 - statistics.similarity)
        """Share of the token in what a router sees."""
        first = "model.layers.0.attention."
        self._special: dict[str, Adjust] = {
            "model.word_embeddings.weight": self._embeddings,
            "lm_head.weight": self._lm_head,
            f"{first}query_key_value.weight": self._query_key_value,
            f"{first}dense.weight": self._bring,
            f"{first}query_layernorm.weight": self._pick_frequencies,
            f"{first}key_layernorm.weight": self._pick_frequencies,
        }

    def draw(self, blank: Blank) -> Iterator[Tensor]:
        """The tensor's rows in order, in pieces of its dtype."""
        adjust = self._special.get(blank.name) or self._ordinary(blank)
        generator = self._generator(blank.name)
        rows, width = prod(blank.shape[:-1]), blank.shape[-1]
        step = max(1, CHUNK // width)
        for start in range(0, rows, step):
            drawn = torch.empty(min(step, rows - start), width).normal_(generator=generator)
            yield adjust(drawn, start).to(blank.dtype)

    def _ordinary(self, blank: Blank) -> Adjust:
        """Unit gain, 1 / sqrt(fan_in); norms are 1."""
        if "norm" in blank.name:
            return lambda rows, _start: rows.fill_(1.0)
        if blank.name.endswith("expert_bias"):
            return lambda rows, _start: rows.mul_(self.statistics.bias_spread)
        gain = 1.0
        if blank.name.endswith("mlp.gate.weight"):
            gain = ROUTER_GAIN
        elif blank.name.endswith(("down_proj.weight", "attention.dense.weight")):
            gain = BRANCH_GAIN
        spread = gain / sqrt(blank.shape[-1])
        return lambda rows, _start: rows.mul_(spread)

    def _embeddings(self, rows: Tensor, start: int) -> Tensor:
        _set_row(rows, self.config.mask_token_id, start, self._mask)
        return rows.mul_(sqrt(self._token)).add_(self._shared * sqrt(SHARED * self.config.hidden_size))

    def _lm_head(self, rows: Tensor, start: int) -> Tensor:
        rows = _without(_without(rows, self._shared), _unit(_without(self._mask[None], self._shared)[0]))
        eos = self.config.eos_token_id
        _set_row(rows, eos if isinstance(eos, int) else None, start, torch.zeros(()))
        return rows.mul_(1 / sqrt(self.config.hidden_size))

    def _query_key_value(self, rows: Tensor, start: int) -> Tensor:
        """Queries and keys answer to the shared direction with a phase per head, whose rotary distance is the head's;
        values see the rest.
        """
        config = self.config
        rows.mul_(1 / sqrt(config.hidden_size))
        phases = [self._phase(DISTANCES[head % len(DISTANCES)]) for head in range(config.num_attention_heads)]
        phases += [self._phase(0)] * config.num_key_value_heads
        phase = torch.cat(phases)[start : start + len(rows)]
        seeing = rows[len(phase) :]
        seeing.copy_(_without(seeing, self._shared))
        rows[: len(phase)] += phase[:, None] * self._shared
        return rows

    def _bring(self, rows: Tensor, _start: int) -> Tensor:
        """Tokens from afar, of which the norm has left `token / (token + SHARED)`, become the position's share."""
        position = (1 - SHARED) * self.statistics.similarity
        return rows.mul_(sqrt(position * (self._token + SHARED) / self._token / rows.shape[-1]))

    def _pick_frequencies(self, rows: Tensor, _start: int) -> Tensor:
        """The norm's gain: only the fast rotary frequencies count, and their logit reaches `SHARPNESS`."""
        gain = sqrt(SHARPNESS / sqrt(self.config.head_dim))
        picked = torch.zeros(self.config.head_dim)
        picked[self._fast()] = gain
        return rows.copy_(picked)

    def _fast(self) -> Tensor:
        """Dimensions of a head that the fastest quarter of the rotary frequencies turns, [2, n]: cosines, sines."""
        cosines = torch.arange(max(1, self.config.rotary // 8))
        return torch.stack((cosines, cosines + self.config.rotary // 2))

    def _phase(self, distance: int) -> Tensor:
        """[head_dim]: a query that meets phase 0 as a key best at `distance` positions before its own."""
        cosines, sines = self._fast()
        angles = distance * self.config.rope_theta ** (-2.0 * cosines / self.config.rotary)
        phase = torch.zeros(self.config.head_dim)
        phase[cosines], phase[sines] = angles.cos(), -angles.sin()
        return phase

    def _normal(self, name: str, size: int) -> Tensor:
        return torch.empty(size).normal_(generator=self._generator(name))

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))


def _unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector, dim=0)


def _without(rows: Tensor, direction: Tensor) -> Tensor:
    """`rows` [n, H] less their share of the unit vector `direction` [H]."""
    return rows - torch.outer(rows @ direction, direction)


def _set_row(rows: Tensor, index: int | None, start: int, values: Tensor) -> None:
    """Row `index` of a tensor, if it is among `rows`, which begin at `start`."""
    if index is not None and start <= index < start + len(rows):
        rows[index - start] = values
