"""Tables 3 and 4, Fig. 6, and the options that spare transfers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from offload_engine.routing import RoutingOptions
from tools.analysis import paper
from tools.analysis.evaluations import Evaluated
from tools.analysis.figures import BLUE, GREEN, GREY, INK, ORANGE, Drawn, finish, panels
from tools.analysis.runs import (
    Run,
    des_seq,
    des_vote,
    dmoe,
    floor_ablation,
    of_block_length,
    options,
    original,
    top_p_ablation,
)
from tools.analysis.sections.comparison import COLUMNS, fewer, our_cells, paper_cells, paper_columns
from tools.analysis.sections.content import Content, Data, MissingError, lacking, run_numbers
from tools.analysis.tables import NOTHING, Table, change, interval, number, percent


def table_3(data: Data) -> Content:
    """The cumulative probability p, and the smallest coreset."""
    parts, numbers, missing = [], {}, []
    for task in data.study.tasks:
        rows, collected = [], []
        for run in top_p_ablation(data.study.effort):
            found = data.need(task, run) if run == original() else data.find(task, run)
            if found is None:
                missing.append(lacking(task, run))
                continue
            theirs = paper.ORIGINAL if run == original() else paper.TABLE_3[run.routing["top_p"]]
            rows.append([run.label, *our_cells(data, task, found), *paper_cells(theirs, task)])
            collected.append(run_numbers(data, task, found))
        ours = frozenset(range(1, len(rows)))
        caption = f"Table 3. The threshold p on {task}, one model with every p"
        parts.append(Table(caption, (*COLUMNS, *paper_columns(task)), rows, ours, len(COLUMNS)))
        floors = [run for run in floor_ablation(data.study.effort) if data.find(task, run) is not None]
        missing += [lacking(task, run) for run in floor_ablation(data.study.effort) if run not in floors]
        found_floors = [data.need(task, run) for run in floors]
        parts.append(
            Table(
                f"The smallest coreset on {task}, p = 0.6",
                COLUMNS,
                [[run.label, *our_cells(data, task, one)] for run, one in zip(floors, found_floors, strict=True)],
                frozenset(range(len(floors))),
                notes=["The paper's numbers are those of a smallest coreset of 12 or 16, by version (REFERENCE §3)."],
            )
        )
        numbers[task] = collected + [run_numbers(data, task, one) for one in found_floors if one.run != dmoe(0.6)]
    text = (
        f"A larger p lets more experts into the coreset. {_trained_with(data)} and evaluated with all of these; the "
        f"paper's rows are its model trained with p = 0.6. {_served_with(data)}"
    )
    return Content([text, *parts], numbers, missing)


def _trained_with(data: Data) -> str:
    top_p = _fact(data, "distilled_top_p")
    if top_p is None:
        return "The checkpoint doesn't say that it was distilled for dMoE, nor with which p; it is loaded as it is"
    return f"The model was distilled with p = {top_p:g}"


def _served_with(data: Data) -> str:
    least = _fact(data, "core_min_experts") or RoutingOptions().min_experts
    return (
        f"Whatever p, a coreset has at least {least} experts unless a row says otherwise, so that a small p comes to "
        "little more than that floor, in the paper's rows as in ours."
    )


def _fact(data: Data, name: str) -> Any:
    """Of the distilled model; None where it hasn't been measured."""
    try:
        return data.facts("distilled")[name]
    except MissingError:
        return None


def table_4(data: Data) -> Content:
    """Block lengths."""
    parts: list[str | Table] = []
    numbers, missing = {}, []
    for task in data.study.tasks:
        rows: list[list[str]] = []
        collected, ours = [], set()
        for length in sorted(data.study.effort.block_lengths, reverse=True):
            pair = of_block_length(length)
            reference, theirs = pair[0], paper.TABLE_4.get(length)
            if data.find(task, reference) is None:
                missing.append(lacking(task, reference))
                continue
            for place, run in enumerate(pair):
                found = data.find(task, run)
                if found is None:
                    missing.append(lacking(task, run))
                    continue
                if place:
                    ours.add(len(rows))
                beside = paper_cells(theirs[place] if theirs else None, task, theirs[0] if theirs else paper.ORIGINAL)
                rows.append([f"{length} tokens, {run.label}", *our_cells(data, task, found, reference), *beside])
                collected.append(run_numbers(data, task, found, reference))
        if rows:
            caption = f"Table 4. Block lengths on {task}; kept: against the original routing at the same length"
            columns = ("Block", *COLUMNS[1:], *paper_columns(task))
            parts += [_saved_by_length(task, collected), Table(caption, columns, rows, frozenset(ours), len(COLUMNS))]
            numbers[task] = collected
    return Content(parts, numbers, missing)


def _saved_by_length(task: str, rows: Sequence[dict[str, Any]]) -> str:
    saved = [
        f"{fewer(row['unique_experts_reduction']['reduction'])} with blocks of {row['block_length']} tokens"
        for row in rows
        if row["routing"]["routing"] == "dmoe"
    ]
    return f"On {task}, dMoE uses {', '.join(saved)}." if saved else f"Only the original routing was run on {task}."


def figure_6(data: Data) -> Content:
    """Accuracy against distinct experts."""
    effort, numbers, missing = data.study.effort, {}, []
    parts: list[str | Drawn] = []
    lines: dict[str, list[Run]] = {
        "dMoE": [dmoe(top_p) for top_p in effort.top_ps],
        "DES-V": [des_vote(beta) for beta in effort.betas],
        "DES-S": [des_seq(k) for k in effort.des_ks],
    }
    for place, task in enumerate(data.study.tasks):
        before = data.need(task, original())
        found = {
            name: [one for run in runs if (one := data.find(task, run)) is not None] for name, runs in lines.items()
        }
        missing += [lacking(task, run) for runs in lines.values() for run in runs if data.find(task, run) is None]
        above = {name: _above(found["dMoE"], found[name]) for name in ("DES-V", "DES-S")}
        parts += [_lies(task, above), _trade_off(f"fig6-{place}" if place else "fig6", task, before, found)]
        numbers[task] = {
            "original": _point(before),
            **{name: [_point(one) for one in line] for name, line in found.items()},
            "dmoe_above": {name: {"above": counts[0], "of": counts[1]} for name, counts in above.items()},
        }
    return Content(parts, numbers, missing)


def _above(ours: Sequence[Evaluated], theirs: Sequence[Evaluated]) -> tuple[int, int]:
    """How many of our points lie above the line through `theirs`, and how many of ours have such a line beside them."""
    line = sorted((one.unique, one.accuracy) for one in theirs)
    if len(line) < 2:
        return 0, 0
    xs, ys = zip(*line, strict=True)
    beside = [one for one in ours if xs[0] <= one.unique <= xs[-1]]
    return sum(one.accuracy > float(np.interp(one.unique, xs, ys)) for one in beside), len(beside)


def _lies(task: str, above: dict[str, tuple[int, int]]) -> str:
    said = [
        f"{count} of the {of} dMoE settings that fall within {name}'s range of experts are above {name}'s line"
        if of
        else f"no dMoE setting falls within {name}'s range of experts"
        for name, (count, of) in above.items()
    ]
    return f"On {task}, {'; '.join(said)} (by the accuracies themselves, their intervals left aside)."


def _point(one: Evaluated) -> dict[str, Any]:
    strict = one.summary["strict"]
    return {"run": one.run.name, "unique_experts": one.unique} | {
        key: strict[key] for key in ("accuracy", "low", "high")
    }


def _trade_off(name: str, task: str, before: Evaluated, lines: dict[str, list[Evaluated]]) -> Drawn:
    colours = {"dMoE": ORANGE, "DES-V": BLUE, "DES-S": GREEN}
    with panels(2, height=3.4) as (figure, (ours, theirs)):
        for label, line in lines.items():
            points = sorted((_point(one) for one in line), key=lambda point: float(point["unique_experts"]))
            if points:
                _line(ours, points, label, colours[label])
        _line(ours, [_point(before)], "original", GREY)
        ours.set_title(f"ours, {task}")
        for label, rows in _papers_lines().items():
            xs, ys = zip(*sorted(row.of(paper.MEAN) for row in rows), strict=True)
            theirs.plot(xs, ys, marker="o", color=colours.get(label, GREY), label=label)
        theirs.set_title("paper, mean of its four benchmarks")
        for axes in (ours, theirs):
            axes.set_xlabel("unique experts per block and layer")
            axes.set_ylabel("accuracy %")
            axes.set_xlim(left=0)
            axes.legend(loc="lower right", labelcolor=INK)
        said = "; ".join(
            f"{label} " + ", ".join(f"{percent(one.accuracy)} at {one.unique:.0f}" for one in line)
            for label, line in lines.items()
            if line
        )
        return finish(
            figure,
            name,
            f"Fig. 6. Accuracy against distinct experts on {task}, with 95 % intervals, and the paper's tables drawn "
            "alike.",
            f"Two line charts of accuracy against unique experts. Ours: {said}; original {percent(before.accuracy)} at "
            f"{before.unique:.0f}. The paper's dMoE line lies above its DES line.",
        )


def _line(axes: Any, points: Sequence[dict[str, Any]], label: str, colour: str) -> None:
    accuracy = [100 * point["accuracy"] for point in points]
    below = [100 * (point["accuracy"] - point["low"]) for point in points]
    above = [100 * (point["high"] - point["accuracy"]) for point in points]
    axes.errorbar(
        [point["unique_experts"] for point in points],
        accuracy,
        [below, above],
        marker="o",
        color=colour,
        capsize=2,
        label=label,
    )


def _papers_lines() -> dict[str, list[paper.Row]]:
    return {
        "dMoE": list(paper.TABLE_3.values()),
        "DES-V": [paper.TABLE_2["des-vote"], paper.TABLE_2["des-vote-matched"]],
        "DES-S": [paper.TABLE_2["des-seq"], paper.TABLE_2["des-seq-matched"]],
        "original": [paper.ORIGINAL],
    }


def transfer_options(data: Data) -> Content:
    """Cache-aware and held coresets: what they spare, and what they cost."""
    facts, parts, numbers, missing = data.facts("distilled"), [], {}, []
    for task in data.study.tasks:
        plain, *others = options(data.study.effort)
        found = data.need(task, plain)
        moved = found.summary["bytes_moved"] / found.summary["n"]
        rows, collected = [], []
        for run in (plain, *others):
            one = data.find(task, run)
            if one is None:
                missing.append(lacking(task, run))
                continue
            summary, strict = one.summary, one.summary["strict"]
            each, paired = summary["bytes_moved"] / summary["n"], data.against_original(task, one, plain)["strict"]
            rows.append(
                [
                    run.label,
                    number(each / 1e6, 2),
                    NOTHING if run == plain else change(each, moved) if moved else NOTHING,
                    percent(summary["hit_rate"]),
                    number(one.unique),
                    number(100 * strict["accuracy"]),
                    interval(strict["low"], strict["high"]),
                    NOTHING if run == plain or not paired["kept"] else number(100 * paired["kept"]["lower_bound"], 2),
                ]
            )
            collected.append(
                {**run_numbers(data, task, one, plain), "bytes_moved_per_answer": each, "hit_rate": summary["hit_rate"]}
            )
        slots = found.saved.about["plan"]["slots"]
        parts.append(
            Table(
                f"Options of dMoE on {task} behind a cache of {slots} of {facts['all_experts']} experts",
                (
                    "Routing",
                    "MB moved / answer",
                    "Change",
                    "Hit rate",
                    "Unique experts",
                    "Accuracy %",
                    "95 % interval",
                    "Kept of plain dMoE, at least %",
                ),
                rows,
                notes=[
                    "Ours; the paper has no such rows. The cache is too small on purpose, so that there is something "
                    "to spare. With a residency bonus the answers, and so all numbers of the row, depend on which "
                    "experts happen to be in fast memory, hence on the timing of transfers: they vary from run to run."
                ],
            )
        )
        numbers[task] = collected
    text = (
        "A cache-aware coreset counts votes for experts that are in fast memory (1 + bonus)-fold; a held coreset is "
        "chosen once for several denoising steps of its block."
    )
    return Content([text, *parts], numbers, missing)
