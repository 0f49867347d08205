"""What a search found: a table, a config that `dmoe-run --config` takes, and numbers for JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload_engine.config import format_bytes
from offload_engine.tune.search import NEAR, Point
from offload_engine.tune.trial import Knobs, Outcome


@dataclass(frozen=True, slots=True)
class Found:
    """The outcome of a search. Every time in it is simulated."""

    points: Sequence[Point]
    """Every routing under every budget."""
    best: Sequence[Point]
    """The frontier."""
    knobs: Knobs
    default: Outcome
    """Of the routing as recorded, under the whole budget, with the engine's default options."""
    tuned: Outcome
    """The same with `knobs`."""
    chosen: Point
    """The fastest of the acceptable points."""
    smallest: Point
    """The smallest budget near the chosen one's speed."""
    context: int
    """Positions that the budgets leave room for."""
    source: str
    """What was replayed, on what."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "simulated": True,
            "source": self.source,
            "knobs": asdict(self.knobs),
            "default": asdict(self.default),
            "tuned": asdict(self.tuned),
            "context": self.context,
            "points": [_numbers(point) | {"frontier": point in self.best} for point in self.points],
            "chosen": _numbers(self.chosen),
            "smallest": _numbers(self.smallest),
        }


def _numbers(point: Point) -> dict[str, Any]:
    routing = {"routing": point.routing.name, "settings": point.routing.settings, "kept": point.routing.kept}
    return routing | {"budget": point.budget.nbytes, "slots": point.budget.slots} | asdict(point.outcome)


def table(found: Found) -> str:
    """Aligned plain text: milliseconds per step, a line per routing, a column per budget; then what came of it."""
    sizes = list(dict.fromkeys(point.budget for point in found.points))
    rows = [
        ["ms per step", "votes", *(format_bytes(size.nbytes, round_up=True) for size in sizes)],
        ["", "kept", *(f"{size.slots} slots" for size in sizes)],
    ]
    for name in dict.fromkeys(point.routing.name for point in found.points):
        mine = [point for point in found.points if point.routing.name == name]
        rows.append([name, _kept(mine[0]), *(_time(point, point in found.best) for point in mine)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return "\n".join([*(line.rstrip() for line in lines), "", *_conclusions(found)])


def _kept(point: Point) -> str:
    return "?" if point.routing.kept is None else f"{point.routing.kept:.3f}"


def _time(point: Point, best: bool) -> str:
    return f"{1000 * point.outcome.step_seconds:.3g}{'*' if best else ' '}"


def _conclusions(found: Found) -> list[str]:
    saved = 1 - found.tuned.step_seconds / found.default.step_seconds if found.default.step_seconds else 0.0
    chosen, smallest = found.chosen, found.smallest
    return [
        f"All times are simulated: {found.source}. * no other is as fast, as small and keeps as much.",
        f"options   {_options(found.knobs)}: {saved:.1%} of a step saved against the defaults",
        f"fastest   {_told(chosen)}",
        f"smallest  {_told(smallest)}; within {NEAR:.0%} of the best speed",
    ]


def _told(point: Point) -> str:
    size = format_bytes(point.budget.nbytes, round_up=True)
    outcome = point.outcome
    return (
        f"{point.routing.name} in {size}: {1000 * outcome.step_seconds:.3g} ms per step, "
        f"{outcome.stall_share:.1%} of it waiting, "
        f"{outcome.loads_per_step:.1f} experts moved, hit rate {outcome.hit_rate:.1%}"
    )


def _options(knobs: Knobs) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(knobs).items())


def config_text(found: Found, asked: dict[str, str | int], point: Point, budget: int) -> str:
    """A TOML preset for `point` under `budget` bytes; `asked` are options to hand on as they were given."""
    outcome, routing, smallest = point.outcome, point.routing, found.smallest
    kept = "unknown" if routing.kept is None else f"{routing.kept:.1%}"
    lines = [
        "# Written by dmoe tune. All figures are simulated:",
        f"# {found.source}.",
        *_assignments(asked),
        "",
        f"# With {point.budget.slots} expert slots a denoising step takes {1000 * outcome.step_seconds:.1f} ms,",
        f"# {outcome.stall_share:.1%} waiting; {outcome.hit_rate:.1%} of the experts wanted are there already.",
    ]
    if smallest.budget != point.budget:
        lines += [
            f"# Within {NEAR:.0%} of the best speed: {smallest.routing.name} in {smallest.budget.nbytes} bytes, "
            f"{1000 * smallest.outcome.step_seconds:.1f} ms.",
        ]
    lines += [f"gpu_mem = {budget}", f"max_context = {found.context}"]
    if routing.settings:
        lines += [
            "",
            f"# Keeps {kept} of the votes of original routing, which is not accuracy: dmoe eval measures that.",
        ]
        lines += _assignments(routing.settings)
    lines += ["", "# The best found by changing one at a time; none of them changes an answer."]
    return "\n".join([*lines, *_assignments(asdict(found.knobs)), ""])


def _assignments(values: dict[str, Any]) -> list[str]:
    return [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
