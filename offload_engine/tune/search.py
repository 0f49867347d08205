"""The search: one option after the other at the whole budget, then every routing at every budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from offload_engine.errors import UsageError
from offload_engine.simulate.replay import Costs
from offload_engine.trace import TraceRecord
from offload_engine.tune.routing import Routing
from offload_engine.tune.trial import Knobs, Outcome, play

CHOICES: dict[str, tuple[str | int, ...]] = {
    "eviction": ("next-use", "score-aware", "lfu", "lru"),
    "predictor": ("combined", "block-history", "previous-step", "none"),
    "prefetch_depth": (2, 1, 4, 8, 0),
    "transfers_in_flight": (2, 1),
}
"""What is tried, the engine's default first. The predictor that asks routers early needs hidden states, which a trace
doesn't have; what it adds to `combined` is therefore not seen here."""
WORTH = 0.01
"""Share of the step time that a change has to save: less is noise of the one trace."""
SHARES = (1.0, 0.8, 0.6, 0.4, 0.25, 0.12)
"""Of the slots that the whole budget holds."""
NEAR = 0.05
"""Of the best speed: what is lost at most under the smallest budget worth having."""

CostsOf = Callable[[Sequence[TraceRecord]], Costs]
"""Seconds of virtual time for requests like these."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of fast memory, and the slots that they leave room for."""

    nbytes: int
    slots: int


@dataclass(frozen=True, slots=True)
class Point:
    """One routing under one budget."""

    routing: Routing
    budget: Budget
    outcome: Outcome


def budgets(fixed: int, slab_bytes: int, slots: int) -> list[Budget]:
    """The whole budget first, then parts of its slots; the same number of slots only once.

    `fixed`: bytes that are no slots. At least two slots are left, or all there are.
    """
    counts = {max(int(slots * share), min(2, slots)) for share in SHARES}
    return [Budget(fixed + count * slab_bytes, count) for count in sorted(counts, reverse=True)]


def best_knobs(
    records: Sequence[TraceRecord], layers: Sequence[int], slots: int, costs: Costs, start: Knobs | None = None
) -> tuple[Knobs, Outcome]:
    """Change one option at a time for the better, until none of them helps any more (coordinate descent)."""
    knobs = start or Knobs()
    outcome = play(records, layers, knobs, slots, costs)
    changed = True
    while changed:
        changed = False
        for name, choices in CHOICES.items():
            for choice in choices:
                other = replace(knobs, **{name: choice})  # type: ignore[arg-type]
                if other == knobs:
                    continue
                tried = play(records, layers, other, slots, costs)
                if tried.step_seconds < (1 - WORTH) * outcome.step_seconds:
                    knobs, outcome, changed = other, tried, True
    return knobs, outcome


def survey(
    routings: Sequence[Routing], sizes: Sequence[Budget], layers: Sequence[int], knobs: Knobs, costs_of: CostsOf
) -> list[Point]:
    """Every routing under every budget."""
    points = []
    for routing in routings:
        costs = costs_of(routing.records)
        points += [Point(routing, size, play(routing.records, layers, knobs, size.slots, costs)) for size in sizes]
    return points


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats: none is as fast, as small and as faithful, and better in one of the three."""
    return [point for point in points if not any(_beats(other, point) for other in points)]


def acceptable(points: Sequence[Point], least_kept: float | None, recorded: Routing) -> list[Point]:
    """The points whose routing keeps that share of the votes; without one, those of the routing as recorded.

    Raises `UsageError` if there is none.
    """
    if least_kept is None:
        return [point for point in points if point.routing is recorded]
    found = [point for point in points if point.routing.kept is not None and point.routing.kept >= least_kept]
    if not found:
        most = max((point.routing.kept for point in points if point.routing.kept is not None), default=None)
        known = "no trace of original routing was given to tell" if most is None else f"the most is {most:.3f}"
        raise UsageError(f"--least-kept is {least_kept:g}, but no routing tried keeps that share of the votes: {known}")
    return found


def fastest(points: Sequence[Point]) -> Point:
    """Ties go to the smaller budget, then to the routing that keeps more."""
    return min(points, key=lambda point: (point.outcome.step_seconds, point.budget.nbytes, -(point.routing.kept or 0)))


def smallest_near(points: Sequence[Point]) -> Point:
    """The smallest budget whose step takes at most `NEAR` longer than the fastest; of equal budgets the faster."""
    limit = (1 + NEAR) * fastest(points).outcome.step_seconds
    near = [point for point in points if point.outcome.step_seconds <= limit]
    return min(near, key=lambda point: (point.budget.nbytes, point.outcome.step_seconds))


def _beats(one: Point, other: Point) -> bool:
    def measures(point: Point) -> tuple[float, float, float]:
        kept = point.routing.kept
        return point.outcome.step_seconds, point.budget.nbytes, -(kept if kept is not None else 0.0)

    pairs = list(zip(measures(one), measures(other), strict=True))
    return all(mine <= yours for mine, yours in pairs) and any(mine < yours for mine, yours in pairs)
