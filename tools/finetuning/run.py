"""A run of fine-tuning: built from its settings, trained to its end, saved on the way, exported."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from offload_engine.cli.interrupt import interruptible
from offload_engine.cli.terminal import note
from offload_engine.config import EngineConfig, parse_bytes
from offload_engine.engine.assembly import Source, find_source
from offload_engine.errors import OffloadError, UsageError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.routing import RoutingOptions, RoutingPolicy
from tools.finetuning.batches import Batches
from tools.finetuning.dataset import Dataset, load_dataset
from tools.finetuning.parallel import Processes
from tools.finetuning.progress import Progress, writing
from tools.finetuning.saves import Saves
from tools.finetuning.settings import Settings
from tools.finetuning.tuner import StepReport, Teacher, Tuner
from tools.finetuning.weights import Published, distilled_config, export, load_network
from tools.training.routing import training_policy

CHECKPOINTS, LOG, MODEL = "checkpoints", "log.jsonl", "model"


@dataclass
class Run:
    """A run, ready to train."""

    settings: Settings
    recorded: dict[str, Any]
    source: Path
    config: ModelConfig
    tuner: Tuner
    batches: Batches
    original: RoutingPolicy
    saves: Saves
    processes: Processes

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.tuner.options.steps

    def describe(self) -> str:
        """One line about what will happen."""
        weights = sum(weight.numel() for _, weight in self.tuner.network.named_weights())
        data = self.batches.dataset
        return (
            f"{weights / 1e6:.2f} M parameters; {len(data)} samples ({data.cut} cut to {self.settings.length} tokens, "
            f"{data.dropped} dropped); steps {self.tuner.steps} to {self.steps} of {self.settings.batch} samples"
        )

    def train(self) -> int:
        """Train to the end, or to an interruption, and export; returns the exit code."""
        settings, tuner, first = self.settings, self.tuner, self.tuner.steps
        progress = Progress(settings.out / LOG, self.steps, first, settings.log_every)
        if self.processes.first:
            progress.start()
        saved = time.monotonic()
        with progress, interruptible() as interrupted:
            while tuner.steps < self.steps:
                step = tuner.steps
                report = self._step()
                if self.processes.first:
                    progress.add(step, report, tuner.options.rate(step))
                late = time.monotonic() - saved > 60 * settings.save_minutes
                stop, late_anywhere = self.processes.sum(torch.tensor([float(interrupted()), float(late)])).tolist()
                if stop:
                    self.save()
                    if self.processes.first:
                        print(f"saved after {tuner.steps} steps; go on with --resume", file=sys.stderr, flush=True)
                    raise click.Abort
                if late_anywhere:
                    self.save()
                    saved = time.monotonic()
        self.save()
        self.export()
        return 0

    def _step(self) -> StepReport:
        step = self.tuner.steps
        batches = self.batches.of_step(step, self.processes.rank, self.processes.count)
        try:
            return self.tuner.step(batches, self._policies(step))
        except FloatingPointError as error:
            last = self.saves.last()
            kept = f"the last good checkpoint is {last}" if last else "there is no earlier checkpoint"
            after = f", from the base, or from that checkpoint, which --export makes {self.settings.out / MODEL}"
            raise OffloadError(
                f"{error}, so the run stops before that update; {kept}; start again with a lower --lr and another "
                f"--out{after if last else ''}"
            ) from None

    def _policies(self, step: int) -> Iterator[RoutingPolicy]:
        """The policy of each micro-batch of a step; the original one comes in evenly, at its share."""
        share, each = self.settings.original_share, self.batches.micro_batches(self.processes.count)
        for number in range(step * each, (step + 1) * each):
            turn = math.floor((number + 1) * share + 1e-9) > math.floor(number * share + 1e-9)
            yield self.original if turn else self.tuner.policy

    def save(self) -> None:
        """Write the checkpoint that `--resume` continues from."""
        try:
            self.saves.save(self.tuner.steps, self.tuner.state_dict(), self.recorded)
        except OSError as error:
            last = self.saves.last()
            kept = f"the last whole checkpoint is {last}" if last else "there is no earlier checkpoint"
            raise OffloadError(
                f"{self.saves.folder}: the checkpoint after {self.tuner.steps} steps can't be written "
                f"({error.strerror}); {kept}; free some space and go on with --resume"
            ) from None

    def export(self) -> None:
        """Write the weights as a checkpoint for the engine."""
        settings = self.settings
        raw = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        config = distilled_config(raw, settings.routing, settings.top_p, settings.served_min_experts)
        published = Published(self.tuner.network, self.config)
        with writing(settings.out / MODEL):
            size = parse_bytes(settings.shard_size)
            export(settings.out / MODEL, published, config, self.source, size, self.processes)
        if self.processes.first:
            note(f"{settings.out / MODEL}: the weights after {self.tuner.steps} of {self.steps} steps")


def build_run(settings: Settings, processes: Processes, *, resume: bool) -> Run:
    """A new run, or the one in `settings.out`."""
    settings.check(processes)
    saves = Saves(settings.out / CHECKPOINTS, processes)
    last = saves.last()
    if resume and last is None:
        raise UsageError(f"{settings.out}: holds no checkpoint to resume; start without --resume")
    if not resume and last is not None:
        raise UsageError(f"{last}: a run is here already; continue it with --resume, or choose another --out")
    source = find_source(EngineConfig(model=settings.model))
    config, checkpoint = source.config, Checkpoint.open(source.directory)
    shape = settings.shape(config, source.eos_token_id, source.mask_token_id)
    dataset = load_dataset(settings.data, shape, settings.overlong, settings.limit_samples)
    models = {"model": fingerprint(source.directory)}
    teacher = find_teacher(settings.teacher, source) if settings.teacher is not None else source
    if settings.teacher_share:
        models["teacher"] = fingerprint(teacher.directory)
    if processes.first:
        _tell_of_another_model(settings, dataset, models["model"])
    batches = settings.batches(dataset)
    options = RoutingOptions(top_p=settings.top_p, min_experts=settings.min_experts)
    tuner = Tuner(
        load_network(config, checkpoint, processes),
        training_policy(settings.routing, config, options),
        settings.optimisation(batches),
        block_length=settings.block_length,
        dtype=getattr(torch, settings.dtype),
        processes=processes,
    )
    if settings.teacher_share:
        tuner.learn_from(_teacher(teacher, options, settings.teacher_share, processes))
    recorded = settings.recorded(dataset, models, processes)
    if last is not None:
        tuner.load_state_dict(saves.load(last, recorded))
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{settings.out}: can't be made ({error.strerror}); choose another --out") from None
    original = training_policy("original", config, options)
    return Run(settings, recorded, source.directory, config, tuner, batches, original, saves, processes)


def find_teacher(name: str, student: Source) -> Source:
    """The model that is learned from; raises `UsageError` if its distributions are over other tokens."""
    source = find_source(EngineConfig(model=name))
    for what, theirs, mine in (
        ("a vocabulary of", source.config.vocab_size, student.config.vocab_size),
        ("eos id", source.eos_token_id, student.eos_token_id),
        ("mask id", source.mask_token_id, student.mask_token_id),
    ):
        if theirs != mine:
            raise UsageError(
                f"--teacher {name} has {what} {theirs}, --model {mine}; wanted the same, since the teacher's "
                "distributions are learned token by token"
            )
    return source


def _teacher(source: Source, options: RoutingOptions, share: float, processes: Processes) -> Teacher:
    """Frozen, under the routing it was made with, by its own router's shape."""
    network = load_network(source.config, Checkpoint.open(source.directory), processes).requires_grad_(False)
    return Teacher(network, training_policy("original", source.config, options), share)


def _tell_of_another_model(settings: Settings, dataset: Dataset, found: str) -> None:
    """Say so where the answers aren't the model's own: in a second stage of a training they needn't be."""
    answered = dataset.model.get("fingerprint")
    if answered not in (None, found):
        note(
            f"note: the answers in {settings.data} are those of {dataset.model.get('name', 'a model')} (fingerprint "
            f"{answered}), not of --model {settings.model} ({found})"
        )
