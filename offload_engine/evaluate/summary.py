"""What a run's records come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from offload_engine.config import format_bytes
from offload_engine.evaluate.records import Record
from offload_engine.evaluate.statistics import deviation, mean, variation, wilson


def summarise(settings: dict[str, Any], about: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """The numbers of a run, ready for `json.dumps`; those nothing was measured for are None.

    Unique experts follow the paper (REFERENCE §3): distinct experts of the block's positions, mean over MoE layers,
    over denoising forwards, over samples. Their coefficient of variation is that of all denoising forwards together,
    of the mean over layers, and of the middle layer, which is the paper's.
    """
    wanted = settings.get("n")
    return {
        "task": settings.get("task"),
        "subject": settings.get("subject"),
        "seed": settings.get("seed"),
        "model": settings.get("model"),
        "fingerprint": settings.get("fingerprint"),
        "dtype": settings.get("dtype"),
        "routing": settings.get("routing"),
        "sampling": settings.get("sampling"),
        "n": len(records),
        "complete": wanted is None or len(records) == wanted,
        "strict": accuracy(records, "strict"),
        "soft": accuracy(records, "soft"),
        **_unique(about, records),
        **_work(about, records),
        "finish_reasons": dict(Counter(record["finish_reason"] for record in records).most_common()),
    }


def middle_layer(moe_layers: list[int] | tuple[int, ...] | range) -> int:
    """The middle one of the MoE layers: 10 of LLaDA2.0-mini's 1 to 19, as the paper's (§4.1)."""
    return sorted(moe_layers)[len(moe_layers) // 2]


def accuracy(records: Sequence[Record], kind: str) -> dict[str, Any]:
    """How many records are right by `kind`, strict or soft: right, accuracy, and Wilson's 95 % interval low to high."""
    right = sum(bool(record[kind]) for record in records)
    if not records:
        return {"right": 0, "accuracy": None, "low": None, "high": None}
    low, high = wilson(right, len(records))
    return {"right": right, "accuracy": right / len(records), "low": low, "high": high}


def _unique(about: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    by_sample = [record["unique_experts"] for record in records if record["unique_experts"] is not None]
    forwards = [count for record in records for count in record["unique_by_forward"]]
    middle = [count for record in records for count in record["unique_mid_by_forward"]]
    layers = sorted({layer for record in records for layer in record["unique_by_layer"]}, key=int)
    by_layer = {
        layer: mean([record["unique_by_layer"][layer] for record in records if layer in record["unique_by_layer"]])
        for layer in layers
    }
    return {
        "unique_experts": mean(by_sample) if by_sample else None,
        "unique_experts_by_layer": by_layer,
        "unique_experts_cv": variation(forwards) if forwards else None,
        "unique_experts_middle": {
            "layer": middle_layer(about["moe_layers"]) if about.get("moe_layers") else None,
            "mean": mean(middle) if middle else None,
            "std": deviation(middle) if middle else None,
            "cv": variation(middle) if middle else None,
        },
    }


def _work(about: dict[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    def total(name: str) -> Any:
        return sum(record[name] for record in records)

    tokens, steps, seconds, plan = total("tokens"), total("steps"), total("seconds"), about.get("plan", {})
    requests = total("hits") + total("late") + total("misses")
    phases = Counter[str]()
    for record in records:
        phases.update(record["forwards"])
    return {
        "tokens": tokens,
        "steps": steps,
        "blocks": total("blocks"),
        "forwards": dict(phases),
        "tokens_per_answer": _ratio(tokens, len(records)),
        "steps_per_answer": _ratio(steps, len(records)),
        "tokens_per_step": _ratio(tokens, steps),
        "seconds": seconds,
        "stall_seconds": total("stall_seconds"),
        "tokens_per_second": _ratio(tokens, seconds),
        "bytes_moved": total("bytes_moved"),
        "hit_rate": _ratio(total("hits"), requests),
        "peak_bytes": max((record["peak_bytes"] for record in records), default=None),
        "planned_peak_bytes": plan.get("total"),
        "limit_bytes": plan.get("budget"),
        "slots": plan.get("slots"),
    }


def table(summary: dict[str, Any]) -> str:
    """A summary as a person reads it, one line per thing."""
    routing = dict(summary["routing"] or {})
    name = routing.pop("name", "n/a")
    options = ", ".join(f"{key} {value}" for key, value in routing.items())
    middle = summary["unique_experts_middle"]
    reasons = ", ".join(f"{count} {reason}" for reason, count in summary["finish_reasons"].items())
    rows = [
        ("task", " ".join(str(part) for part in (summary["task"], summary["subject"]) if part)),
        ("model", f"{summary['model']} ({summary['dtype']}, {summary['fingerprint']})"),
        ("routing", f"{name} ({options})" if options else name),
        ("answers", f"{summary['n']}{'' if summary['complete'] else ' (not complete)'}; {reasons}"),
        ("strict", accuracy_line(summary["strict"], summary["n"])),
        ("soft", accuracy_line(summary["soft"], summary["n"])),
        (
            "unique experts",
            f"{_number(summary['unique_experts'], 2)} per block and layer, CV {_percent(summary['unique_experts_cv'])}"
            f" (layer {middle['layer']}: {_number(middle['mean'], 2)}, CV {_percent(middle['cv'])})",
        ),
        (
            "tokens",
            f"{summary['tokens']} in {summary['steps']} steps: {_number(summary['tokens_per_step'], 2)} per step, "
            f"{_number(summary['tokens_per_second'], 1)} per second",
        ),
        ("experts moved", f"{format_bytes(summary['bytes_moved'])}, hit rate {_percent(summary['hit_rate'])}"),
        ("peak memory", f"{_bytes(summary['peak_bytes'])} of {_bytes(summary['planned_peak_bytes'])} planned"),
    ]
    return "\n".join(f"{name:<15} {value}" for name, value in rows)


def accuracy_line(accuracy: dict[str, Any], n: int) -> str:
    """What `accuracy` says of `n` answers, for people."""
    if accuracy["accuracy"] is None:
        return "n/a"
    span = f"{100 * accuracy['low']:.2f} to {100 * accuracy['high']:.2f}"
    return f"{_percent(accuracy['accuracy'], 2)} ({accuracy['right']} of {n}; 95 % interval {span})"


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _number(value: float | None, places: int) -> str:
    return "n/a" if value is None else f"{value:.{places}f}"


def _percent(value: float | None, places: int = 1) -> str:
    return "n/a" if value is None else f"{100 * value:.{places}f} %"


def _bytes(value: int | None) -> str:
    return "n/a" if value is None else format_bytes(value)
