"""Table 2: the routings side by side."""

from __future__ import annotations

from functools import partial
from typing import Any

from tools.analysis import paper
from tools.analysis.evaluations import Evaluated
from tools.analysis.matching import ATTEMPTS, Search, search
from tools.analysis.runs import MATCHED, OURS, Run, dmoe, main_comparison, original
from tools.analysis.sections.content import Content, Data, lacking, run_numbers
from tools.analysis.study import Effort
from tools.analysis.tables import NOTHING, Table, change, interval, number, percent

COLUMNS = (
    "Routing",
    "Unique experts",
    "Change",
    "Accuracy %",
    "95 % interval",
    "Kept %",
    "Kept, at least %",
    "Tokens / step",
)


def rows_of_table_2(effort: Effort, data: Data, task: str) -> list[Run]:
    """Table 2's rows in its order; DES-Vote at dMoE's compression only once that is known."""
    runs = {run.name: run for run in main_comparison(effort)}
    found = matching(data, task)
    if found.best is not None:
        runs[MATCHED] = found.best.run
    elif found.following is not None:
        runs[MATCHED] = found.following
    last = ("des-seq-k1", MATCHED, OURS, "dmoe-p0.5", "base-dmoe-p0.6", "distilled-original")
    return [run for name, run in runs.items() if name not in last] + [runs[name] for name in last if name in runs]


def matching(data: Data, task: str) -> Search:
    """DES-Vote at dMoE's compression, as far as it has been looked for."""
    if data.find(task, dmoe(0.6)) is None:
        return Search(None, None)
    return search(partial(data.find, task), data.facts("base")["num_experts"])


def paper_row(name: str, effort: Effort) -> paper.Row | None:
    """The paper's row of Table 2 that belongs beside ours; it has one DES-S row and doesn't say for which k."""
    keys = {f"des-seq-k{max(effort.des_ks)}": "des-seq", "des-seq-k1": "des-seq-matched", "des-vote-b0.15": "des-vote"}
    return paper.TABLE_2.get("des-vote-matched" if name.startswith(MATCHED) else keys.get(name, name))


def our_cells(data: Data, task: str, found: Evaluated, reference: Run | None = None) -> list[str]:
    """The cells of `COLUMNS` after the first."""
    paired, strict = data.against_original(task, found, reference), found.summary["strict"]
    kept, before = paired["strict"]["kept"], data.need(task, reference or original())
    same = before.run.name == found.run.name
    return [
        number(found.unique),
        NOTHING if same else change(found.unique, before.unique),
        number(100 * strict["accuracy"]),
        interval(strict["low"], strict["high"]),
        NOTHING if same or kept is None else number(100 * kept["ratio"], 2),
        NOTHING if same or kept is None else number(100 * kept["lower_bound"], 2),
        number(found.summary["tokens_per_step"], 2),
    ]


def paper_cells(row: paper.Row | None, task: str, before: paper.Row = paper.ORIGINAL) -> list[str]:
    """The paper's experts, accuracy and what it kept of `before`'s accuracy."""
    if row is None:
        return [NOTHING] * 3
    experts, accuracy = row.of(task)
    kept = NOTHING if row is before else number(100 * accuracy / before.of(task)[1], 2)
    return [number(experts), number(accuracy), kept]


def paper_columns(task: str) -> tuple[str, str, str]:
    """Headings of `paper_cells`."""
    column = paper.column(task)
    return f"paper, {column}: experts", "accuracy %", "kept %"


def table_2(data: Data) -> Content:
    """The main comparison."""
    effort, parts, numbers, missing = data.study.effort, [], {}, []
    for task in data.study.tasks:
        data.need(task, original())
        rows: list[list[str]] = []
        ours, collected = set(), []
        for run in rows_of_table_2(effort, data, task):
            found = data.find(task, run)
            if found is None:
                missing.append(lacking(task, run))
                continue
            if run.name.startswith("dmoe"):
                ours.add(len(rows))
            rows.append([run.label, *our_cells(data, task, found), *paper_cells(paper_row(run.name, effort), task)])
            collected.append(run_numbers(data, task, found))
        n = data.need(task, original()).summary["n"]
        parts.append(
            Table(
                f"Table 2. Routings on {task}, {n} problems",
                (*COLUMNS, *paper_columns(task)),
                rows,
                frozenset(ours),
                len(COLUMNS),
                _notes(data),
            )
        )
        numbers[task] = collected
    return Content([*parts, *_lesson(numbers)], numbers, missing)


def _notes(data: Data) -> list[str]:
    models = (
        "The dMoE rows are the distilled model, all others the base model, unless they say otherwise."
        if data.study.has_base
        else "All rows are the same model: no base model was given."
    )
    return [
        f"{models} Kept: accuracy relative to the base model under original routing on the same problems; at least: "
        "the one-sided 95 % bound. Unique experts: distinct experts chosen over a block, mean over MoE layers, "
        "denoising forwards and problems.",
        "DES-S* is DES-Seq with k = 1, as far down as it goes. DES-V* is DES-Vote at the compression of dMoE "
        "(p = 0.6): since group-limited routing leaves some of a coreset unused, its coreset was sized so that the "
        f"experts used come to no fewer, and is the nearest of at most {ATTEMPTS} that were measured. The paper does "
        "not state the k of its one DES-S row; it stands beside our largest. Its row p = 0.5 is a second model, "
        "trained with that p; ours is one model throughout.",
    ]


def _lesson(numbers: dict[str, Any]) -> list[str]:
    text = []
    for task, rows in numbers.items():
        by_name = {row["run"]: row for row in rows}
        if OURS not in by_name:
            continue
        ours = by_name[OURS]
        kept = ours["against_original"]["kept"]
        said = f"On {task} dMoE (p = 0.6) uses {fewer(ours['unique_experts_reduction']['reduction'])}"
        said += f" and keeps {percent(kept['ratio'], 2)} of the accuracy." if kept else "."
        matched = next((row for name, row in by_name.items() if name.startswith(MATCHED)), None)
        if matched is not None and kept and matched["against_original"]["kept"]:
            said += _beside(ours, matched)
        text.append(said)
    return text


def _beside(ours: dict[str, Any], matched: dict[str, Any]) -> str:
    """DES-Vote at dMoE's compression, and which of the two keeps more."""
    mine, theirs = (row["against_original"]["kept"]["ratio"] for row in (ours, matched))
    most = "which is more" if theirs > mine else "which is less" if theirs < mine else "as much"
    low, high = ((row["strict"]["low"], row["strict"]["high"]) for row in sorted((ours, matched), key=_accuracy))
    apart = "" if low[1] < high[0] or most == "as much" else "; the intervals of the two accuracies overlap"
    short = "" if matched["unique_experts"] >= ours["unique_experts"] else ", fewer than dMoE"
    return (
        f" DES-Vote with {number(matched['unique_experts'])} experts{short} (dMoE: {number(ours['unique_experts'])}) "
        f"keeps {percent(theirs, 2)}, {most}{apart}."
    )


def _accuracy(row: dict[str, Any]) -> float:
    found: float = row["strict"]["accuracy"]
    return found


def fewer(reduction: float) -> str:
    """A share of the experts saved, in words."""
    return f"{percent(abs(reduction))} {'fewer' if reduction >= 0 else 'more'} experts"
