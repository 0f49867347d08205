"""The numbers to hold, each beside what this run measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from offload_engine.bench.spec import Bandwidth
from offload_engine.bench.summary import Figures

FASTER = {"original": 5.0, "dmoe": 3.0}
"""How many times faster than the model on memory-mapped weights as torch runs it, the better of plain and advised."""
FASTER_THAN_OURS = 1.0
"""The same beside our own kernels on mapped weights: what moving experts ourselves brings, and nothing else."""
UNLIMITED = 1.5
"""dMoE: most step time over that of the budget that holds every expert used."""
OVER_BELADY = {"original": 1.35, "dmoe": 1.15}
READS = 1.01
HIDDEN = 0.80
STALL = 0.15
OVERHEAD = 0.05
PEAK = (0.90, 1.00)
START_SECONDS = 2.0
"""To the first kernel, beside reading the resident weights once."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One number to hold."""

    what: str
    measured: float | None
    """None: this run did not measure it."""
    least: float | None = None
    most: float | None = None
    unit: str = ""
    """"x", "%" (of a share) or "s"."""

    @property
    def holds(self) -> bool | None:
        """None where nothing was measured."""
        if self.measured is None:
            return None
        return (self.least is None or self.measured >= self.least) and (self.most is None or self.measured <= self.most)

    @property
    def wanted(self) -> str:
        """The bar in words."""
        if self.least is not None and self.most is not None:
            return f"{self.show(self.least)} to {self.show(self.most)}"
        if self.least is not None:
            return f"at least {self.show(self.least)}"
        return f"at most {self.show(self.most)}"

    def show(self, value: float | None) -> str:
        """A value in the bar's unit."""
        if value is None:
            return "not measured"
        if self.unit == "%":
            return f"{value * 100:.1f} %"
        return f"{value:.2f} {self.unit}".rstrip() if self.unit == "s" else f"{value:.4g}{self.unit}"


def bars(everyone: Mapping[str, Figures], bandwidth: Bandwidth | None) -> list[Bar]:
    """Every bar, for the engine under its first budget and in the checkpoint's own weight format."""
    found: list[Bar] = []
    for routing in ("original", "dmoe"):
        ours = everyone.get(f"engine/{routing}")
        step = None if ours is None else ours.step
        for kind, least in {"torch": FASTER[routing], "mmap": FASTER_THAN_OURS}.items():
            names = (f"{kind}/{routing}", f"{kind}-random/{routing}")
            against = min((everyone[name].step for name in names if name in everyone), default=None)
            found.append(Bar(f"{routing}: times faster than {kind}", _ratio(against, step), least, unit="x"))
        if routing == "dmoe":
            roomy = everyone.get("unlimited/dmoe")
            if roomy is not None and roomy.moved:
                roomy = None  # its budget was no unlimited one
            ratio = _ratio(step, None if roomy is None else roomy.step)
            found.append(Bar("dmoe: step time over that of an unlimited budget", ratio, most=UNLIMITED, unit="x"))
        found += _own_bars(routing, ours, bandwidth)
    return found


def _own_bars(routing: str, ours: Figures | None, bandwidth: Bandwidth | None) -> list[Bar]:
    """Those that need no rival."""

    def of(name: str) -> float | None:
        return None if ours is None else getattr(ours, name)

    least, most = PEAK
    found = [
        Bar(f"{routing}: bytes moved over Belady's", of("over_belady"), most=OVER_BELADY[routing], unit="x"),
        Bar(f"{routing}: bytes read over bytes asked for", of("reads"), most=READS, unit="x"),
    ]
    if routing == "dmoe":
        found += [
            Bar("dmoe: missed bytes hidden behind compute", of("hidden"), HIDDEN, unit="%"),
            Bar("dmoe: stalls, of step time", of("stall"), most=STALL, unit="%"),
        ]
    found += [
        Bar(f"{routing}: scheduling and Python, of step time", of("overhead"), most=OVERHEAD, unit="%"),
        Bar(f"{routing}: measured peak over planned", of("over_plan"), least, most),
        Bar(f"{routing}: start to the first kernel", of("startup"), most=start_limit(ours, bandwidth), unit="s"),
    ]
    return [bar for bar in found if bar.least is not None or bar.most is not None]


def start_limit(ours: Figures | None, bandwidth: Bandwidth | None) -> float | None:
    """Seconds to read the resident weights once at the disk's best rate, plus `START_SECONDS`; None if unmeasured."""
    if ours is None or ours.resident_weights is None or bandwidth is None:
        return None
    return ours.resident_weights / max(bandwidth.disk.values()) + START_SECONDS


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
