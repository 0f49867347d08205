"""Train a LLaDA2-MoE from scratch on generated arithmetic (see tools/training; REFERENCE §4).

python -m tools.train --out runs/tiny --tokenizer offload_engine/assets/tiny/tokenizer.json --minutes 90
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "20000")  # one per shape; read when torch loads

import click
import torch

from offload_engine.model.config import ModelConfig
from offload_engine.routing import RoutingOptions, RoutingPolicy, make_policy
from tools.training import checkpoint
from tools.training.checkpoint import Clock, Schedule
from tools.training.data import Recipe, batches, vocabulary
from tools.training.export import config_json
from tools.training.progress import StepProgress
from tools.training.routing import FastTopK
from tools.training.trainer import Optimisation, StepReport, Trainer

LAST, LOG = "last.pt", "log.jsonl"


def routing_policy(name: str, config: ModelConfig, options: RoutingOptions) -> RoutingPolicy:
    """The policy to train under; *original* in its fast form."""
    return FastTopK(config.router) if name == "original" else make_policy(name, config.router, options)


@dataclass
class Progress:
    """Averages since the last report, on stderr for people and in the log for programs."""

    log: Path
    schedule: Schedule
    clock: Clock | None
    first_step: int
    every: int = 50
    began: float = field(init=False)
    reports: list[StepReport] = field(default_factory=list)
    tokens: int = 0
    since: float = field(init=False)
    shown: StepProgress = field(init=False)

    def __post_init__(self) -> None:
        self.began = self.since = time.monotonic()
        self.shown = StepProgress(self.schedule.end or 0, first=self.first_step, every=self.every)

    def add(self, step: int, report: StepReport, tokens: int) -> None:
        """Note one step; report if it is time."""
        self.reports.append(report)
        self.tokens += tokens
        now = time.monotonic()
        self.shown.total = self._length(now, step + 1)
        self.shown.show(step + 1, self._remark(now))
        if (step + 1) % self.every == 0:
            self._write(step + 1, now)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.shown.done > self.first_step:
            self.shown.end()
        else:
            self.shown.close()

    def _remark(self, now: float) -> str:
        count = len(self.reports)
        loss, accuracy = (sum(getattr(r, name) for r in self.reports) / count for name in ("loss", "accuracy"))
        return f"loss {loss:.4f}, accuracy {accuracy:.4f}, {self.tokens / (now - self.since):.0f} tokens/s"

    def _write(self, steps: int, now: float) -> None:
        count, seconds = len(self.reports), now - self.since
        line = {
            "step": steps,
            "loss": round(sum(r.loss for r in self.reports) / count, 4),
            "accuracy": round(sum(r.accuracy for r in self.reports) / count, 4),
            "imbalance": round(sum(r.imbalance for r in self.reports) / count, 2),
            "factor": round(self.schedule.factor(steps), 4),
            "tokens_per_s": round(self.tokens / seconds),
            "ms_per_step": round(1000 * seconds / count),
            "minutes": round((now - self.began) / 60, 2),
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.reports, self.tokens, self.since = [], 0, now

    def _length(self, now: float, steps: int) -> int:
        """Steps of the whole run; until the clock sets its end, as many as its minutes allow at this speed."""
        if self.schedule.end is not None or self.clock is None:
            return self.schedule.end or 0
        elapsed = now - self.clock.started
        left = max(0.0, 60 * self.clock.minutes - elapsed)
        return steps + round(left * (steps - self.first_step) / elapsed)


@dataclass
class Run:
    """A training run and where it is kept."""

    out: Path
    trainer: Trainer
    recipe: Recipe
    schedule: Schedule
    recorded: dict[str, Any]
    """The settings, as `new_run` has them."""
    clock: Clock | None
    save_minutes: float

    def save(self) -> None:
        """Write the checkpoint that `--resume` continues from."""
        state = {"trainer": self.trainer.state_dict(), "schedule": self.schedule.as_dict(), **self.recorded}
        checkpoint.save(self.out / LAST, state)

    def train(self) -> None:
        """Train to the end of the schedule. A loss that is not finite stops the run; the checkpoint stays as it was."""
        trainer, first = self.trainer, self.trainer.steps
        progress = Progress(self.out / LOG, self.schedule, self.clock, first)
        saved = time.monotonic()
        with progress, closing(batches(self.recipe, first)) as stream:
            while not self.schedule.finished(trainer.steps):
                batch, step = next(stream), trainer.steps
                self._watch_clock(step - first)
                try:
                    report = trainer.step(batch, self.schedule.factor(step), self.recipe.block_length)
                except FloatingPointError as error:
                    raise click.ClickException(f"{error}; the last good checkpoint is {self.out / LAST}") from error
                progress.add(step, report, len(batch.tokens))
                if time.monotonic() - saved > 60 * self.save_minutes:
                    self.save()
                    saved = time.monotonic()
        self.save()

    def _watch_clock(self, steps_done: int) -> None:
        if self.clock is None or self.schedule.decay_start is not None:
            return
        steps = self.clock.decay_steps(time.monotonic(), steps_done)
        if steps is not None:
            self.schedule.start_decay(self.trainer.steps, steps)
            print(f"decay from step {self.trainer.steps} over {steps} steps", file=sys.stderr, flush=True)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory of the run.")
@click.option("--tokenizer", type=click.Path(exists=True, dir_okay=False), required=True, help="A tokenizer.json.")
@click.option("--seed", default=1, show_default=True, help="Seed of the data and of the first weights.")
@click.option("--steps", type=int, help="Length of the run.")
@click.option("--minutes", type=float, help="Length of the run by the clock, instead of --steps.")
@click.option("--resume", is_flag=True, help="Continue the run in --out; its recorded settings win over the options.")
@click.option("--lr", default=3e-3, show_default=True, help="Peak learning rate of matrices (Muon).")
@click.option("--adam-lr", default=3e-3, show_default=True, help="Peak learning rate of everything else (AdamW).")
@click.option("--warmup", default=100, show_default=True)
@click.option("--decay-share", default=0.25, show_default=True, help="Share of the run in which the rates fall.")
@click.option("--ema", default=0.998, show_default=True, help="Decay of the averaged weights.")
@click.option("--bias-rate", default=2e-3, show_default=True, help="Step of the expert biases; 0 freezes them.")
@click.option("--blocks", default=192, show_default=True, help="Blocks of 32 tokens per step.")
@click.option("--copies", default=2, show_default=True, help="Noisings of each problem in a batch.")
@click.option("--drill-share", default=0.75, show_default=True, help="Drills' share of the first batch.")
@click.option("--final-drill-share", default=0.06, show_default=True)
@click.option("--drill-steps", default=1800, show_default=True, help="Step by which that share has been reached.")
@click.option("--routing", default="original", show_default=True, help="Routing policy to train under.")
@click.option("--top-p", default=0.6, show_default=True, help="dMoE's coreset.")
@click.option("--min-experts", default=12, show_default=True, help="dMoE's smallest coreset.")
@click.option("--hidden", default=160, show_default=True)
@click.option("--layers", default=4, show_default=True, help="Layers, the first of them dense.")
@click.option("--heads", default=6, show_default=True)
@click.option("--kv-heads", default=2, show_default=True)
@click.option("--ffn", default=640, show_default=True, help="Width of the dense layer's feed-forward.")
@click.option("--expert-width", default=16, show_default=True)
@click.option("--shared", default=12, show_default=True, help="Shared experts of that width.")
@click.option("--threads", default=2, show_default=True)
@click.option("--save-minutes", default=3.0, show_default=True)
def main(**options: Any) -> None:
    """Train a small LLaDA2-MoE on generated arithmetic."""
    torch.set_num_threads(options["threads"])
    run = build_run(options)
    weights = sum(p.numel() for p in run.trainer.network.parameters())
    print(f"{weights / 1e6:.2f} M parameters, from step {run.trainer.steps}", file=sys.stderr, flush=True)
    run.train()


def build_run(options: dict[str, Any]) -> Run:
    """A new run, or the one in `--out`."""
    last: Path = options["out"] / LAST
    if options["resume"] and not last.exists():
        raise click.ClickException(f"{last}: nothing to resume")
    if not options["resume"] and last.exists():
        raise click.ClickException(f"{last} exists; continue it with --resume or choose another --out")
    options["out"].mkdir(parents=True, exist_ok=True)
    state = checkpoint.load(last) if options["resume"] else new_run(options)
    config = ModelConfig.from_dict(state["config"])
    policy = routing_policy(state["routing"], config, RoutingOptions(**state["routing_options"]))
    trainer = Trainer(config, policy, Optimisation(**state["options"]))
    if options["resume"]:
        trainer.load_state_dict(state.pop("trainer"))
    else:
        trainer.initialise(options["seed"])
    schedule = Schedule(**state.pop("schedule"))
    clock = Clock(options["minutes"], options["decay_share"], time.monotonic()) if options["minutes"] else None
    if schedule.end is None and clock is None:
        raise click.UsageError("say how long to train: --steps or --minutes")
    recipe = Recipe(**state["recipe"])
    return Run(options["out"], trainer, recipe, schedule, state, clock, options["save_minutes"])


def new_run(options: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint records of a run besides the trainer's state, from the command line."""

    def chosen(*names: str) -> dict[str, Any]:
        return {name: options[name] for name in names}

    schedule = Schedule(options["warmup"])
    if options["steps"]:
        schedule = Schedule.of_steps(options["steps"], options["warmup"], options["decay_share"])
    recipe = Recipe(
        **chosen("tokenizer", "seed", "blocks", "copies", "drill_share", "final_drill_share", "drill_steps")
    )
    return {
        "config": config_json(vocabulary(options["tokenizer"]), options),
        "routing": options["routing"],
        "routing_options": chosen("top_p", "min_experts"),
        "options": asdict(Optimisation(**chosen("lr", "adam_lr", "ema", "bias_rate"))),
        "recipe": asdict(recipe),
        "schedule": schedule.as_dict(),
    }


if __name__ == "__main__":
    main()
