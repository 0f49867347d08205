"""What a search found: a table, a config that `dmoe-run --config` takes, and numbers for JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload_engine.config import format_bytes
from offload_engine.experts.scheduling.sharing import ShareMode
from offload_engine.simulate.run import Figures
from offload_engine.tune.search import NEAR, Point
from offload_engine.tune.trial import Knobs


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search. Every time in it is simulated."""

    points: Sequence[Point]
    """Every routing under every budget, the same budgets in the same order for each."""
    best: Sequence[Point]
    """The frontier."""
    surveyed: Knobs
    """Options of all these points: the best for the routing as recorded under the whole budget."""
    fastest: Point
    """Of the acceptable points under the whole budget."""
    smallest: Point
    """The smallest budget near the best speed of the acceptable points."""
    chosen: Point
    """One of these two, with the best options for it."""
    knobs: Knobs
    """Those."""
    default: Figures
    """Of the same with the engine's default options."""
    sharing: Mapping[ShareMode, Figures]
    """Of the same by `cpu_experts`, where misses may be shared with a CPU, and else of that one."""
    context: int
    """Positions that the budgets leave room for."""
    source: str = ""
    """What was replayed, on what."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; times in seconds, sizes in bytes."""
        return {
            "simulated": True,
            "source": self.source,
            "context": self.context,
            "surveyed": asdict(self.surveyed),
            "points": [_numbers(point) | {"frontier": point in self.best} for point in self.points],
            "fastest": _numbers(self.fastest),
            "smallest": _numbers(self.smallest),
            "chosen": _numbers(self.chosen)
            | {
                "knobs": asdict(self.knobs),
                "default": asdict(self.default),
                "by_cpu_experts": {str(mode): asdict(figures) for mode, figures in self.sharing.items()},
            },
        }


def table(found: Found) -> str:
    """Aligned plain text: milliseconds per step, a line per routing, a column per budget; then what came of it."""
    sizes = list(dict.fromkeys(point.budget for point in found.points))
    rows = [
        ["simulated, ms per step", "votes", *(format_bytes(size.nbytes, round_up=True) for size in sizes)],
        ["", "kept", *(f"{size.slots} slots" for size in sizes)],
    ]
    for name in dict.fromkeys(point.routing.name for point in found.points):
        mine = [point for point in found.points if point.routing.name == name]
        rows.append([name, _kept(mine[0]), *(_time(point, found) for point in mine)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", *_conclusions(found)])


def config_text(found: Found, asked: dict[str, str | int], budget: int) -> str:
    """A TOML preset for the chosen point under `budget` bytes; `asked` are options to hand on as they were given."""
    point, smallest = found.chosen, found.smallest
    figures, routing = point.figures, point.routing
    lines = [
        "# Written by dmoe tune. All figures are simulated:",
        f"# {found.source}.",
        *_assignments(asked),
        "",
        f"# With {point.budget.slots} expert slots a denoising step takes {_ms(figures)}; {figures.stall:.1%} of it is",
        f"# waiting, and {figures.hit_rate:.1%} of the experts wanted are there already.",
    ]
    if smallest.budget != point.budget:
        lines += [
            f"# Within {NEAR:.0%} of the best speed: {smallest.routing.name} in {smallest.budget.nbytes} bytes, "
            f"{_ms(smallest.figures)}."
        ]
    lines += [f"gpu_mem = {budget}", f"max_context = {found.context}", ""]
    if routing.settings:
        kept = "An unknown share" if routing.kept is None else f"{routing.kept:.1%}"
        lines += [f"# {kept} of original routing's votes. That is not accuracy: dmoe eval measures it."]
        lines += [*_assignments(routing.settings), ""]
    exception = "" if found.knobs.cpu_experts == "off" else ", but for cpu_experts, by rounding"
    lines += [f"# The best found by changing one at a time. None of them changes an answer{exception}."]
    return "\n".join([*lines, *_assignments(asdict(found.knobs)), ""])


def _conclusions(found: Found) -> list[str]:
    saved = 1 - found.chosen.figures.step / found.default.step if found.default.step else 0.0
    return [
        f"{found.source}, with {_options(found.surveyed)}.",
        "* no other is as fast, as small and keeps as many votes.",
        *(
            ["c some missing experts are computed on the CPU, for that pays."]
            if any(map(_shares, found.points))
            else []
        ),
        f"fastest   {_told(found.fastest)}",
        f"smallest  {_told(found.smallest)}; within {NEAR:.0%} of the best speed",
        f"chosen    {_told(found.chosen)}",
        f"          with {_options(found.knobs)}: {saved:.1%} less than with the defaults",
        *_told_of_sharing(found),
    ]


def _told_of_sharing(found: Found) -> list[str]:
    if len(found.sharing) < 2:
        return []
    times = ", ".join(
        f"{mode} {_ms(figures)}" + (f" ({figures.on_cpu:.1f} experts on the CPU)" if figures.on_cpu else "")
        for mode, figures in found.sharing.items()
    )
    return [f"          cpu experts by choice: {times}"]


def _told(point: Point) -> str:
    size, figures = format_bytes(point.budget.nbytes, round_up=True), point.figures
    return (
        f"{point.routing.name} in {size}: {_ms(figures)} per step, {figures.stall:.1%} of it waiting, "
        f"{figures.loads:.1f} experts moved, hit rate {figures.hit_rate:.1%}"
    )


def _numbers(point: Point) -> dict[str, Any]:
    routing = {"routing": point.routing.name, "settings": point.routing.settings, "kept": point.routing.kept}
    size = {"budget": point.budget.nbytes, "slots": point.budget.slots, "cpu_experts": point.cpu_experts}
    return routing | size | asdict(point.figures)


def _options(knobs: Knobs) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in asdict(knobs).items())


def _kept(point: Point) -> str:
    return "?" if point.routing.kept is None else f"{point.routing.kept:.3f}"


def _time(point: Point, found: Found) -> str:
    shared = "c" if _shares(point) else " " if any(map(_shares, found.points)) else ""
    return f"{1000 * point.figures.step:.3g}{shared}{'*' if point in found.best else ' '}"


def _shares(point: Point) -> bool:
    return point.cpu_experts != "off"


def _ms(figures: Figures) -> str:
    return f"{1000 * figures.step:.3g} ms"


def _assignments(values: dict[str, Any]) -> list[str]:
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
