"""Fig. 2: where a denoising step's time goes, and how MoE latency follows the number of distinct experts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tools.analysis.figures import BLUE, GREEN, GREY, INK, ORANGE, Drawn, finish, panels
from tools.analysis.fits import Line, linear_fit
from tools.analysis.sections.content import Content, Data
from tools.analysis.tables import Table, number, percent

PARTS = ("moe", "attention", "other")


def components(data: Data) -> Content:
    """Fig. 2a and b."""
    bars = data.measured("components")["bars"]
    facts = data.facts("base")
    tight = round(data.study.tight_share * facts["all_experts"])
    caches = {
        "whole": f"expert cache as large as memory allows ({facts['slots']} of {facts['all_experts']})",
        "tight": f"expert cache of {tight} of {facts['all_experts']}",
    }
    rows = [
        [
            f"{'a' if bar['cache'] == 'whole' else 'b'}: {bar['block_length']} tokens, {bar['routing']}",
            *(number(bar[part], 2) for part in (*PARTS, "total")),
            percent(bar["moe"] / bar["total"]),
        ]
        for bar in bars
    ]
    table = Table(
        "Fig. 2a and b in numbers. Milliseconds per denoising step",
        ("Setting", "MoE", "Attention", "Other", "Total", "MoE's share"),
        rows,
        frozenset(place for place, bar in enumerate(bars) if bar["routing"].startswith("dMoE")),
        notes=[
            f"a: {caches['whole']}; b: {caches['tight']}. MoE is router, experts, shared experts and waiting for "
            "transfers; attention includes its projections and the KV cache; other is embedding, norms, dense "
            f"layers, head and sampling. Medians of rounds of {data.study.effort.prompts} answers, after a warm-up. "
            "The engine steps one prompt at a time, so there is no batch size to vary; the paper's two panels are "
            "two frameworks on a GPU.",
        ],
    )
    share = [bar["moe"] / bar["total"] for bar in bars if not bar["routing"].startswith("dMoE")]
    text = (
        f"Under the original routing MoE takes {percent(min(share), 0)} to {percent(max(share), 0)} of a denoising "
        "step, attention and everything else the rest. The paper finds that MoE dominates, too, without printing "
        "shares."
    )
    return Content([text, _bars(bars, caches), table], {"bars": bars})


def _bars(bars: Sequence[dict[str, Any]], caches: dict[str, str]) -> Drawn:
    colours = {"moe": ORANGE, "attention": BLUE, "other": GREY}
    names = {"moe": "MoE", "attention": "attention", "other": "other"}
    with panels(2, height=3.6, width=8.2) as (figure, both):
        for axes, (cache, letter) in zip(both, (("whole", "a"), ("tight", "b")), strict=True):
            mine = [bar for bar in bars if bar["cache"] == cache]
            lengths = sorted({bar["block_length"] for bar in mine})
            for bar in mine:
                ours = bar["routing"].startswith("dMoE")
                place, bottom = lengths.index(bar["block_length"]) + (0.2 if ours else -0.2), 0.0
                for part in PARTS:
                    label = names[part] if bar is mine[0] else None
                    axes.bar(place, bar[part], 0.36, bottom=bottom, color=colours[part], label=label)
                    bottom += bar[part]
                axes.annotate("dMoE" if ours else "orig.", (place, bottom), ha="center", va="bottom", fontsize=8)
            axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
            axes.grid(visible=False, axis="x")
            axes.set_xlabel("block length, tokens")
            axes.set_title(f"({letter}) {caches[cache]}", fontsize=9)
        both[0].set_ylabel("ms per denoising step")
        both[0].legend(loc="upper left", labelcolor=INK)
        listed = "; ".join(
            f"{bar['cache']} cache, {bar['block_length']} tokens, {bar['routing']}: MoE {bar['moe']:.1f} of "
            f"{bar['total']:.1f} ms"
            for bar in bars
        )
        return finish(
            figure,
            "fig2ab",
            "Fig. 2a and b. Time of a denoising step by component, original routing beside dMoE.",
            f"Stacked bars: {listed}.",
        )


def moe_latency(data: Data) -> Content:
    """Fig. 2c."""
    measured = data.measured("moe-latency")
    facts = data.facts("base")
    tight = round(data.study.tight_share * facts["all_experts"])
    names = {
        ("whole", "swept"): f"one layer, made-up routings, cache of {facts['slots']}",
        ("tight", "swept"): f"one layer, made-up routings, cache of {tight}",
        ("whole", "real"): f"all layers, real denoising steps, cache of {facts['slots']}",
        ("tight", "real"): f"all layers, real denoising steps, cache of {tight}",
    }
    series = {(cache, kind): measured[cache][kind] for cache, kind in names}
    lines = {key: _fit(points) for key, points in series.items()}
    rows = [
        [
            names[key],
            str(len(series[key])),
            f"{min(unique for unique, _ms in series[key])} to {max(unique for unique, _ms in series[key])}",
            number(1000 * line.slope, 1),
            number(line.intercept, 2),
            number(line.r_squared, 3),
        ]
        for key, line in lines.items()
        if line is not None
    ]
    table = Table(
        "Fig. 2c in numbers. MoE latency = intercept + slope × unique experts",
        ("Series", "Points", "Unique experts", "Slope, µs per expert", "Intercept, ms", "R²"),
        rows,
        notes=[
            "Made-up routings: the same hidden states, every token with its k experts, all together exactly so many "
            "distinct ones; fitted to the median latency of each number of experts. Real steps: every MoE layer of "
            "every denoising step under the original routing, fitted to all points.",
        ],
    )
    line = lines["whole", "swept"]
    said = "There are too few points for a line."
    if line is not None:
        said = (
            f"Latency against the distinct experts fits a straight line of {number(1000 * line.slope, 0)} µs per "
            f"expert with R² {number(line.r_squared, 3)}."
        )
    text = (
        f"The arithmetic of made-up routings is the same throughout, however many experts it is spread over. {said} "
        "The paper shows such a line and prints no coefficients."
    )
    numbers = {f"{cache}-{kind}": line._asdict() if line else None for (cache, kind), line in lines.items()}
    return Content([text, _scatter(series, lines, tight), table], numbers)


def _fit(points: Sequence[tuple[int, float]]) -> Line | None:
    middles = by_count(points)
    if len(middles) < 2:
        return None
    few = len(middles) * 2 <= len(points) and len(middles) <= 32  # a sweep: many repeats of few counts
    xs, ys = zip(*(middles.items() if few else points), strict=True)
    return linear_fit(xs, ys)


def by_count(points: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Number of distinct experts -> median latency, rising."""
    found: dict[int, list[float]] = {}
    for unique, seconds in points:
        found.setdefault(unique, []).append(seconds)
    return {unique: statistics.median(found[unique]) for unique in sorted(found)}


def _scatter(
    series: dict[tuple[str, str], Sequence[tuple[int, float]]], lines: dict[tuple[str, str], Line | None], tight: int
) -> Drawn:
    with panels(2, height=3.4) as (figure, both):
        for axes, kind, title in zip(
            both, ("swept", "real"), ("made-up routings", "real denoising steps"), strict=True
        ):
            for cache, colour, label in (("whole", BLUE, "whole cache"), ("tight", GREEN, f"cache of {tight}")):
                points, line = series[cache, kind], lines[cache, kind]
                middles = by_count(points)
                shown = list(middles.items()) if kind == "swept" else points
                xs, ys = zip(*shown, strict=True)
                axes.scatter(xs, ys, s=14, alpha=0.6, color=colour, linewidths=0, label=label)
                if line is not None:
                    ends = [min(middles), max(middles)]
                    axes.plot(ends, [line.intercept + line.slope * x for x in ends], color=colour, linewidth=1.5)
            axes.set_title(title)
            axes.set_xlabel("unique experts")
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.legend(loc="upper left", labelcolor=INK)
        both[0].set_ylabel("MoE latency, ms")
        return finish(
            figure,
            "fig2c",
            "Fig. 2c. Latency of a MoE layer against the distinct experts its tokens chose, with straight-line fits.",
            "Two scatter plots with fitted lines; latency rises with the number of unique experts in both.",
        )
