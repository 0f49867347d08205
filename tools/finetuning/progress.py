"""What a run says while it goes: a line per step in log.jsonl for programs, fewer on stderr for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from offload_engine.cli.progress import duration
from offload_engine.errors import OffloadError
from offload_engine.files import write_aside
from tools.finetuning.tuner import StepReport


@dataclass
class Progress:
    """The reports since the last line on stderr, and the log that has them all."""

    log: Path
    steps: int
    """Of the whole run."""
    first_step: int
    every: int = 10
    began: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)
    shown: float = field(default_factory=time.monotonic)
    reports: list[StepReport] = field(default_factory=list)

    def start(self) -> None:
        """Take from the log what a run that was cut off did after the checkpoint this one goes on with."""
        if not self.log.exists():
            return
        with writing(self.log):
            lines = self.log.read_bytes().splitlines(keepends=True)[: self.first_step]
            write_aside(self.log, b"".join(lines))

    def add(self, step: int, report: StepReport, rate: float) -> None:
        """Note the step numbered `step` from 0."""
        now = time.monotonic()
        line = {
            "step": step,
            "loss": report.loss,
            "accuracy": report.accuracy,
            "gradient_norm": report.norm,
            "tokens": report.tokens,
            "masked_tokens": report.masked,
            "lr": rate,
            "tokens_per_s": round(report.tokens / (now - self.since)),
        }
        with writing(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.since = now
        self.reports.append(report)
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            self._show(step + 1, rate, now)

    def _show(self, done: int, rate: float, now: float) -> None:
        masked = max(1, sum(report.masked for report in self.reports))
        loss = sum(report.loss * report.masked for report in self.reports) / masked
        accuracy = sum(report.accuracy * report.masked for report in self.reports) / masked
        speed = sum(report.tokens for report in self.reports) / (now - self.shown)
        left = (self.steps - done) * (now - self.began) / max(1, done - self.first_step)
        print(
            f"step {done}/{self.steps}  loss {loss:.4f}  accuracy {accuracy:.4f}  lr {rate:.2e}  "
            f"{speed:.0f} tokens/s  {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )
        self.reports, self.shown = [], now


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes to `path`: raises `OffloadError` where the system lets it not be written."""
    try:
        yield
    except OSError as error:
        raise OffloadError(
            f"{path}: can't be written ({error.strerror or error}); free some space, or see to its permissions, and go "
            "on with --resume"
        ) from None
