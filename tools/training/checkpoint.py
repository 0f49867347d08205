"""Training checkpoints: written aside and renamed, so that a crash leaves the last whole one; resumed exactly."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from offload_engine.files import replacing

VERSION = 1


def save(path: Path, state: dict[str, Any]) -> None:
    """`torch.save`, atomically."""
    with replacing(path) as aside, aside.open("wb") as file:
        torch.save({"version": VERSION, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote; tensors only, no code."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state.get("version") != VERSION:
        raise ValueError(f"{path}: checkpoint version {state.get('version')!r}, this program reads {VERSION}")
    return state


@dataclass
class Schedule:
    """Warm-up, a stable stretch, then a linear decay to `floor`.

    Where the decay begins may be left to the clock; once it has begun its steps are recorded, and a resumed run keeps
    to them.
    """

    warmup: int = 100
    decay_start: int | None = None
    end: int | None = None
    floor: float = 0.02

    def factor(self, step: int) -> float:
        """What the peak learning rates are multiplied by at a step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay_start is None or self.end is None or step < self.decay_start:
            return rise
        left = (self.end - step) / max(1, self.end - self.decay_start)
        return rise * max(self.floor, left)

    def finished(self, step: int) -> bool:
        """Whether the run ends before this step."""
        return self.end is not None and step >= self.end

    def start_decay(self, step: int, steps: int) -> None:
        """Decay from `step` over `steps` steps."""
        self.decay_start, self.end = step, step + max(1, steps)

    @classmethod
    def of_steps(cls, steps: int, warmup: int, decay_share: float) -> Schedule:
        """A schedule of a known length."""
        return cls(warmup, steps - round(steps * decay_share), steps)

    as_dict = asdict


@dataclass
class Clock:
    """When a run with a budget of minutes must begin its decay."""

    minutes: float
    decay_share: float
    started: float = field(default=0.0)

    def decay_steps(self, now: float, steps_done: int) -> int | None:
        """The steps left for the decay if it is time for it, else None. `now` in the unit of `started`, seconds."""
        elapsed, budget = now - self.started, 60 * self.minutes
        if elapsed < budget * (1 - self.decay_share) or not steps_done:
            return None
        return int((budget - elapsed) * steps_done / elapsed)
