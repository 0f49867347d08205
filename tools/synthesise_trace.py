"""Writes a routing trace without a model: router logits drawn at random, routed by the real policies.

A stand-in for full-size recordings, in which what eviction and prediction live on is set by hand. A token's logits in a
layer are a weighted sum of standard normal vectors over the experts:

- undecided: one that all mask tokens share in every block (what a block wants first), one of its place in the block;
- decided: one of its own, drawn when it is decided;
- both: one of the sequence, one of the block, and one that drifts from step to step (an AR(1) process), as attention
  moves every token.

Every step of a block decides an equal share of its tokens; the last is followed by a commit. The header's `model` says
that the trace is synthetic and how it was made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from offload_engine.core import ForwardInfo, Phase
from offload_engine.errors import OffloadError
from offload_engine.experts.ranked import standing
from offload_engine.routing import RouterShape, RoutingPolicy, make_policy
from offload_engine.trace import TraceHeader, TraceWriter

SHAPE = RouterShape(num_experts=256, top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5)
"""LLaDA2.0-mini's (REFERENCE §1)."""
EXPERT_BYTES = 3 * 2048 * 512 * 2


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each part of a token's logits counts; standard deviations."""

    mask: float
    place: float
    own: float
    topic: float
    block: float
    drift: float
    persistence: float
    """Correlation of the drifting part between adjacent steps."""


class Logits:
    """Router logits of one sequence, forward by forward."""

    def __init__(self, layers: int, tokens: int, weights: Weights, generator: torch.Generator) -> None:
        self.shape = (layers, tokens, SHAPE.num_experts)
        self.weights = weights
        self.generator = generator
        self.mask = self._normal(layers, 1, SHAPE.num_experts)
        self.topic = self._normal(layers, 1, SHAPE.num_experts)

    def open_block(self) -> None:
        """A block begins: nothing of it is decided."""
        layers, _tokens, experts = self.shape
        self.block = self._normal(layers, 1, experts)
        self.place = self._normal(*self.shape)
        self.own = self._normal(*self.shape)
        self.drift = self._normal(*self.shape)

    def forward(self, decided: Tensor) -> Tensor:
        """[layers, tokens, experts] float32 for the next forward, given which tokens are decided [tokens] bool."""
        weights = self.weights
        self.drift = weights.persistence * self.drift + (1 - weights.persistence**2) ** 0.5 * self._normal(*self.shape)
        undecided = weights.mask * self.mask + weights.place * self.place
        kind = torch.where(decided.view(1, -1, 1), weights.own * self.own, undecided)
        shared = weights.topic * self.topic + weights.block * self.block
        return kind + shared + weights.drift * self.drift

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)


def block_forwards(steps: int, tokens: int, generator: torch.Generator) -> Iterator[tuple[Phase, Tensor]]:
    """Each forward of a block with the tokens decided before it; the commit last."""
    order = torch.randperm(tokens, generator=generator)
    for step in range(steps + 1):
        decided = torch.zeros(tokens, dtype=torch.bool)
        decided[order[: tokens * step // steps]] = True
        yield Phase.COMMIT if step == steps else Phase.DENOISE, decided


def synthesise(writer: TraceWriter, policy: RoutingPolicy, logits: Logits, *, blocks: int, steps: int) -> None:
    """Write one sequence of `blocks` blocks; scores with three digits, which compress better."""
    _layers, tokens, _experts = logits.shape
    block_ids = torch.zeros(tokens, dtype=torch.int64)
    for block in range(blocks):
        logits.open_block()
        for step, (phase, decided) in enumerate(block_forwards(steps, tokens, logits.generator)):
            by_layer = logits.forward(decided)
            for layer, rows in zip(writer.header.layers, by_layer, strict=True):
                decision, info = policy(rows, None, block_ids), ForwardInfo(phase, block, step)
                (experts, sums), _learned, outlook = standing(decision, info)
                scores = [float(f"{score:.3g}") for score in sums]
                writer.record(info, layer, experts, scores, outlook.runners_up)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--routing", default="dmoe", help="Any routing policy, with its default parameters.")
@click.option("--moe-layers", type=click.IntRange(1, 1000), default=19, help="MoE layers; layer 0 is dense.")
@click.option("--blocks", type=click.IntRange(1), default=6, help="Blocks of the one sequence.")
@click.option("--steps", type=click.IntRange(1), default=8, help="Denoising steps per block.")
@click.option("--block-length", type=click.IntRange(1), default=32)
@click.option("--mask", type=click.FloatRange(0), default=1.2, help="Weight of what all mask tokens share.")
@click.option("--place", type=click.FloatRange(0), default=0.6, help="Weight of an undecided token's own part.")
@click.option("--own", type=click.FloatRange(0), default=1.2, help="Weight of a decided token's own part.")
@click.option("--topic", type=click.FloatRange(0), default=1.0, help="Weight of what the sequence's tokens share.")
@click.option("--block", type=click.FloatRange(0), default=0.3, help="Weight of what the block's tokens share.")
@click.option("--drift", type=click.FloatRange(0), default=0.4, help="Weight of the part that drifts.")
@click.option("--persistence", type=click.FloatRange(0, 1), default=0.95, help="Its correlation between steps.")
@click.option("--seed", type=click.IntRange(0), default=0)
def main(
    out: Path, routing: str, moe_layers: int, blocks: int, steps: int, block_length: int, seed: int, **weights: float
) -> None:
    """Write a synthetic routing trace to the new file OUT; gzip it afterwards to keep it."""
    generator = torch.Generator().manual_seed(seed)
    try:
        policy = make_policy(routing, SHAPE)
    except OffloadError as error:
        raise click.UsageError(str(error)) from None
    made = ", ".join(f"{name} {value:g}" for name, value in weights.items())
    header = TraceHeader(
        layers=tuple(range(1, moe_layers + 1)),
        num_experts=SHAPE.num_experts,
        top_k=SHAPE.top_k,
        expert_bytes=EXPERT_BYTES,
        routing=policy.name,
        block_length=block_length,
        model=f"synthetic, of no model: tools/synthesise_trace.py, {made}, {steps} steps, seed {seed}",
    )
    logits = Logits(moe_layers, block_length, Weights(**weights), generator)
    try:
        with TraceWriter(out, header) as writer:
            synthesise(writer, policy, logits, blocks=blocks, steps=steps)
    except OffloadError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {writer.records_written} records")


if __name__ == "__main__":
    main()
