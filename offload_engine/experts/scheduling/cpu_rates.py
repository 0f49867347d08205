"""What CPU experts, copies and reads take on this machine: measured once, then corrected by what the run takes."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
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


WINDOW = 16
"""The last copies, or reads, whose median counts."""
FEWEST = 4
"""Of these, before which what was measured at the start counts."""
STALE_LAYERS = 64
"""Layers that the CPU had a share in, and nobody a copy for, after which copies are taken to be again what they were at
the start; else a link that was slow once would never be tried again."""
STALE_COPIES = 1024
"""The same of CPU experts, by copies."""


class Observed:
    """What something takes by the median of the last times that it was done: one that was held up doesn't count, and
    half of them say that it has become slower or faster.
    """

    def __init__(self, measured: float) -> None:
        self._measured = measured
        self._last: deque[float] = deque(maxlen=WINDOW)

    @property
    def seconds(self) -> float:
        """As far as is known now."""
        return statistics.median(self._last) if len(self._last) >= FEWEST else self._measured

    def see(self, seconds: Iterable[float]) -> None:
        """It took so long. Nothing is learned of what was never measured."""
        if self._measured > 0:
            least, most = FASTEST * self._measured, SLOWEST * self._measured
            self._last.extend(min(max(one, least), most) for one in seconds)

    def forget(self) -> None:
        """Begin anew with what was measured."""
        self._last.clear()


class LearnedRates:
    """`Rates` that follow the run: caches, other programs and clocks make an expert on the CPU slower than it was when
    it was measured alone, and other traffic makes the link or the disk so. Calls must be serialised.
    """

    def __init__(self, measured: Rates) -> None:
        self.measured = measured
        self.pace = 1.0
        """Seconds that CPU experts lately took, over those measured."""
        self.errand_pace = 1.0
        """The same of `Rates.trip`."""
        self._copy, self._read = Observed(measured.copy), Observed(measured.read)
        self._layers = self._copies = 0
        """Layers since the last copy, and copies since the last layer."""
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
        self._copies, self._layers = 0, self._layers + 1
        if self._layers >= STALE_LAYERS:
            self._layers = 0
            self._copy.forget()
            self._read.forget()
        self._update()

    def observe(self, copies: Sequence[float], reads: Sequence[float]) -> None:
        """Copies and reads of one expert each took so many seconds, oldest first."""
        if not copies and not reads:
            return
        self._copy.see(copies)
        self._read.see(reads)
        if copies:
            self._layers, self._copies = 0, self._copies + len(copies)
        if self._copies >= STALE_COPIES:
            self._copies, self.pace, self.errand_pace = 0, 1.0, 1.0
        self._update()

    def _update(self) -> None:
        measured, copy = self.measured, self._copy.seconds
        self._rates = replace(
            measured,
            copy=copy,
            row=measured.row * copy / measured.copy if measured.copy > 0 else measured.row,
            read=self._read.seconds,
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
