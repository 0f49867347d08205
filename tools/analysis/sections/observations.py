"""Fig. 3 and Table 1: what makes block routing work."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from offload_engine.evaluate.statistics import deviation, mean, variation
from tools.analysis import paper
from tools.analysis.evaluations import Evaluated
from tools.analysis.figures import BLUE, INK, ORANGE, Drawn, finish, panels
from tools.analysis.fits import clustered_pearson, spearman
from tools.analysis.runs import dmoe, original
from tools.analysis.sections.content import Content, Data, lacking
from tools.analysis.tables import NOTHING, Table, number, percent

BINS = 8
UNMOVED = 0.001
"""Nats; a smaller change of the loss is next to none."""
LEAST_ANSWERS = 10
"""A step that fewer answers reached isn't drawn."""

KINDS = {"token": "for one token", "block": "for the whole block"}


def masking(data: Data) -> Content:
    """Fig. 3a."""
    measured = data.measured("masking")
    numbers, rows = {}, []
    for kind, label in KINDS.items():
        points = measured[kind]
        problems, weights, rises = ([point[place] for point in points] for place in (0, 3, 4))
        found = _correlations(weights, rises, problems)
        numbers[kind] = {"cases": len(points), "problems": len(set(problems)), **found}
        numbers[kind]["unmoved"] = sum(abs(rise) < UNMOVED for rise in rises) / len(rises)
        rows.append(
            [
                f"expert left out {label}",
                str(len(points)),
                number(found["r"], 3),
                f"{number(found['low'], 3)} to {number(found['high'], 3)}" if found["r"] is not None else NOTHING,
                number(found["spearman"], 3),
                number(found["spearman_size"], 3),
            ]
        )
    table = Table(
        f"Fig. 3a in numbers. Router weight against loss increase, {data.study.tasks[0]}",
        (
            "Case",
            "Cases",
            "Pearson r",
            "95 % interval",
            "Rank correlation",
            "Rank correlation with the size of the change",
        ),
        rows,
        notes=[
            "Protocol: for each problem the base model answers under the original routing; one block of the answer "
            "is masked in part (share drawn from 0.3 to 0.8), and the cross-entropy of the masked tokens is "
            "computed, once as it is and once with the output of one drawn (layer, expert) left out, its weight set "
            "to 0 and the others as they were: for one masked token (loss of that token), or for every token of the "
            "block (mean loss of its masked tokens, weights summed). Intervals resample whole problems 2000 times.",
            f"The paper: r = {paper.PEARSON}, from 108 data points of GSM8K on LLaDA2.0-mini; it doesn't say more of "
            f"its protocol.",
        ],
    )
    text = (
        f"{_said(numbers['token'])}; the paper finds {paper.PEARSON}. In "
        f"{percent(numbers['token']['unmoved'], 0)} of the cases of one token its loss moves by less than "
        f"{UNMOVED:g} nats: there the model is as sure without that expert as with it."
    )
    return Content([text, _weights(measured, data.study.tasks[0]), table], numbers)


def _said(found: dict[str, Any]) -> str:
    if found["r"] is None:
        return "There are too few cases, or too equal ones, for a correlation of router weight and loss increase"
    return (
        "Pearson's r between an expert's router weight for a token and what its absence does to the loss is "
        f"{number(found['r'], 3)} here (95 % interval {number(found['low'], 3)} to {number(found['high'], 3)})"
    )


def _correlations(weights: list[float], rises: list[float], problems: list[int]) -> dict[str, Any]:
    try:
        r, low, high = clustered_pearson(weights, rises, problems)
    except ValueError:  # too few cases to vary
        return dict.fromkeys(("r", "low", "high", "spearman", "spearman_size"))
    sizes = [abs(rise) for rise in rises]
    return {
        "r": r,
        "low": low,
        "high": high,
        "spearman": spearman(weights, rises),
        "spearman_size": spearman(weights, sizes),
    }


def _weights(measured: dict[str, Any], task: str) -> Drawn:
    with panels(2, height=3.4) as (figure, both):
        for axes, (kind, label) in zip(both, KINDS.items(), strict=True):
            weights, rises = (np.array([point[place] for point in measured[kind]]) for place in (3, 4))
            axes.scatter(weights, rises, s=10, alpha=0.4, color=BLUE, linewidths=0, label="one case")
            edges = np.quantile(weights, np.linspace(0, 1, BINS + 1))
            groups = [rises[(weights >= low) & (weights <= high)] for low, high in pairwise(edges)]
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            means = [(middle, group.mean()) for middle, group in zip(middles, groups, strict=True) if len(group)]
            axes.plot(*zip(*means, strict=True), color=ORANGE, marker="o", markersize=4, label="mean of an eighth")
            # Most changes are tiny and a few are not: linear near 0, logarithmic beyond.
            axes.set_yscale("symlog", linthresh=max(1e-9, float(np.abs(rises).max()) / 1000))
            axes.set_title(f"left out {label}")
            axes.set_xlabel("router weight" if kind == "token" else "router weight, summed over the block")
            axes.tick_params(axis="y", labelsize=8)
        both[0].set_ylabel("loss increase, nats")
        both[0].legend(loc="lower right", labelcolor=INK)
        return finish(
            figure,
            "fig3a",
            f"Fig. 3a. Loss increase when an expert is left out, against the router's weight for it, {task}.",
            "Two scatter plots of loss increase against router weight, with the means of eight groups of equal size.",
        )


def concentration(data: Data) -> Content:
    """Fig. 3b and Table 1."""
    parts: list[str | Table | Drawn] = []
    rows, numbers, missing = [], {}, []
    for place, task in enumerate(data.study.tasks):
        found = data.need(task, original())
        parts.append(_distribution(f"fig3b-{place}" if place else "fig3b", task, found))
        for run in (original(), dmoe(0.6)):
            one = data.find(task, run)
            if one is None:
                missing.append(lacking(task, run))
                continue
            counts = _middle_counts(one)
            spread = {"mean": mean(counts), "std": deviation(counts), "cv": variation(counts), "steps": len(counts)}
            numbers[f"{task}, {run.name}"] = spread
            rows.append(
                [f"{task}, {run.label}", number(spread["mean"], 2), number(spread["std"], 2), percent(spread["cv"], 2)]
            )
    layer = data.need(data.study.tasks[0], original()).summary["unique_experts_middle"]["layer"]
    for name, (middle, std, cv) in paper.TABLE_1.items():
        rows.append([f"paper: {name}, original", number(middle, 2), number(std, 2), f"{number(cv, 2)} %"])
    table = Table(
        f"Table 1. Distinct experts of a block in the middle MoE layer (ours: {layer}; the paper's: 10) over "
        f"denoising steps",
        ("Task and routing", "Mean", "Std", "CV"),
        rows,
        frozenset(place for place, row in enumerate(rows) if "dMoE" in row[0]),
        notes=["CV: standard deviation over mean, all denoising steps of all blocks and answers together."],
    )
    spread = numbers[f"{data.study.tasks[0]}, {original().name}"]
    text = (
        f"Under the original routing the count varies by {percent(spread['cv'])} around its mean from step to step; "
        "the paper finds 16 to 18 %, its reason for leaving the coreset's size to top-p."
    )
    return Content([text, *parts, table], numbers, missing)


def _middle_counts(one: Evaluated) -> list[float]:
    return [count for record in one.saved.records for count in record["unique_mid_by_forward"]]


def by_step(answers: Sequence[Sequence[float]], least: int) -> list[list[float]]:
    """Counts by denoising step of the answer, while at least `least` answers (or all there are) got that far."""
    longest = max(map(len, answers))
    steps = [[answer[step] for answer in answers if len(answer) > step] for step in range(longest)]
    return [counts for counts in steps if len(counts) >= min(least, len(answers))]


def _distribution(name: str, task: str, one: Evaluated) -> Drawn:
    counts = _middle_counts(one)
    steps = by_step([record["unique_mid_by_forward"] for record in one.saved.records], LEAST_ANSWERS)
    from matplotlib.ticker import MaxNLocator

    with panels(2, height=3.2) as (figure, (left, right)):
        left.hist(counts, bins=min(30, max(5, len(counts) // 4)), color=BLUE)
        left.axvline(mean(counts), color=ORANGE, label=f"mean {mean(counts):.1f}")
        left.set_xlabel("unique experts of the block")
        left.set_ylabel("denoising steps")
        left.legend(labelcolor=INK)
        places = range(1, len(steps) + 1)
        low, high = ([float(np.quantile(step, share)) for step in steps] for share in (0.1, 0.9))
        right.fill_between(places, low, high, color=BLUE, alpha=0.25, linewidth=0, label="middle 80 % of answers")
        right.plot(
            places, [statistics.fmean(step) for step in steps], color=ORANGE, marker="o", markersize=3, label="mean"
        )
        right.set_xlabel("denoising step of the answer")
        right.set_ylabel("unique experts of the block")
        right.set_ylim(bottom=0)
        right.xaxis.set_major_locator(MaxNLocator(integer=True))
        right.legend(loc="lower left", labelcolor=INK)
        return finish(
            figure,
            name,
            f"Fig. 3b. Distinct experts of the block in the middle MoE layer under the original routing, {task}.",
            f"Histogram of unique experts over denoising steps, mean {mean(counts):.1f} and standard deviation "
            f"{deviation(counts):.1f}; and their mean and spread by step of the answer.",
        )
