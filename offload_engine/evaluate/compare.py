"""Two runs over the same samples, B held against A: what B kept of A's accuracy, and how many experts it saved."""

from __future__ import annotations

from typing import Any

from offload_engine.errors import UsageError
from offload_engine.evaluate.records import Record, SavedRun, flatten
from offload_engine.evaluate.statistics import (
    Z_ONE_SIDED,
    Paired,
    accuracy_difference,
    accuracy_ratio,
    mcnemar,
    mean_ratio,
)

SAME = ("prompt", "gold")
"""What a sample must have in common in both runs; records without a field are taken to agree in it."""
WORK = ("steps", "tokens", "seconds", "bytes_moved")


def compare(a: SavedRun, b: SavedRun) -> dict[str, Any]:
    """Everything the two runs say of each other, ready for `json.dumps`.

    Per grade: McNemar's exact p, `difference` (accuracy of B less that of A) and `kept` (accuracy of B over that of A),
    each with a 95 % interval, `kept` also with its one-sided 95 % lower bound (methods: `statistics`). Of unique
    experts the reduction, 1 - B/A, with its interval, and ratios B/A of what the runs took.

    `wanted` are the samples that each run was to answer; it is incomplete where that isn't `n`.

    Raises `UsageError` unless both answered the same samples, naming the first difference.
    """
    pairs = _matched(a, b)
    unique = [(one["unique_experts"], other["unique_experts"]) for one, other in pairs if _counted(one, other)]
    return {
        "a": str(a.directory),
        "b": str(b.directory),
        "n": len(pairs),
        "wanted": [a.settings.get("n"), b.settings.get("n")],
        "settings": {
            name: [flatten(a.settings).get(name), flatten(b.settings).get(name)]
            for name in dict.fromkeys([*flatten(a.settings), *flatten(b.settings)])
            if flatten(a.settings).get(name) != flatten(b.settings).get(name)
        },
        "strict": paired_accuracy(_table(pairs, "strict")),
        "soft": paired_accuracy(_table(pairs, "soft")),
        "unique_experts": _reduction([one for one, _ in unique], [other for _, other in unique]),
        "ratios": {name: _total_ratio(pairs, name) for name in WORK},
    }


def paired_accuracy(pairs: Paired) -> dict[str, Any]:
    """The paired comparison of two accuracies; `kept` is None where A's is 0."""
    difference, both, above = (
        accuracy_difference(pairs),
        accuracy_ratio(pairs),
        accuracy_ratio(pairs, Z_ONE_SIDED),
    )
    kept = None
    if both is not None and above is not None:
        kept = {"ratio": pairs.right_b / pairs.right_a, **both._asdict(), "lower_bound": above.low}
    return {
        "accuracy_a": pairs.right_a / pairs.n,
        "accuracy_b": pairs.right_b / pairs.n,
        **pairs._asdict(),
        "mcnemar_p": mcnemar(pairs.only_a, pairs.only_b),
        "difference": {"value": (pairs.right_b - pairs.right_a) / pairs.n, **difference._asdict()},
        "kept": kept,
    }


def comparison_table(result: dict[str, Any]) -> str:
    """A comparison as a person reads it, one line per thing."""
    rows = [("A", result["a"]), ("B", result["b"]), ("samples", _samples(result))]
    rows += [(name, f"{one} -> {other}") for name, (one, other) in result["settings"].items()]
    for kind in ("strict", "soft"):
        rows += _accuracy_rows(kind, result[kind])
    unique = result["unique_experts"]
    if unique is not None:
        span = f"{_percent(unique['low'])} to {_percent(unique['high'])}"
        rows.append(
            (
                "unique experts",
                f"{unique['a']:.2f} -> {unique['b']:.2f}, {_percent(unique['reduction'])} fewer (95 % interval {span})",
            )
        )
    ratios = [f"{name} {value:.3f}" for name, value in result["ratios"].items() if value is not None]
    rows.append(("B / A", ", ".join(ratios) or "n/a"))
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


def _samples(result: dict[str, Any]) -> str:
    short = [
        f"{name} is not complete: {result['n']} of {wanted}"
        for name, wanted in zip("AB", result["wanted"], strict=True)
        if wanted is not None and wanted != result["n"]
    ]
    return f"{result['n']} ({', '.join(short)})" if short else str(result["n"])


def _accuracy_rows(kind: str, result: dict[str, Any]) -> list[tuple[str, str]]:
    difference, kept = result["difference"], result["kept"]
    span = f"{100 * difference['low']:+.2f} to {100 * difference['high']:+.2f}"
    rows = [
        (
            kind,
            f"{_percent(result['accuracy_a'])} -> {_percent(result['accuracy_b'])}, {100 * difference['value']:+.2f} "
            f"points (95 % interval {span})",
        ),
        (
            f"{kind}, paired",
            f"right in A alone {result['only_a']}, in B alone {result['only_b']}; McNemar p {result['mcnemar_p']:.3g}",
        ),
    ]
    if kept is not None:
        span = f"{_percent(kept['low'])} to {_percent(kept['high'])}"
        bound = f"at least {_percent(kept['lower_bound'])} with 95 % confidence"
        rows.append((f"{kind}, kept", f"{_percent(kept['ratio'])} (95 % interval {span}; {bound})"))
    return rows


def _matched(a: SavedRun, b: SavedRun) -> list[tuple[Record, Record]]:
    """The records of both runs by sample."""
    in_b = {record["id"]: record for record in b.records}
    if not a.records:
        raise UsageError(f"{a.directory}: holds no answers, so there is nothing to compare")
    pairs = []
    for record in a.records:
        other = in_b.pop(record["id"], None)
        if other is None:
            raise UsageError(f"sample {record['id']!r} is in {a.directory} but not in {b.directory}; {_way_out(a, b)}")
        for field in SAME:
            if field in record and field in other and record[field] != other[field]:
                raise UsageError(
                    f"sample {record['id']!r} has another {field} in {a.directory} than in {b.directory}; only runs of "
                    "the same samples can be compared"
                )
        pairs.append((record, other))
    if in_b:
        raise UsageError(f"sample {next(iter(in_b))!r} is in {b.directory} but not in {a.directory}; {_way_out(a, b)}")
    return pairs


def _way_out(a: SavedRun, b: SavedRun) -> str:
    return f"they have {len(a.records)} and {len(b.records)} answers; finish both, with the same --n and --seed"


def _table(pairs: list[tuple[Record, Record]], kind: str) -> Paired:
    outcomes = [(bool(one[kind]), bool(other[kind])) for one, other in pairs]
    return Paired(*(outcomes.count(case) for case in ((True, True), (True, False), (False, True), (False, False))))


def _counted(one: Record, other: Record) -> bool:
    return one.get("unique_experts") is not None and other.get("unique_experts") is not None


def _reduction(a: list[float], b: list[float]) -> dict[str, float] | None:
    if not a:
        return None
    ratio, interval = mean_ratio(a, b)
    return {
        "a": sum(a) / len(a),
        "b": sum(b) / len(b),
        "reduction": 1 - ratio,
        "low": 1 - interval.high,
        "high": 1 - interval.low,
    }


def _total_ratio(pairs: list[tuple[Record, Record]], name: str) -> float | None:
    before, after = (sum(pair[side].get(name, 0) for pair in pairs) for side in (0, 1))
    return after / before if before else None


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
