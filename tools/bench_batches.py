"""Bytes moved and time per token as the batch grows: the same requests answered 1, 2, 4 and 8 at a time.

    python -m tools.bench_batches --model DIR --gpu-mem 7.8GB --routing dmoe

Every batch size has a process and an engine of its own, opened cold; sizes take turns, in rounds. A first pass over as
many other requests fills the cache and is not counted; what is counted includes the prefills. Prompts are random and
have nothing in common; with `--samples` all requests of a pass ask for a sample of the answer to one prompt, as for a
vote or the best of many.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product

import click

from offload_engine.cli.errors import ReportingCommand
from offload_engine.cli.progress import RUNS, Progress
from offload_engine.config import EngineConfig
from offload_engine.core import Phase, SamplingParams
from offload_engine.decode.state import never
from offload_engine.engine.assembly import find_source
from offload_engine.engine.engine import Engine

BLOCK = 32
Asked = tuple[Sequence[int], SamplingParams]
"""A prompt, and how it is to be answered."""
MEDIANS = ("ms_per_token", "mb_per_token", "hit_rate", "stall_share", "lanes")


@dataclass(frozen=True, slots=True)
class Measured:
    """One pass over all prompts with one batch size."""

    batch_size: int
    tokens: int
    forwards: int
    seconds: float
    bytes_moved: int
    hit_rate: float
    slots: int
    stall_share: float
    lanes: float
    """That shared a denoising forward, on average."""

    @property
    def ms_per_token(self) -> float:
        """Milliseconds per new token."""
        return 1000 * self.seconds / self.tokens

    @property
    def mb_per_token(self) -> float:
        """Megabytes of experts moved per new token."""
        return self.bytes_moved / self.tokens / 1e6


def prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Random token ids; the vocabulary's last ids, which are special, are left out."""
    drawn = random.Random(seed)
    return [[drawn.randrange(max(1, vocab - 8)) for _ in range(length)] for _ in range(count)]


def samples(prompt: Sequence[int], count: int, params: SamplingParams) -> list[Asked]:
    """`count` requests for an answer to the same prompt, at temperature 1, each with a seed of its own."""
    return [(prompt, params.model_copy(update={"temperature": 1.0, "seed": seed})) for seed in range(count)]


def answer(engine: Engine, asked: Sequence[Asked]) -> int:
    """Answer all, as many at a time as the engine was made for; how many tokens that makes."""
    tokens, waiting = 0, enumerate(asked)
    with engine.session() as session:
        while True:
            while session.has_room and (following := next(waiting, None)):
                number, (prompt, params) = following
                session.enter(number, prompt, params, never)
            if session.empty:
                return tokens
            for _number, outcome in session.advance():
                if isinstance(outcome, Exception):
                    raise outcome
                tokens += 0 if outcome.completion is None else len(outcome.completion.token_ids)


def measure(config: EngineConfig, first: Sequence[Asked], asked: Sequence[Asked]) -> Measured:
    """Answer `first` to warm up, then `asked`, with `config.batch_size`; only the second pass counts."""
    with Engine.from_pretrained(config=config) as engine:
        answer(engine, first)
        before, began = engine.stats.snapshot(), time.perf_counter()
        tokens = answer(engine, asked)
        seconds, stats = time.perf_counter() - began, engine.stats.since(before)
        return Measured(
            batch_size=config.batch_size,
            tokens=tokens,
            forwards=sum(stats.forwards.values()),
            seconds=seconds,
            bytes_moved=stats.bytes_moved,
            hit_rate=stats.hit_rate or 0.0,
            slots=engine.plan.slots,
            stall_share=stats.stall_share or 0.0,
            lanes=stats.denoise_steps / stats.forwards[Phase.DENOISE],
        )


def measure_apart(config: EngineConfig, first: Sequence[Asked], asked: Sequence[Asked]) -> Measured:
    """`measure` in a fresh process: what an engine leaves behind in one would be taken from the next one's slots."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, config, first, asked).result()


def table(rows: Sequence[Sequence[Measured]]) -> str:
    """Medians over the rounds, a line per batch size, as Markdown."""
    lines = [
        "| batch | together | slots | ms / token | MB moved / token | hit rate | stalled |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in sorted({one.batch_size for row in rows for one in row}):
        found = [one for row in rows for one in row if one.batch_size == size]
        median = {name: statistics.median(getattr(one, name) for one in found) for name in MEDIANS}
        lines.append(
            f"| {size} | {median['lanes']:.1f} | {found[0].slots} | {median['ms_per_token']:.1f} "
            f"| {median['mb_per_token']:.2f} | {median['hit_rate'] * 100:.1f} % | {median['stall_share'] * 100:.1f} % |"
        )
    return "\n".join(lines)


def batch_sizes(_context: click.Context, _option: click.Parameter, text: str) -> list[int]:
    """The numbers of `--batches`."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise click.BadParameter(f"{text!r}; wanted batch sizes from 1 on, such as 1,2,4")
    return [int(word) for word in words]


@click.command(cls=ReportingCommand, help=(__doc__ or "").replace("    python", "\b\n    python", 1))
@click.option("--model", metavar="DIR", help="Checkpoint.  [default: the built-in model]")
@click.option("--gpu-mem", required=True, help="Budget of each engine.")
@click.option("--expert-mem", help="Cap of the slots alone, which gives all sizes equally many.")
@click.option("--routing", default="dmoe", show_default=True)
@click.option("--batches", default="1,2,4,8", show_default=True, callback=batch_sizes, help="Batch sizes.")
@click.option("--lanes-together", default="auto", show_default=True, help="Of a batch; auto or a number.")
@click.option("--prompts", "count", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts per pass.")
@click.option("--blocks", type=click.IntRange(min=1), default=2, show_default=True, help="Of 32 tokens, per answer.")
@click.option("--steps", type=click.IntRange(1, BLOCK), default=8, show_default=True, help="Per block.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--samples", "sampled", is_flag=True, help="Of one prompt, instead of different prompts.")
@click.option("--rounds", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Compute threads.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")
@click.option("--json", "as_json", is_flag=True, help="Every pass as JSON instead of the table.")
def main(
    model: str | None,
    gpu_mem: str,
    expert_mem: str | None,
    routing: str,
    batches: Sequence[int],
    lanes_together: str,
    count: int,
    blocks: int,
    steps: int,
    prompt_tokens: int,
    sampled: bool,
    rounds: int,
    threads: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """See the module."""
    context = (prompt_tokens // BLOCK + blocks + 1) * BLOCK
    params = SamplingParams(max_new_tokens=blocks * BLOCK, steps=steps, threshold=1.0)
    rows: list[list[Measured]] = [[] for _ in range(rounds)]
    with Progress("passes", rounds * len(batches), RUNS, every=0, still=True) as progress:
        for number, size in product(range(rounds), batches):
            progress.show(progress.done, f"round {number + 1} of {rounds}, batches of {size}")
            config = EngineConfig.build(
                None, model=model, gpu_mem=gpu_mem, expert_mem=expert_mem, routing=routing, max_context=context,
                batch_size=size, lanes_together=lanes_together, threads=threads, hot_set="off",
            )  # fmt: skip
            drawn = prompts(2 * count, prompt_tokens, find_source(config).config.vocab_size, seed)
            passes = [
                samples(part[0], count, params) if sampled else [(prompt, params) for prompt in part]
                for part in (drawn[count:], drawn[:count])
            ]
            rows[number].append(measure_apart(config, *passes))
            progress.done += 1
    print(json.dumps([[asdict(one) for one in row] for row in rows]) if as_json else table(rows))


if __name__ == "__main__":
    main()
