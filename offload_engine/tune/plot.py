"""The frontier as a picture: step time over memory, one line per routing. Needs matplotlib, of the extra `eval`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from offload_engine.files import replacing
from offload_engine.tune.search import Point

mpl.use("Agg")


def plot(points: Sequence[Point], best: Sequence[Point], path: Path) -> None:
    """Write a PNG; points that no other beats are ringed. Lets `OSError` through."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for name in dict.fromkeys(point.routing.name for point in points):
        mine = [point for point in points if point.routing.name == name]
        kept = mine[0].routing.kept
        label = name if kept is None else f"{name}, keeps {kept:.0%}"
        axes.plot([one.budget.nbytes / 1e9 for one in mine], _times(mine), ".-", linewidth=1, label=label)
    shared = [point for point in points if point.cpu_experts != "off"]
    if shared:
        axes.plot([one.budget.nbytes / 1e9 for one in shared], _times(shared), "k+", label="misses shared with the CPU")
    axes.plot([one.budget.nbytes / 1e9 for one in best], _times(best), "ko", markersize=9, fillstyle="none")
    axes.set_yscale("log")
    axes.set_xlabel("fast memory, GB")
    axes.set_ylabel("milliseconds per denoising step, simulated")
    axes.legend(fontsize="small")
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _times(points: Sequence[Point]) -> list[float]:
    return [1000 * point.figures.step for point in points]
