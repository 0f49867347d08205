"""What a benchmark found, as tables in Markdown, as JSON, and as a plot."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_engine.bench.bars import Bar, bars
from offload_engine.bench.spec import COMPONENTS, Bandwidth, Run, Workload
from offload_engine.bench.summary import Figures, bandwidth_of, disagreements, figures
from offload_engine.config import format_bytes
from offload_engine.errors import OffloadError, UsageError
from offload_engine.files import write_aside

VERSION = 1
"""Of `bench.json`."""
BUSY = 0.5
"""Load average per core from which other work has a part in the times measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What all contenders had in common."""

    model: str
    machine: Mapping[str, Any]
    workload: Workload
    limit: int | None
    """Bytes per contender; None: unlimited."""
    unlimited_because: str | None = None
    """Why no limit was set although one was asked for."""
    absent: Mapping[str, str]
    """Contenders that could not run here, and why."""
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Findings:
    """A benchmark, summed up."""

    conditions: Conditions
    runs: Sequence[Run]

    @property
    def figures(self) -> dict[str, Figures]:
        """Per contender."""
        return figures(self.runs)

    @property
    def bandwidth(self) -> Bandwidth | None:
        """None where it was not measured."""
        return bandwidth_of(self.runs)

    @property
    def bars(self) -> list[Bar]:
        """The numbers to hold."""
        return bars(self.figures, self.bandwidth)

    @property
    def notes(self) -> list[str]:
        """What a reader of the tables must know."""
        conditions, notes = self.conditions, []
        if conditions.interrupted:
            notes.append("interrupted: these are the contenders that had finished")
        load, cores = conditions.machine["load_average"], conditions.machine["cores"]
        if load > cores * BUSY:
            notes.append(f"the machine was busy when this began: load average {load} on {cores} cores")
        if conditions.unlimited_because is not None:
            notes.append(f"no memory limit was in force: {conditions.unlimited_because}")
        notes += [f"{name} left out: {reason}" for name, reason in conditions.absent.items()]
        notes += [f"{run.task} failed: {run.report.error}" for run in self.runs if run.report.error is not None]
        for run in self.runs:
            measured = run.report.measured
            if measured is not None and measured.cut_short:
                notes.append(f"{run.task}, round {run.round}: cut short after {len(measured.step_seconds)} steps")
            if measured is not None and run.task.startswith("unlimited/") and measured.loads:
                notes.append(f"{run.task}: its budget did not hold everything; {measured.loads} experts were loaded")
        return notes + disagreements(self.figures)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`."""
        conditions = self.conditions
        return {
            "format": "offload_engine.bench",
            "version": VERSION,
            "model": conditions.model,
            "machine": dict(conditions.machine),
            "workload": conditions.workload.model_dump(),
            "limit": conditions.limit,
            "notes": self.notes,
            "bandwidth": None if self.bandwidth is None else self.bandwidth.model_dump(),
            "contenders": {name: one.as_dict() for name, one in self.figures.items()},
            "ratios": ratios(self.figures),
            "bars": [
                {"what": bar.what, "wanted": bar.wanted, "measured": bar.measured, "holds": bar.holds}
                for bar in self.bars
            ],
            "runs": [run.model_dump() for run in self.runs],
        }

    def markdown(self) -> str:
        """The tables a person reads."""
        parts = [_heading(self.conditions), _table(*_contenders(self.figures)), _table(*_details(self.figures))]
        parts += [_bandwidth(self.bandwidth)] if self.bandwidth is not None else []
        parts += [_table(*_bars(self.bars)), "\n".join(f"- {note}" for note in self.notes)]
        return "\n\n".join(part for part in parts if part) + "\n"


def ratios(everyone: Mapping[str, Figures]) -> dict[str, float]:
    """Step time of every contender over that of our engine under the first budget in the same routing."""
    found = {}
    for name, one in everyone.items():
        routing = name.partition("/")[2].partition("@")[0].partition("+")[0]
        ours = everyone.get(f"engine/{routing}")
        if ours is not None and ours is not one:
            found[f"{name} : {ours.name}"] = one.step / ours.step
    return found


def prepare(folder: Path) -> None:
    """Make the folder, and make sure that `save` can write there. Raises `UsageError` or `OffloadError` where not."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder}: is a file; wanted a folder, new or not")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def save(findings: Findings, folder: Path) -> list[str]:
    """Write bench.json, bench.md and bench.png into `folder`, each whole or not at all; returns what to tell of it.

    Raises `OffloadError` when they can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / "bench.json", f"{json.dumps(findings.as_dict(), indent=1)}\n".encode())
        write_aside(folder / "bench.md", findings.markdown().encode())
        from offload_engine.bench.plot import plot

        plot(findings.figures, folder / "bench.png")
    except OSError as error:
        raise _unwritable(folder, error) from None
    except ImportError:
        return [f"{folder}: bench.json, bench.md; no plot, for want of matplotlib (the extra eval has it)"]
    return [f"{folder}: bench.json, bench.md, bench.png"]


def _unwritable(folder: Path, error: OSError) -> OffloadError:
    return OffloadError(f"--out {folder}: can't be written ({error.strerror or error})")


def _heading(conditions: Conditions) -> str:
    machine, work = conditions.machine, conditions.workload
    limit = "no memory limit" if conditions.limit is None else f"{format_bytes(conditions.limit)} limit, page cache in"
    return (
        f"{conditions.model}: blocks of {work.block_length} tokens in {work.steps} steps, {work.blocks} measured after "
        f"{work.warm_up} to warm up, {limit}\n\n"
        f"{machine['processor']} ({' '.join(machine['features']) or 'no features known'}), {machine['cores']} cores, "
        f"{format_bytes(machine['memory'])}, {machine['system']}, torch {machine['torch']}, OMP_NUM_THREADS "
        f"{machine['omp_num_threads']}, load average before {machine['load_average']}"
    )


def _contenders(everyone: Mapping[str, Figures]) -> tuple[list[str], list[list[str]]]:
    header = ["contender", "step, s", "quartiles", "tokens/s", "moved/step", "Belady", "unique", "peak", "planned"]
    header += ["group peak", "x ours"]
    against = ratios(everyone)
    rows = []
    for name, one in everyone.items():
        ratio = next((value for key, value in against.items() if key.startswith(f"{name} : ")), None)
        rows.append(
            [
                name,
                f"{one.step:.3g}",
                f"{one.quartiles[0]:.3g} to {one.quartiles[1]:.3g}",
                f"{one.tokens_per_second:.3g}",
                format_bytes(round(one.moved)),
                _size(one.belady),
                _number(one.unique_experts),
                format_bytes(one.peak),
                _size(one.planned),
                _size(one.group_peak),
                _number(ratio),
            ]
        )
    return header, rows


def _details(everyone: Mapping[str, Figures]) -> tuple[list[str], list[list[str]]]:
    header = ["contender", "x Belady", "reads/asked", "early", "hidden", "stall", *COMPONENTS]
    header += ["overhead", "start, s", "bound, s", "x bound"]
    rows = [
        [
            name,
            _number(one.over_belady),
            "-" if one.reads is None else f"{one.reads:.4g}",
            *(_percent(share) for share in (one.early, one.hidden, one.stall)),
            *(_percent(one.components.get(part)) for part in COMPONENTS),
            _percent(one.overhead),
            f"{one.startup:.3g}",
            _number(one.bound),
            _number(one.over_bound),
        ]
        for name, one in everyone.items()
    ]
    return header, rows


def _bandwidth(found: Bandwidth) -> str:
    disk = ", ".join(f"{rate / 1e9:.2f} GB/s at depth {depth}" for depth, rate in found.disk.items())
    how = "direct" if found.direct else "through the page cache"
    fresh = "" if found.fresh is None else f"; memory touched for the first time {found.fresh / 1e9:.2f} GB/s"
    return (
        f"disk, {how}, experts of {format_bytes(found.slab_bytes)}: {disk}; DRAM read {found.dram / 1e9:.1f} GB/s; "
        f"products {found.gemm / 1e12:.3f} TFLOP/s{fresh}"
    )


def _bars(found: Sequence[Bar]) -> tuple[list[str], list[list[str]]]:
    verdict = {True: "yes", False: "NO", None: "-"}
    return ["bar", "wanted", "measured", "holds"], [
        [bar.what, bar.wanted, bar.show(bar.measured), verdict[bar.holds]] for bar in found
    ]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned for those who read it as text; empty without rows."""
    if not rows:
        return ""
    wide = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines = [header, ["-" * width for width in wide], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, wide, strict=True)) + " |" for line in lines
    )


def _size(value: float | None) -> str:
    return "-" if value is None else format_bytes(round(value))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f} %"
