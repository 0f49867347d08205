"""The step times of a benchmark as bars. Needs matplotlib, of the extra `eval`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from offload_engine.bench.summary import Figures
from offload_engine.files import replacing

mpl.use("Agg")


def plot(everyone: Mapping[str, Figures], path: Path) -> None:
    """Write a PNG: median step time per contender on a logarithmic axis, quartiles as whiskers, bounds as marks."""
    names = list(everyone)[::-1]
    shown = [everyone[name] for name in names]
    figure = Figure(figsize=(8, 1.2 + 0.4 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    whiskers = [[max(0.0, one.step - one.quartiles[0]) for one in shown]]
    whiskers += [[max(0.0, one.quartiles[1] - one.step) for one in shown]]
    if shown:
        axes.barh(names, [one.step for one in shown], xerr=whiskers, color="tab:blue", alpha=0.7)
        axes.set_xscale("log")
    bounds = [(name, one.bound) for name, one in zip(names, shown, strict=True) if one.bound]
    if bounds:
        axes.plot([bound for _, bound in bounds], [name for name, _ in bounds], "k|", markersize=14, label="bound")
        axes.legend()
    axes.set_xlabel("seconds per denoising step: median and quartiles")
    with replacing(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
