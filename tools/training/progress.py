"""How far training is: a bar at every step on a terminal, elsewhere a line every so many steps."""

from __future__ import annotations

from offload_engine.cli.progress import PIECES, Progress
from offload_engine.cli.terminal import note


class StepProgress(Progress):
    """Of a run whose length in steps is known, or guessed by `total`, which may change as it goes."""

    def __init__(self, total: int, *, first: int, every: int) -> None:
        """`first`: steps of an earlier run that this one goes on with; `every`: steps between two lines."""
        super().__init__("steps", total, PIECES, done=first, every=0)
        self._steps_per_line = every

    def show(self, done: int, remark: str = "") -> None:
        """See `Progress`."""
        if self._live or done % self._steps_per_line == 0:
            super().show(done, remark)
        else:
            self.done, self._remark = done, remark

    def end(self) -> None:
        """Take the bar away, and sum up what was done."""
        self.close()
        note(self.line())
