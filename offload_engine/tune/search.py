"""The search: one option after the other at the whole budget, then every routing at every budget. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from offload_engine.errors import UsageError
from offload_engine.experts.scheduling.sharing import ShareMode
from offload_engine.simulate.run import Figures
from offload_engine.tune.routing import Routing
from offload_engine.tune.trial import Knobs, Machine

CHOICES: dict[str, tuple[str | int, ...]] = {
    "eviction": ("next-use", "score-aware", "lfu", "lru"),
    "predictor": ("combined", "cross-layer-gate", "block-history", "previous-step", "none"),
    "prefetch_depth": (2, 1, 4, 0),
    "transfers_in_flight": (2, 1),
}
"""What is tried, the engine's default first; and of `cpu_experts` what the machine allows (`Machine.sharing`)."""
WORTH = 0.01
"""Share of the step time that a change has to save: less is noise of the one trace."""
SHARES = (1.0, 0.8, 0.6, 0.4, 0.25, 0.12)
"""Of the slots that the whole budget holds."""
NEAR = 0.05
"""Of the best speed: what is lost at most under the smallest budget worth having."""

Trial = Callable[[Knobs], Figures]


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of fast memory that are needed, and the slots among them."""

    nbytes: int
    slots: int


@dataclass(frozen=True, slots=True)
class Point:
    """One routing under one budget."""

    routing: Routing
    budget: Budget
    figures: Figures
    cpu_experts: ShareMode = "off"
    """How misses are shared with the CPU."""


def budgets(fixed: int, slab_bytes: int, slots: int) -> list[Budget]:
    """The whole budget first, then parts of its slots; the same number of slots only once.

    `fixed`: bytes that are no slots. At least two slots are left, or all there are.
    """
    counts = {max(int(slots * share), min(2, slots)) for share in SHARES}
    return [Budget(fixed + count * slab_bytes, count) for count in sorted(counts, reverse=True)]


def best_knobs(
    trial: Trial,
    start: Knobs,
    sharing: Sequence[ShareMode] = (),
    told: Callable[[int, int], None] = lambda _tried, _total: None,
) -> tuple[Knobs, Figures]:
    """Change one option at a time for the better, until none of them helps any more (coordinate descent). `sharing`:
    what is tried of `cpu_experts`. `told` hears how many choices were tried, and how many there are to try as far as is
    known: what helps has all of them tried once more.
    """
    options = {**CHOICES, "cpu_experts": tuple(sharing)}
    every = [(name, choice) for name, choices in options.items() for choice in choices]
    tried: dict[Knobs, Figures] = {}

    def figures_of(knobs: Knobs) -> Figures:
        if knobs not in tried:
            tried[knobs] = trial(knobs)
        return tried[knobs]

    best, before, passed = start, None, 0
    while best != before:
        before, passed = best, passed + 1
        for number, (name, choice) in enumerate(every, start=1):
            other = replace(best, **{name: choice})  # type: ignore[arg-type]
            if pays(figures_of(other), figures_of(best)):
                best = other
            told((passed - 1) * len(every) + number, (passed + (best != before)) * len(every))
    return best, figures_of(best)


def pays(other: Figures, figures: Figures) -> bool:
    """Whether a change to `other` saves enough to be made."""
    return other.step < (1 - WORTH) * figures.step


def survey(
    routings: Sequence[Routing],
    sizes: Sequence[Budget],
    machine: Machine,
    knobs: Knobs,
    advance: Callable[[int], None] = lambda _points: None,
) -> list[Point]:
    """Every routing under every budget, misses shared with the CPU where that pays; `advance` is told how many more
    points are done.
    """
    points = []
    for routing in routings:
        simulation = machine.run(routing.records)
        for size in sizes:
            best: Point | None = None
            for mode in machine.sharing:
                figures = machine.play(simulation, replace(knobs, cpu_experts=mode), size.slots)
                if best is None or pays(figures, best.figures):
                    best = Point(routing, size, figures, mode)
            points += [] if best is None else [best]
            advance(1)
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
    return min(points, key=lambda point: (point.figures.step, point.budget.nbytes, -(point.routing.kept or 0)))


def smallest_near(points: Sequence[Point]) -> Point:
    """The smallest budget whose step takes at most `NEAR` longer than the fastest; of equal budgets the faster."""
    limit = (1 + NEAR) * fastest(points).figures.step
    near = [point for point in points if point.figures.step <= limit]
    return min(near, key=lambda point: (point.budget.nbytes, point.figures.step))


def _beats(one: Point, other: Point) -> bool:
    pairs = list(zip(_measures(one), _measures(other), strict=True))
    return all(mine <= yours for mine, yours in pairs) and any(mine < yours for mine, yours in pairs)


def _measures(point: Point) -> tuple[float, float, float]:
    """What should be small. Of an unknown share of votes the worst is assumed."""
    return point.figures.step, point.budget.nbytes, -(point.routing.kept or 0.0)
