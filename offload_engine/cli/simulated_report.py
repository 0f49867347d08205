"""What `dmoe simulate` prints: tables or JSON, in which every figure is said to be simulated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from offload_engine.cli.terminal import Output
from offload_engine.config import format_bytes
from offload_engine.simulate.profile import UNITS, Profile
from offload_engine.simulate.run import Bounds, Figures, Setting
from offload_engine.trace import TraceHeader

FORMAT = "offload_engine.simulation"
VERSION = 1
SIMULATED = "SIMULATED: no figure below was measured; a recorded trace was replayed on a virtual clock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What was simulated."""

    profile: str
    memory: int | None
    """Budget of fast memory in bytes; None where slots were given."""
    moe_layers: int
    routing: str
    setting: Setting

    @property
    def slots_per_layer(self) -> float:
        """Expert slots per MoE layer."""
        return self.setting.slots / self.moe_layers

    @property
    def host_slots_per_layer(self) -> float | None:
        """The same of the host tier; None where it was taken to hold everything, or there is none."""
        return None if self.setting.host_slots is None else self.setting.host_slots / self.moe_layers


@dataclass(frozen=True, slots=True)
class Outcome:
    """A case and what came of it."""

    case: Case
    figures: Figures
    bounds: Bounds


@dataclass(frozen=True, slots=True)
class Reported:
    """All of one call."""

    trace: str
    header: TraceHeader
    model: str
    profiles: Sequence[Profile]
    outcomes: Sequence[Outcome]

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for `json.dumps`; times in seconds, shares from 0 to 1."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "simulated": True,
            "trace": self.trace,
            "model": self.model,
            "routing": self.header.routing,
            "profiles": {one.name: one.model_dump(exclude_none=True) for one in self.profiles},
            "results": [
                {
                    "profile": one.case.profile,
                    "memory": one.case.memory,
                    "routing": one.case.routing,
                    "setting": asdict(one.case.setting),
                    "simulated": asdict(one.figures),
                    "simulated_bounds": asdict(one.bounds),
                }
                for one in self.outcomes
            ],
        }

    def text(self) -> str:
        """The tables that a person reads, in Markdown."""
        title = (
            f"{self.trace}: {self.model}, {self.header.routing} routing, blocks of {self.header.block_length} tokens"
        )
        parts = [SIMULATED, title, _table(*_figures(self.outcomes)), _table(*_bounds(self.outcomes))]
        return "\n\n".join([*parts, *map(_grounds, self.profiles)])


def show(reported: Reported, *, as_json: bool) -> None:
    """Print it."""
    Output().line(json.dumps(reported.as_dict()) if as_json else reported.text())


def _figures(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    header = ["simulated", "memory", "slots/layer", "host/layer", "routing", "eviction", "predictor", "step, ms"]
    header += ["tokens/s", "hits", "stalled", "link busy", "loads/step"]
    shared = any(one.case.setting.cpu_experts != "off" for one in outcomes)
    header += ["CPU experts", "on CPU/step"] if shared else []
    rows = []
    for one in outcomes:
        figures, setting = one.figures, one.case.setting
        rows.append(
            [
                *_place(one.case),
                setting.eviction,
                setting.predictor,
                _ms(figures.step),
                _number(figures.tokens_per_second),
                *(_percent(share) for share in (figures.hit_rate, figures.stall, figures.link_busy)),
                f"{figures.loads:.1f}",
                *([str(setting.cpu_experts), f"{figures.on_cpu:.1f}"] if shared else []),
            ]
        )
    return header, rows


def _bounds(outcomes: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """One row per machine, memory and routing, its best case beside what surrounds it."""
    header = ["simulated, ms per step", "memory", "slots/layer", "host/layer", "routing", "best above"]
    header += ["perfect prediction", "infinite bandwidth", "Belady", "Belady loads/step", "on demand", "x faster"]
    best: dict[tuple[str, ...], Outcome] = {}
    for one in outcomes:
        place = _place(one.case)
        if place not in best or one.figures.step < best[place].figures.step:
            best[place] = one
    rows = [
        [
            *place,
            *(_ms(value) for value in (one.figures.step, one.bounds.perfect, one.bounds.infinite, one.bounds.belady)),
            f"{one.bounds.belady_loads:.1f}",
            _ms(one.bounds.on_demand),
            f"{one.bounds.on_demand / one.figures.step:.2f}",
        ]
        for place, one in best.items()
    ]
    return header, rows


def _place(case: Case) -> tuple[str, ...]:
    host = "-" if case.host_slots_per_layer is None else f"{case.host_slots_per_layer:.1f}"
    memory = "-" if case.memory is None else format_bytes(case.memory)
    return case.profile, memory, f"{case.slots_per_layer:.1f}", host, case.routing


def _grounds(profile: Profile) -> str:
    """How much of a profile is guessed."""
    figures = [(name, getattr(profile, name)) for name in UNITS]
    guessed = [name for name, figure in figures if figure is not None and figure.estimate]
    told = f"{profile.name}: {profile.title}"
    return f"{told}; estimated: {', '.join(guessed)}" if guessed else f"{told}; no figure is an estimate"


def _ms(seconds: float) -> str:
    return _number(seconds * 1000)


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _percent(share: float) -> str:
    return f"{share * 100:.1f} %"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown whose columns are aligned for those who read it as text."""
    wide = [max(len(row[place]) for row in (header, *rows)) for place in range(len(header))]
    lines = [header, ["-" * width for width in wide], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(line, wide, strict=True)) + " |" for line in lines
    )
