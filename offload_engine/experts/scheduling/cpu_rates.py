"""What a CPU expert and a copy take on this machine: measured once, then corrected by what the run itself takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

from offload_engine.experts.scheduling.sharing import Rates

SMOOTHING = 1 / 16
"""Weight of a layer's measurement in a moving average."""
FASTEST, SLOWEST = 0.1, 10.0
"""What one layer may say of a pace: a process that was suspended for a second has not become slower."""
HANDOVER = 2e-4
"""Seconds that a layer's errand takes beside copies and kernels, until a run has shown how many it takes: decision, two
changes of threads, bookkeeping. Measured on one machine of two busy cores (docs/LOG.md)."""
OWN_PART = 1e-4
"""Of these, the part that the engine's own thread spends, so that everything else waits for it."""


class LearnedRates:
    """`Rates` whose CPU part follows the run: caches, other programs and clocks make an expert slower than it was when
    it was measured alone. The link's stays as measured, for the host is not told when a copy has run.
    """

    def __init__(self, measured: Rates) -> None:
        self.measured = measured
        self.pace = 1.0
        """Seconds that CPU experts lately took, over those measured."""
        self.errand_pace = 1.0
        """The same of `Rates.trip`."""
        self._rates = measured

    @property
    def now(self) -> Rates:
        """What things take as far as is known now."""
        return self._rates

    def learn(self, experts: int, tokens: int, seconds: float, beside: float) -> None:
        """The CPU has computed so many experts of one layer, with so many tokens together, in `seconds`, and all else
        that it took from the decision on was `beside`.
        """
        measured = self.measured
        self.pace = _moved(self.pace, seconds, experts * measured.expert + tokens * measured.token)
        self.errand_pace = _moved(self.errand_pace, beside, measured.trip)
        self._rates = replace(
            measured,
            expert=measured.expert * self.pace,
            token=measured.token * self.pace,
            trip=measured.trip * self.errand_pace,
        )


def _moved(pace: float, found: float, expected: float) -> float:
    if expected <= 0:
        return pace
    return pace + SMOOTHING * (min(max(found / expected, FASTEST), SLOWEST) - pace)


def line_through(tokens: tuple[int, int], seconds: tuple[float, float]) -> tuple[float, float]:
    """Seconds of an expert and of each of its tokens, where it took `seconds` with so many `tokens`, fewer first."""
    few, many = tokens
    each = max(0.0, (seconds[1] - seconds[0]) / (many - few))
    return max(0.0, seconds[0] - few * each), each


def median_seconds(work: Sequence[Callable[[], None]], clock: Callable[[], float]) -> float:
    """Of each of `work`, done in turn; the first is not counted where there are others."""
    times = []
    for one in work:
        began = clock()
        one()
        times.append(clock() - began)
    return statistics.median(times[1:] or times)
