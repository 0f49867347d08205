"""From the runs of a benchmark to one set of figures per contender: medians, shares, ratios, bounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload_engine.bench.spec import COMPONENTS, FOREIGN, Bandwidth, Measured, Run


@dataclass(frozen=True, slots=True)
class Figures:
    """One contender over all its rounds. Steps are pooled; what is per step is over all of them; None: not measured."""

    name: str
    rounds: int
    step: float
    """Median seconds of a denoising step ..."""
    quartiles: tuple[float, float]
    """... and its lower and upper quartile."""
    tokens_per_second: float
    """Over the measured blocks, commits included."""
    moved: float
    """Bytes per step: of experts brought into slots where our executor runs, else what the kernel fetched from disk."""
    belady: float | None
    """Bytes per step that Belady's rule would have moved."""
    reads: float | None
    """Bytes the kernel fetched from disk over bytes of experts asked for."""
    early: float | None
    """Share of missed bytes issued before their layer's routing was known."""
    hidden: float | None
    """Share of missed bytes that moved while compute did not wait."""
    stall: float | None
    """Share of step time in which compute waited for transfers."""
    overhead: float | None
    """Share of step time that was neither compute nor waiting."""
    components: dict[str, float]
    """Share of step time by component; empty where they were not told apart."""
    unique_experts: float | None
    slots: int | None
    peak: int
    """Largest resident set of a round."""
    planned: int | None
    group_peak: int | None
    startup: float
    """Seconds to the first kernel, the longest of the rounds."""
    resident_weights: int | None
    bound: float | None
    """Seconds a step takes at the least, given the bandwidths measured: see `step_bound`."""
    answers: tuple[str, ...]
    """Digests of the answers that were not cut short, one if all rounds agree."""

    @property
    def over_belady(self) -> float | None:
        """Bytes moved over Belady's."""
        return None if not self.belady else self.moved / self.belady

    @property
    def over_plan(self) -> float | None:
        """Peak over the planned one."""
        return self.peak / self.planned if self.planned else None

    @property
    def over_bound(self) -> float | None:
        """Step time over the bound."""
        return self.step / self.bound if self.bound else None

    def as_dict(self) -> dict[str, Any]:
        """Everything by name, ratios included."""
        ratios = {name: getattr(self, name) for name in ("over_belady", "over_plan", "over_bound")}
        return asdict(self) | ratios


def figures(runs: Sequence[Run]) -> dict[str, Figures]:
    """Per contender that measured anything, in the order of their first runs."""
    bandwidth = bandwidth_of(runs)
    names = dict.fromkeys(run.task for run in runs if run.report.measured is not None)
    return {name: _figures(name, [run for run in runs if run.task == name], bandwidth) for name in names}


def bandwidth_of(runs: Sequence[Run]) -> Bandwidth | None:
    """The bandwidths measured, if they were."""
    return next((run.report.bandwidth for run in runs if run.report.bandwidth is not None), None)


def _figures(name: str, runs: Sequence[Run], bandwidth: Bandwidth | None) -> Figures:
    all_measured = [run.report.measured for run in runs if run.report.measured is not None]
    steps = [seconds for one in all_measured for seconds in one.step_seconds]
    low, median, high = quartiles(steps)
    time, count = sum(steps), len(steps)
    parts = {name: sum(one.seconds.get(name, 0.0) for one in all_measured) / time for name in (*COMPONENTS, "stall")}
    first, ours = all_measured[0], all_measured[0].loads is not None
    missed = _total(all_measured, "missed_bytes")
    moved, disk = _total(all_measured, "bytes_moved"), _total(all_measured, "disk_bytes")
    belady = _total(all_measured, "belady_misses")
    belady_bytes = None if belady is None or first.expert_bytes is None else belady * first.expert_bytes / count
    peaks = [run.group_peak for run in runs if run.group_peak is not None]
    return Figures(
        name=name,
        rounds=len(all_measured),
        step=median,
        quartiles=(low, high),
        tokens_per_second=sum(one.tokens for one in all_measured) / sum(one.window_seconds for one in all_measured),
        moved=(moved if moved is not None else disk or 0.0) / count,
        belady=belady_bytes,
        reads=None if not moved or disk is None else disk / moved,
        early=_share(_total(all_measured, "early_bytes"), missed),
        hidden=_share(_total(all_measured, "hidden_bytes"), missed),
        stall=parts["stall"] if ours else None,
        overhead=1 - sum(parts.values()) if ours else None,
        components={name: parts[name] for name in COMPONENTS if name in first.seconds},
        unique_experts=first.unique_experts,
        slots=first.slots,
        peak=max(one.peak_bytes for one in all_measured),
        planned=first.planned_bytes,
        group_peak=max(peaks, default=None),
        startup=max(one.startup_seconds for one in all_measured),
        resident_weights=first.resident_weights,
        bound=step_bound(first, belady_bytes, bandwidth),
        answers=tuple(dict.fromkeys(one.answer for one in all_measured if not one.cut_short)),
    )


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile, interpolated between the values."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def step_bound(measured: Measured, moved: float | None, bandwidth: Bandwidth | None) -> float | None:
    """The seconds no step can beat on this machine: the slowest of disk, memory and arithmetic, perfectly overlapped.

    `moved`: the bytes per step that Belady's rule moves; None: nothing has to be moved. None for contenders that run
    another executor than ours, whose memory this says nothing of.
    """
    if bandwidth is None or measured.loads is None or measured.step_bytes is None or measured.step_flops is None:
        return None
    return max(
        (moved or 0.0) / max(bandwidth.disk.values()),
        measured.step_bytes / bandwidth.dram,
        measured.step_flops / bandwidth.gemm,
    )


def disagreements(everyone: Mapping[str, Figures]) -> list[str]:
    """Contenders whose answers differ from round to round, or from those of our engine in the same routing, in words.

    Equal digests are no accident; different ones are a defect among contenders that share kernels and weights.
    """
    told = []
    for name, one in everyone.items():
        if len(one.answers) > 1:
            told.append(f"{name} answers otherwise from round to round")
        kind, _, rest = name.partition("/")
        reference = everyone.get(f"engine/{rest.partition('@')[0].partition('+')[0]}")
        if reference is None or kind.partition("-")[0] in FOREIGN or "+" in rest:
            continue
        if reference.answers and not set(one.answers) <= set(reference.answers):
            told.append(f"{name} answers otherwise than {reference.name}")
    return told


def _total(measured: Sequence[Measured], name: str) -> float | None:
    """The sum of a field over all rounds; None where one has none."""
    values = [getattr(one, name) for one in measured]
    return None if None in values else float(sum(values))


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole
