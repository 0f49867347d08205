"""Accuracy of a tiny model on unseen word problems, decoded by block diffusion (REFERENCE §2), many at a time.

    python -m tools.evaluate_arithmetic offload_engine/assets/tiny --problems 1000

Takes an exported checkpoint or the `last.pt` of a run of `tools.train` (then its averaged weights). No KV cache: every
denoising step of a block computes the whole sequence under the block-causal mask, which for sequences this short is
cheaper than to keep one.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")  # one per shape; read when torch loads

import click
import torch
from safetensors.torch import load_file
from torch import Tensor

from offload_engine.cli.progress import PIECES, Progress
from offload_engine.config import EngineConfig
from offload_engine.core import ForwardInfo, Phase
from offload_engine.engine.assembly import choose_policy
from offload_engine.evaluate.arithmetic import Problem, problem
from offload_engine.model.attention import MaskedSequence, block_causal_mask
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward
from offload_engine.routing import RoutingPolicy
from tools.training import checkpoint
from tools.training.data import Vocabulary, prompt_text, vocabulary
from tools.training.export import from_published
from tools.training.trainer import Network


@dataclass(frozen=True)
class Decoding:
    """Decoding settings; the defaults are the official ones."""

    block: int = 32
    steps: int = 32
    threshold: float = 0.95
    max_blocks: int = 4
    """Blocks after the one that the prompt ends in."""


@dataclass
class Tally:
    """What a number of answers came to."""

    right: int = 0
    total: int = 0
    steps: int = 0

    def add(self, correct: bool, steps: int) -> None:
        """Count one answer."""
        self.right, self.total, self.steps = self.right + correct, self.total + 1, self.steps + steps

    def __str__(self) -> str:
        return f"{100 * self.right / self.total:5.1f} %  of {self.total:4d}   {self.steps / self.total:5.2f} steps"


@dataclass
class UniqueExperts:
    """Distinct experts per block: sums over denoising forwards, by layer."""

    sums: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    forwards: int = 0

    def add(self, chosen: dict[int, Tensor], rows: int, block: slice, active: Tensor) -> None:
        """Note the experts [rows * T, k] of each layer for the block's positions of the rows still denoised."""
        for layer, experts in chosen.items():
            here = experts.view(rows, -1, experts.shape[-1])[active, block].flatten(1)
            used = torch.zeros(len(here), 257, dtype=torch.bool).scatter_(1, here.where(here >= 0, 256), True)
            self.sums[layer] += int(used[:, :-1].sum())
        self.forwards += int(active.sum())


class Evaluator:
    """Decodes batches of prompts of equal length."""

    def __init__(self, network: Network, policy: RoutingPolicy, words: Vocabulary, decoding: Decoding) -> None:
        self.network, self.policy, self.words, self.decoding = network, policy, words, decoding
        self.unique = UniqueExperts()

    def _logits(self, tokens: Tensor, block: slice) -> Tensor:
        """[rows, T] -> logits [rows, block, vocab]."""
        rows, length = tokens.shape
        positions = torch.arange(length)
        mask = block_causal_mask(positions, self.decoding.block)
        forward = Forward(
            ForwardInfo(Phase.DENOISE),
            positions.expand(rows, -1),
            torch.arange(rows * length) // self.decoding.block,
            MaskedSequence(mask),
            self.policy,
            self.network.experts,
        )
        hidden = self.network.model(tokens, forward)
        return self.network.model.logits(hidden[:, block])

    @torch.inference_mode()
    def decode(self, prompts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [rows, T] and denoising steps [rows] for prompts [rows, P]."""
        size, (rows, prompt) = self.decoding.block, prompts.shape
        tokens = prompts
        steps = torch.zeros(rows, dtype=torch.int64)
        done = torch.zeros(rows, dtype=torch.bool)
        for index in range(prompt // size, prompt // size + 1 + self.decoding.max_blocks):
            block = slice(index * size, (index + 1) * size)
            fresh = torch.full((rows, block.stop - tokens.shape[1]), self.words.mask)
            tokens = torch.cat((tokens, fresh), dim=1)
            tokens[done, block] = self.words.eos
            steps += self._denoise(tokens, block, prompt, done)
            done |= (tokens[:, max(prompt, block.start) : block.stop] == self.words.eos).any(dim=1)
            if done.all():
                break
        return tokens, steps

    def _denoise(self, tokens: Tensor, block: slice, prompt: int, done: Tensor) -> Tensor:
        """Denoise one block of `tokens` in place; the steps each row took."""
        schedule, taken = self.decoding.steps, torch.zeros(len(tokens), dtype=torch.int64)
        for step in range(schedule):
            active = ~done & (tokens[:, block] == self.words.mask).any(dim=1) & ~self._ended(tokens, prompt)
            if not active.any():
                break
            rows = active.nonzero().squeeze(1)
            view = tokens[rows, block]
            logits = self._logits(tokens[rows], block)
            self.unique.add(
                self.network.experts.last_experts, len(rows), block, torch.ones(len(rows), dtype=torch.bool)
            )
            probabilities = logits.softmax(dim=-1)
            probabilities[..., self.words.mask] = -1
            confidence, best = probabilities.max(dim=-1)
            masked = view == self.words.mask
            confidence = confidence.masked_fill(~masked, -1)
            quota = self.decoding.block // schedule + (step < self.decoding.block % schedule)
            ranks = confidence.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
            accepted = confidence > self.decoding.threshold
            few = accepted.sum(dim=1, keepdim=True) < quota
            accepted = torch.where(few, ranks < quota, accepted) & masked
            tokens[rows, block] = torch.where(accepted, best, view)
            taken += active
        return taken

    def _ended(self, tokens: Tensor, prompt: int) -> Tensor:
        """Rows whose answer holds an eos with nothing masked before it."""
        answer = tokens[:, prompt:]
        ends = answer == self.words.eos
        before = ends.int().cumsum(dim=1) == 0
        return ends.any(dim=1) & ~((answer == self.words.mask) & before).any(dim=1)


def load_network(path: Path) -> Network:
    """The network of an exported directory, or of a training checkpoint (its averaged weights); in bfloat16."""
    if path.is_dir():
        config = ModelConfig.from_file(path / "config.json")
        weights, biases = from_published(load_file(path / "model.safetensors"), config)
    else:
        state = checkpoint.load(path)
        config = ModelConfig.from_dict(state["config"])
        weights, biases = state["trainer"]["average"], state["trainer"]["biases"]
    network = Network(config)
    missing = dict(network.named_weights())
    with torch.no_grad():
        for name, weight in weights.items():
            missing.pop(name).copy_(weight)
        for layer, router in network.routers():
            router.expert_bias = biases[str(layer)].float()
    if missing:
        raise ValueError(f"{path}: lacks {sorted(missing)}")
    return network.cast(torch.bfloat16)


def answer_text(words: Vocabulary, row: Tensor) -> str:
    """The text of answer ids up to the first eos."""
    ids = row.tolist()
    ids = ids[: ids.index(words.eos)] if words.eos in ids else ids
    return words.tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[no-any-return]


def boxed(text: str) -> str:
    """What the last \\boxed{} holds, or nothing."""
    return text.rsplit("\\boxed{", 1)[-1].split("}", 1)[0].strip() if "\\boxed{" in text else ""


Asked = tuple[Problem, list[int]]
"""A problem and its prompt ids."""


def by_length(problems: Iterable[Problem], words: Vocabulary) -> dict[int, list[Asked]]:
    """Problems with their prompt ids, grouped by the prompt's length."""
    groups: dict[int, list[Asked]] = defaultdict(list)
    for given in problems:
        ids = words.encode(prompt_text(given.question))
        groups[len(ids)].append((given, ids))
    return groups


def in_batches(groups: Mapping[int, Sequence[Asked]], size: int) -> Iterator[tuple[int, Sequence[Asked]]]:
    """At most `size` problems of one length at a time, with that length."""
    for length, group in groups.items():
        for start in range(0, len(group), size):
            yield length, group[start : start + size]


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--tokenizer", type=click.Path(exists=True, dir_okay=False), help="Default: beside the checkpoint.")
@click.option("--problems", default=1000, show_default=True)
@click.option("--seed", default=2, show_default=True, help="2 is the evaluation set; 1 was trained on.")
@click.option("--steps", default=32, show_default=True)
@click.option("--threshold", default=0.95, show_default=True)
@click.option("--routing", default="original", show_default=True)
@click.option("--top-p", default=0.6, show_default=True)
@click.option("--min-experts", type=click.IntRange(min=1), help="[default: the checkpoint's, else 16]")
@click.option("--batch", default=64, show_default=True)
@click.option("--show", default=0, show_default=True, help="Print this many wrong answers.")
@click.option("--threads", default=1, show_default=True)
def main(path: Path, tokenizer: str | None, problems: int, seed: int, **options: Any) -> None:
    """Decode PROBLEMS unseen problems and report what came of it."""
    torch.set_num_threads(options["threads"])
    network = load_network(path)
    words = vocabulary(tokenizer or str(path / "tokenizer.json"))
    asked = EngineConfig(routing=options["routing"], top_p=options["top_p"], min_experts=options["min_experts"])
    policy, _ = choose_policy(asked, network.model.config)
    decoding = Decoding(steps=options["steps"], threshold=options["threshold"])
    evaluator = Evaluator(network, policy, words, decoding)
    tallies: dict[str, Tally] = defaultdict(Tally)
    wrong: list[str] = []
    groups = by_length((problem(seed, index) for index in range(problems)), words)
    with Progress("problems", problems, PIECES) as progress:
        for length, part in in_batches(groups, options["batch"]):
            tokens, steps = evaluator.decode(torch.tensor([ids for _, ids in part]))
            for (given, _), row, taken in zip(part, tokens[:, length:], steps.tolist(), strict=True):
                text = answer_text(words, row)
                correct = boxed(text) == given.gold
                for key in ("all", f"{given.steps} steps", given.kind):
                    tallies[key].add(correct, taken)
                if not correct:
                    wrong.append(f"Q {given.question}\nA {text}\nwanted {given.answer}\n")
            progress.advance(len(part))
    report(tallies, evaluator.unique)
    print("\n".join(wrong[: options["show"]]))


def report(tallies: dict[str, Tally], unique: UniqueExperts) -> None:
    """Print the tallies and the experts per block."""
    for key in sorted(tallies, key=lambda k: (k != "all", not k[0].isdigit(), k)):
        print(f"{key:16} {tallies[key]}")
    per_layer = {layer: total / unique.forwards for layer, total in sorted(unique.sums.items())}
    mean = sum(per_layer.values()) / len(per_layer)
    print("unique experts per block", f"{mean:.1f}", {layer: round(value, 1) for layer, value in per_layer.items()})


if __name__ == "__main__":
    main()
