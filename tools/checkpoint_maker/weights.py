"""Random weights whose routing behaves as a trained model's.

What a router sees of a position is made of four parts, so that the spread of routing over positions, over the text and
over denoising steps can be set apart:

- *shared*: a direction that every embedding carries. Its image in a router is a popularity of experts, the same always.
- *topic*: what broad heads of layer 0 average over the text a block or two ahead. The positions of a block have most of
  it in common and keep it while the block is denoised; the next block's differs, another prompt's is unrelated.
- *position*: what sharp heads of layer 0 bring from fixed distances of a block and more ahead. It differs between the
  positions of a block and stays as it is while the block is denoised.
- *token*: the rest of the position's own embedding. Masks have none, so that nothing but the shared direction is the
  same in the first steps of all blocks; it comes when a token takes a mask's place.

Sharp and broad heads share their keys and the gains of the norms: the sharp ones' queries answer to the fast rotary
frequencies, the broad ones' to slow ones, and a key has both.

The LM head sees neither the shared direction nor the topic, so that answers vary as the prompt's tokens do, and never
favours the eos, so that they have the length asked for.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import pi, prod, sqrt

import torch
from torch import Tensor

from offload_engine.errors import UsageError
from offload_engine.model.config import ModelConfig
from tools.sharded_writer import Blank

CHUNK = 2**20
"""Elements drawn at a time, at most, in whole rows; part of what the bytes depend on."""
AGREED = 0.4
"""Share of topic and shared direction, on which the positions of a block agree, in what a router sees."""
ROUTER_GAIN = 1.0
"""Standard deviation of a router's logits."""
BRANCH_GAIN = 0.2
"""Of what layers add to the residual stream, layer 0's attention excepted: 20 of them should not outweigh it."""
DISTANCES = (32, 48, 64)
"""How far back the sharp heads of layer 0 look, by turns: a block or more, where tokens no longer change."""
SHARPNESS = 40.0
"""Attention logit of a sharp head at its distance; the next position is 4 lower."""
TURN = len(DISTANCES) + 1
"""Of so many heads in a row the last is a broad one; of so many dimensions of the residual stream, topics take one."""
TOPIC_DISTANCE, TOPIC_WIDTH = 64, 24.0
"""How far back a broad head looks, and the standard deviation of its window, in positions: a bell that ends about where
the current block begins. Masks in its tail bring nothing, since values don't see the shared direction.
"""
TOPIC_TOKENS = 2 * sqrt(pi) * TOPIC_WIDTH
"""The mean over that window of independent tokens has a variance that many times smaller than theirs."""
SLOWEST, FASTEST = 0.02, 0.5
"""Radians that the broad heads' rotary frequencies turn over the window's standard deviation. Without the slower ones
other windows, hundreds of positions further back, would answer as well; with them none does in 4096 tokens.
"""
LEAST_SIMILAR, MOST_SIMILAR = 0.1, 0.95
"""Without a share of the position all answers would be the same few tokens, without one of the token none differ."""
MOST_TOPIC = 0.95
"""Queries and keys of layer 0 are made of the shared direction."""
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

    similarity: float = 0.4
    """Share of the position in position and token together: higher is more alike from step to step."""
    bias_spread: float = 0.05
    """Standard deviation of `expert_bias`: higher is fewer experts per block, and the same ones in all blocks."""
    topic: float = 0.75
    """Share of the topic in topic and shared direction together: higher is less alike from block to block."""

    def __post_init__(self) -> None:
        for option, value, least, most in (
            ("--similarity", self.similarity, LEAST_SIMILAR, MOST_SIMILAR),
            ("--bias-spread", self.bias_spread, 0.0, WIDEST_BIAS),
            ("--topic", self.topic, 0.0, MOST_TOPIC),
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
        self._common = AGREED * (1 - statistics.topic)
        self._token = (1 - AGREED) * (1 - statistics.similarity)
        """Shares of the shared direction and of the token in what a router sees."""
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
        rows = _without(rows, self._shared)
        _clear_row(rows, self.config.mask_token_id, start)
        return rows.mul_(sqrt(self._token)).add_(self._shared * sqrt(self._common * self.config.hidden_size))

    def _lm_head(self, rows: Tensor, start: int) -> Tensor:
        unseen = self._topic_dimensions()
        rows[:, :unseen] = 0.0
        rows[:, unseen:] = _without(rows[:, unseen:], _unit(self._shared[unseen:]))
        eos = self.config.eos_token_id
        _clear_row(rows, eos if isinstance(eos, int) else None, start)
        return rows.mul_(1 / sqrt(self.config.hidden_size))

    def _query_key_value(self, rows: Tensor, start: int) -> Tensor:
        """Queries and keys are the shared direction with a phase per head, whose rotary distance is the head's; values
        see the rest.
        """
        config = self.config
        fast, slow = self._frequencies()
        phases = [
            self._phase(slow, TOPIC_DISTANCE) if head % TURN == TURN - 1 else self._phase(fast, DISTANCES[head % TURN])
            for head in range(config.num_attention_heads)
        ]
        phases += [self._phase(fast, 0) + self._phase(slow, 0)] * config.num_key_value_heads
        phase = torch.cat(phases)[start : start + len(rows)]
        rows[: len(phase)] = torch.outer(phase, self._shared)
        seeing = rows[len(phase) :]
        seeing.copy_(_without(seeing, self._shared).mul_(1 / sqrt(config.hidden_size)))
        return rows

    def _bring(self, rows: Tensor, start: int) -> Tensor:
        """Values, of which the norm has left `token / (token + common)`, become the position's and the topic's share;
        the latter in a few dimensions, which the LM head can leave out.
        """
        seen = self._token / (self._token + self._common)
        position = (1 - AGREED) * self.statistics.similarity
        topic = AGREED * self.statistics.topic * TOPIC_TOKENS * self.config.hidden_size / self._topic_dimensions()
        broad = torch.arange(rows.shape[-1]) // self.config.head_dim % TURN == TURN - 1
        columns = max(1, int(broad.sum()))
        topical = torch.arange(start, start + len(rows)) < self._topic_dimensions()
        from_broad = torch.where(topical, sqrt(topic / seen / columns), 0.0)[:, None]
        return rows.mul_(torch.where(broad, from_broad, sqrt(position / seen / (rows.shape[-1] - columns))))

    def _topic_dimensions(self) -> int:
        return self.config.hidden_size // TURN

    def _pick_frequencies(self, rows: Tensor, _start: int) -> Tensor:
        """The norm's gain: logits of sharp heads reach `SHARPNESS`, those of broad ones curve as their window does."""
        fast, slow = self._frequencies()
        curved = 1 / (TOPIC_WIDTH**2 * float(self._angles(slow).square().mean()))
        gains = torch.zeros(self.config.head_dim)
        for part, logit in ((fast, SHARPNESS), (slow, curved)):
            kept = len(part) / (len(fast) + len(slow))  # of a key, which has both; the norm weighs them alike
            gains[self._turned(part)] = sqrt(logit / sqrt(self.config.head_dim * kept))
        return rows.copy_(gains)

    def _frequencies(self) -> tuple[Tensor, Tensor]:
        """Rotary frequencies by number: the fastest quarter, and those that turn little over a topic's window."""
        numbers = torch.arange(self.config.rotary // 2)
        turns = self._angles(numbers) * TOPIC_WIDTH
        fast = max(1, self.config.rotary // 8)
        slow = numbers[(turns > SLOWEST) & (turns < FASTEST) & (numbers >= fast)]
        return numbers[:fast], slow if len(slow) else numbers[-1:]

    def _angles(self, frequencies: Tensor) -> Tensor:
        """Radians per position."""
        return self.config.rope_theta ** (-2.0 * frequencies / self.config.rotary)

    def _turned(self, frequencies: Tensor) -> Tensor:
        """Dimensions of a head that these frequencies turn, [2, n]: cosines, sines."""
        return torch.stack((frequencies, frequencies + self.config.rotary // 2))

    def _phase(self, frequencies: Tensor, distance: int) -> Tensor:
        """[head_dim]: a query that meets phase 0 as a key best at `distance` positions before its own."""
        angles = distance * self._angles(frequencies)
        phase = torch.zeros(self.config.head_dim)
        phase[self._turned(frequencies)] = torch.stack((angles.cos(), -angles.sin()))
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


def _clear_row(rows: Tensor, index: int | None, start: int) -> None:
    """Row `index` of a tensor becomes 0, if it is among `rows`, which begin at `start`."""
    if index is not None and start <= index < start + len(rows):
        rows[index - start] = 0.0
