"""Fig. 5: what the routings cost in memory and in time."""

from __future__ import annotations

import statistics
from typing import Any

from tools.analysis import paper
from tools.analysis.figures import BLUE, GREY, ORANGE, Drawn, finish, panels
from tools.analysis.runs import OURS, original
from tools.analysis.sections.comparison import rows_of_table_2
from tools.analysis.sections.content import Content, Data, MissingError, lacking
from tools.analysis.speed import compared
from tools.analysis.tables import NOTHING, Table, change, number


def figure_5a(data: Data) -> Content:
    """Memory of the experts that one denoising forward uses, task by task."""
    parts: list[str | Table | Drawn] = []
    numbers, missing = {}, []
    for place, task in enumerate(data.study.tasks):
        names, sizes, lacks = _memory(data, task)
        missing += lacks
        numbers[task] = sizes
        name = f"fig5a-{place}" if place else "fig5a"
        parts += [_bars_5a(name, task, names, sizes), _table_5a(data.facts("base"), task, names, sizes)]
    return Content(parts, numbers, missing)


def _memory(data: Data, task: str) -> tuple[list[str], dict[str, float], list[str]]:
    """Labels of the routings, bytes by their names, and what is lacking. Raises `MissingError`."""
    facts, names, sizes, missing = data.facts("base"), [], {}, []
    for run in rows_of_table_2(data.study.effort, data, task):
        found = data.find(task, run)
        if found is None:
            missing.append(lacking(task, run))
            continue
        used = sum(found.summary["unique_experts_by_layer"].values())
        sizes[run.name] = used * facts["expert_bytes"]
        names.append(run.label)
    if original().name not in sizes:
        raise MissingError(lacking(task, original()))
    return names, sizes, missing


def _table_5a(facts: dict[str, Any], task: str, names: list[str], sizes: dict[str, float]) -> Table:
    before = sizes[original().name]
    rows = [
        [label, _mega(size), NOTHING if name == original().name else change(size, before)]
        for label, (name, size) in zip(names, sizes.items(), strict=True)
    ]
    return Table(
        f"Fig. 5a in numbers. Expert memory of one denoising forward on {task}, all {len(facts['moe_layers'])} MoE "
        "layers",
        ("Routing", "MB", "Change"),
        rows,
        frozenset(place for place, name in enumerate(sizes) if name.startswith("dmoe")),
        notes=[f"The paper: {paper.MEMORY_SAVED[0]} to {paper.MEMORY_SAVED[1]} % less, on its four benchmarks."],
    )


def _mega(size: float) -> str:
    return number(size / 1e6, 2 if size < 1e8 else 0)


def _bars_5a(name: str, task: str, names: list[str], sizes: dict[str, float]) -> Drawn:
    with panels(1, height=0.6 + 0.28 * len(names)) as (figure, (axes,)):
        colours = [ORANGE if run.startswith("dmoe") else BLUE for run in sizes]
        bars = axes.barh(names, [size / 1e6 for size in sizes.values()], color=colours)
        axes.bar_label(bars, [_mega(size) for size in sizes.values()], padding=3)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("MB of distinct experts per denoising forward")
        listed = ", ".join(f"{label} {_mega(size)} MB" for label, size in zip(names, sizes.values(), strict=True))
        return finish(
            figure,
            name,
            f"Fig. 5a. Memory of the distinct experts that one denoising forward uses on {task}, all MoE layers "
            "together.",
            f"Bar chart of expert memory per routing: {listed}.",
        )


def figure_5b(data: Data) -> Content:
    """Speed, end to end."""
    measured = data.measured("speed")
    runs = compared(data.study)
    numbers = {cache: {run.name: _speed(one, run.name) for run in runs} for cache, one in measured.items()}
    rows = []
    for run in runs:
        whole, tight = (numbers[cache][run.name] for cache in ("whole", "tight"))
        rows.append([run.label, *_speed_cells(whole), *_speed_cells(tight), number(tight["megabytes_per_answer"], 1)])
    slots, facts, task = measured["tight"]["slots"], data.facts("base"), data.study.tasks[0]
    labels = {cache: _cache_label(measured[cache]["slots"], facts) for cache in ("whole", "tight")}
    table = Table(
        f"Fig. 5b in numbers. Medians of {len(measured['whole']['rounds']['original'])} rounds of "
        f"{measured['whole']['prompts']} answers, {task}",
        (
            "Routing",
            "ms / answer",
            "ms / step",
            "Speed-up",
            "range",
            f"cache of {slots}: ms / answer",
            "ms / step",
            "Speed-up",
            "range",
            "MB moved / answer",
        ),
        rows,
        frozenset(place for place, run in enumerate(runs) if run.name.startswith("dmoe")),
        notes=[
            f"First columns: {labels['whole']}. Speed-up: time of the original routing's round over this routing's, "
            f"on the same prompts ({task}); range: least and most of all rounds. In a round each model is opened "
            "alone and warmed up, then its routings come in random order. Prefill and commit are in it.",
            f"The paper's first version: {paper.SPEED_UP[0]} to {paper.SPEED_UP[1]} times as fast, end to end, on an "
            "H100.",
        ],
    )
    ours = {cache: one[OURS] for cache, one in numbers.items()}
    text = (
        f"On {task}, dMoE (p = 0.6) answers {number(ours['whole']['speed_up'], 2)} times as fast as the original "
        f"routing with {labels['whole']}, and {number(ours['tight']['speed_up'], 2)} times as fast with "
        f"{labels['tight']}{_why(numbers)}."
    )
    return Content([text, _bars_5b(data, numbers, labels), table], numbers)


def _why(numbers: dict[str, dict[str, dict[str, float]]]) -> str:
    """What an answer needs in steps, since a routing may be fast by step and slow by answer."""
    before, ours = (numbers["whole"][name]["steps_per_answer"] for name in (original().name, OURS))
    return f"; it takes {number(ours)} denoising steps per answer, the original {number(before)}"


def _cache_label(slots: int, facts: dict[str, Any]) -> str:
    return f"a cache of {slots} of {facts['all_experts']} experts"


def _speed(measured: dict[str, Any], name: str) -> dict[str, float]:
    mine, reference, answers = measured["rounds"][name], measured["rounds"][original().name], measured["prompts"]
    ratios = [before["seconds"] / now["seconds"] for before, now in zip(reference, mine, strict=True)]
    moe = [
        (before["moe_seconds"] / before["steps"]) / (now["moe_seconds"] / now["steps"])
        for before, now in zip(reference, mine, strict=True)
    ]
    return {
        "speed_up": statistics.median(ratios),
        "least": min(ratios),
        "most": max(ratios),
        "moe_speed_up_per_step": statistics.median(moe),
        "answer_ms": statistics.median(1000 * one["seconds"] / answers for one in mine),
        "step_ms": statistics.median(1000 * one["denoise_seconds"] / one["steps"] for one in mine),
        "steps_per_answer": statistics.median(one["steps"] / answers for one in mine),
        "megabytes_per_answer": statistics.median(one["bytes_moved"] / answers for one in mine) / 1e6,
    }


def _speed_cells(speed: dict[str, float]) -> list[str]:
    return [
        number(speed["answer_ms"], 1),
        number(speed["step_ms"], 2),
        f"{speed['speed_up']:.2f}×",
        f"{speed['least']:.2f} to {speed['most']:.2f}",
    ]


def _bars_5b(data: Data, numbers: dict[str, dict[str, dict[str, float]]], labels: dict[str, str]) -> Drawn:
    runs = compared(data.study)
    with panels(1, height=0.9 + 0.42 * len(runs)) as (figure, (axes,)):
        for offset, cache, colour in ((-0.2, "whole", BLUE), (0.2, "tight", ORANGE)):
            found = [numbers[cache][run.name] for run in runs]
            middle = [one["speed_up"] for one in found]
            spread = [[m - one["least"] for m, one in zip(middle, found, strict=True)]]
            spread.append([one["most"] - m for m, one in zip(middle, found, strict=True)])
            places = [place + offset for place in range(len(runs))]
            axes.barh(places, middle, 0.38, xerr=spread, color=colour, ecolor=GREY, label=labels[cache])
        axes.axvline(1.0, color=GREY, linewidth=1)
        axes.set_yticks(range(len(runs)), [run.label for run in runs])
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("speed-up, end to end (original routing = 1)")
        axes.legend(loc="upper center", bbox_to_anchor=(0.4, 1.12), ncols=2)
        listed = "; ".join(
            f"{run.label} {numbers['whole'][run.name]['speed_up']:.2f} and {numbers['tight'][run.name]['speed_up']:.2f}"
            for run in runs
        )
        return finish(
            figure,
            "fig5b",
            f"Fig. 5b. End-to-end speed-up over the original routing on {data.study.tasks[0]}; lines span the rounds.",
            f"Bar chart of speed-ups with {labels['whole']} and with {labels['tight']}: {listed}.",
        )
