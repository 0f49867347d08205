"""What a run says while it goes: a line per step in log.jsonl for programs, its progress on stderr for people."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from offload_engine.errors import OffloadError
from offload_engine.files import write_aside
from tools.finetuning.tuner import StepReport
from tools.training.progress import StepProgress


class Progress:
    """What is shown of the latest reports, and the log that has them all. To be closed, whatever ends the run."""

    def __init__(self, log: Path, steps: int, first_step: int, every: int = 10) -> None:
        """`steps`: of the whole run; `every`: of these are one line on stderr where nothing can be redrawn."""
        self.log, self.first_step = log, first_step
        self._every = every
        self._since = self._window_began = time.monotonic()
        self._window: list[StepReport] = []
        """The reports that are shown as one: those of the last `every` steps at most."""
        self._shown = StepProgress(steps, first=first_step, every=every)

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
            "tokens_per_s": round(report.tokens / (now - self._since)),
        }
        with writing(self.log), self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if step % self._every == 0:
            self._window, self._window_began = [], self._since
        self._since = now
        self._window.append(report)
        self._shown.show(step + 1, self._remark(rate, now))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._shown.done > self.first_step:
            self._shown.end()
        else:
            self._shown.close()

    def _remark(self, rate: float, now: float) -> str:
        masked = max(1, sum(report.masked for report in self._window))
        loss = sum(report.loss * report.masked for report in self._window) / masked
        accuracy = sum(report.accuracy * report.masked for report in self._window) / masked
        speed = sum(report.tokens for report in self._window) / (now - self._window_began)
        return f"loss {loss:.4f}, accuracy {accuracy:.4f}, lr {rate:.2e}, {speed:.0f} tokens/s"


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
