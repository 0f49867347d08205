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
    facts, task = data.facts("base"), data.study.tasks[0]
    slots = {bar["cache"]: bar["slots"] for bar in bars}
    caches = {
        "whole": f"expert cache as large as memory allows ({slots['whole']} of {facts['all_experts']})",
        "tight": f"expert cache of {slots['tight']} of {facts['all_experts']}",
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
        f"Fig. 2a and b in numbers. Milliseconds per denoising step, {task}",
        ("Setting", "MoE", "Attention", "Other", "Total", "MoE's share"),
        rows,
        frozenset(place for place, bar in enumerate(bars) if bar["routing"].startswith("dMoE")),
        notes=[
            f"a: {caches['whole']}; b: {caches['tight']}. MoE is router, experts, shared experts and waiting for "
            "transfers; attention includes its projections and the KV cache; other is embedding, norms, dense "
            f"layers, head and sampling. Medians of rounds of {data.study.effort.prompts} answers; in each, models "
            "and settings come in random order, every model opened alone and warmed up. The engine steps one prompt "
            "at a time, so there is no batch size to vary; the paper's two panels are "
            "two frameworks on a GPU.",
        ],
    )
    share = [bar["moe"] / bar["total"] for bar in bars if not bar["routing"].startswith("dMoE")]
    text = (
        f"Under the original routing MoE takes {_range(share)} of a denoising step, attention and everything else the "
        f"rest. The paper finds that MoE dominates, without printing shares; {_dominance(share)}."
    )
    return Content([text, _bars(bars, caches, task), table], {"bars": bars})


def _range(shares: Sequence[float]) -> str:
    least, most = percent(min(shares), 0), percent(max(shares), 0)
    return least if least == most else f"{least} to {most}"


def _dominance(shares: Sequence[float]) -> str:
    if min(shares) > 0.5:
        return "it does here, too"
    if max(shares) <= 0.5:
        return "here it never takes more than half"
    return f"here it takes more than half in {sum(share > 0.5 for share in shares)} of {len(shares)} settings"


def _bars(bars: Sequence[dict[str, Any]], caches: dict[str, str], task: str) -> Drawn:
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
            f"Fig. 2a and b. Time of a denoising step by component on {task}, original routing beside dMoE.",
            f"Stacked bars: {listed}.",
        )


def moe_latency(data: Data) -> Content:
    """Fig. 2c."""
    measured = data.measured("moe-latency")
    facts, task = data.facts("base"), data.study.tasks[0]
    whole, tight = measured["whole"]["slots"], measured["tight"]["slots"]
    names = {
        ("whole", "swept"): f"one layer, made-up routings, cache of {whole}",
        ("tight", "swept"): f"one layer, made-up routings, cache of {tight}",
        ("whole", "real"): f"all layers, real denoising steps, cache of {whole}",
        ("tight", "real"): f"all layers, real denoising steps, cache of {tight}",
    }
    series = {(cache, kind): measured[cache][kind] for cache, kind in names}
    lines = {key: _fit(points, kind=key[1]) for key, points in series.items()}
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
        f"Fig. 2c in numbers. MoE latency = intercept + slope × unique experts, {task}",
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
            f"With a cache of {whole}, the straight line through the latency has {number(1000 * line.slope, 1)} µs "
            f"per distinct expert and explains R² = {number(line.r_squared, 3)} of its variation."
        )
    text = (
        "Made-up routings all multiply the same number of tokens by an expert each, however many experts these are"
        f"{'' if facts['dtype'] == 'float32' else ', rows that pad an expert to the width of a kernel apart'}. {said} "
        "The paper shows such a line and prints no coefficients."
    )
    numbers = {f"{cache}-{kind}": line._asdict() if line else None for (cache, kind), line in lines.items()}
    return Content([text, _scatter(series, lines, {"whole": whole, "tight": tight}, task), table], numbers)


def _fit(points: Sequence[tuple[int, float]], kind: str) -> Line | None:
    """A sweep repeats few counts, so its medians are fitted; of real steps, every point."""
    middles = by_count(points)
    if len(middles) < 2:
        return None
    xs, ys = zip(*(middles.items() if kind == "swept" else points), strict=True)
    return linear_fit(xs, ys)


def by_count(points: Sequence[tuple[int, float]]) -> dict[int, float]:
    """Number of distinct experts -> median latency, rising."""
    found: dict[int, list[float]] = {}
    for unique, seconds in points:
        found.setdefault(unique, []).append(seconds)
    return {unique: statistics.median(found[unique]) for unique in sorted(found)}


def _scatter(
    series: dict[tuple[str, str], Sequence[tuple[int, float]]],
    lines: dict[tuple[str, str], Line | None],
    slots: dict[str, int],
    task: str,
) -> Drawn:
    with panels(2, height=3.4) as (figure, both):
        for axes, kind, title in zip(
            both, ("swept", "real"), ("made-up routings", "real denoising steps"), strict=True
        ):
            for cache, colour in (("whole", BLUE), ("tight", GREEN)):
                points, line = series[cache, kind], lines[cache, kind]
                middles = by_count(points)
                shown = list(middles.items()) if kind == "swept" else points
                xs, ys = zip(*shown, strict=True)
                axes.scatter(xs, ys, s=14, alpha=0.6, color=colour, linewidths=0, label=f"cache of {slots[cache]}")
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
            f"Fig. 2c. Latency of a MoE layer against the distinct experts its tokens chose, with straight-line fits; "
            f"{task}.",
            f"Two scatter plots of latency against unique experts. {_slopes(lines, slots)}",
        )


def _slopes(lines: dict[tuple[str, str], Line | None], slots: dict[str, int]) -> str:
    kinds = {"swept": "made-up routings", "real": "real steps"}
    said = [
        f"{kinds[kind]}, cache of {slots[cache]}: {'rising' if line.slope > 0 else 'not rising'}, "
        f"{1000 * line.slope:.1f} µs per expert"
        for (cache, kind), line in lines.items()
        if line is not None
    ]
    return f"Fitted lines: {'; '.join(said)}." if said else "Too few points for lines."
