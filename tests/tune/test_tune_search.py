"""Trials, the search among them, costs, and what is written of it."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.config import EngineConfig, load_config
from offload_engine.errors import UsageError
from offload_engine.simulate.replay import Costs
from offload_engine.trace import TraceRecord, read_trace
from offload_engine.tune import search
from offload_engine.tune.costs import Rates, Work, costs_of, read_rates
from offload_engine.tune.report import Found, config_text, table
from offload_engine.tune.routing import Routing
from offload_engine.tune.search import Budget, Point, acceptable, best_knobs, budgets, fastest, frontier, smallest_near
from offload_engine.tune.trial import Knobs, Outcome, play

TRACES = Path(__file__).parent.parent / "data" / "traces"
LAYERS = tuple(range(1, 20))
COSTS = Costs()


@pytest.fixture(scope="module")
def records() -> tuple[TraceRecord, ...]:
    _, found = read_trace(TRACES / "llada2-mini-dmoe.jsonl.gz")
    return tuple(found)


def test_slots_for_everything_leave_nothing_to_wait_for(records: tuple[TraceRecord, ...]) -> None:
    full = play(records, LAYERS, Knobs(predictor="none"), 256 * 19, COSTS)
    few = play(records, LAYERS, Knobs(predictor="none"), 10 * 19, COSTS)
    assert full.hit_rate > 0.9
    assert few.hit_rate < full.hit_rate
    assert few.step_seconds > full.step_seconds
    assert few.stall_share > full.stall_share
    assert few.loads_per_step > full.loads_per_step


def test_no_depth_is_no_prediction(records: tuple[TraceRecord, ...]) -> None:
    part = records[: 19 * 8]
    nothing = play(part, LAYERS, Knobs(predictor="none"), 300, COSTS)
    assert play(part, LAYERS, Knobs(prefetch_depth=0), 300, COSTS) == nothing


def test_the_search_is_no_worse_than_the_defaults(records: tuple[TraceRecord, ...]) -> None:
    part, slots = records[: 19 * 6], 12 * 19
    default = play(part, LAYERS, Knobs(), slots, COSTS)
    knobs, tuned = best_knobs(part, LAYERS, slots, COSTS)
    assert tuned.step_seconds <= default.step_seconds
    assert tuned == play(part, LAYERS, knobs, slots, COSTS)
    again, still = best_knobs(part, LAYERS, slots, COSTS, start=knobs)
    assert (again, still) == (knobs, tuned), "nothing is left to change"
    worst, _ = best_knobs(part, LAYERS, slots, COSTS, start=Knobs("lru", "none", 1, 1))
    assert play(part, LAYERS, worst, slots, COSTS).step_seconds <= default.step_seconds * 1.05


def test_what_is_tried_can_be_configured() -> None:
    for name, choices in search.CHOICES.items():
        assert choices[0] == EngineConfig.model_fields[name].default == getattr(Knobs(), name)
        for choice in choices:
            EngineConfig(**{name: choice})


def test_budgets_begin_with_the_whole_one() -> None:
    sizes = budgets(fixed=1000, slab_bytes=10, slots=100)
    assert sizes[0] == Budget(2000, 100)
    assert [size.slots for size in sizes] == sorted({size.slots for size in sizes}, reverse=True)
    assert all(size.nbytes == 1000 + 10 * size.slots for size in sizes)
    assert budgets(fixed=0, slab_bytes=1, slots=2) == [Budget(2, 2)]
    assert budgets(fixed=0, slab_bytes=1, slots=1) == [Budget(1, 1)]


def point(seconds: float, nbytes: int, kept: float | None = 1.0, name: str = "original") -> Point:
    settings = {"routing": name}
    return Point(Routing(name, (), kept, settings), Budget(nbytes, nbytes), Outcome(seconds, 0.5, 0.1, 3.0))


POINTS = st.lists(
    st.builds(point, st.sampled_from([1.0, 2.0, 3.0]), st.integers(1, 3), st.sampled_from([None, 0.5, 1.0])), max_size=8
)


@given(POINTS)
def test_every_point_is_on_the_frontier_or_beaten_by_one_that_is(points: list[Point]) -> None:
    best = frontier(points)

    def measures(one: Point) -> tuple[float, int, float]:
        return one.outcome.step_seconds, one.budget.nbytes, -(one.routing.kept or 0.0)

    for one in points:
        better = [two for two in best if all(a <= b for a, b in zip(measures(two), measures(one), strict=True))]
        assert better
        assert (one in best) is all(measures(two) == measures(one) for two in better)


def test_the_smallest_budget_near_the_best_speed() -> None:
    points = [point(1.0, 10), point(1.04, 6), point(1.05, 4), point(1.06, 2), point(1.01, 4)]
    assert fastest(points) is points[0]
    assert smallest_near(points) is points[4]


def test_routing_is_left_as_recorded_unless_less_may_be_kept() -> None:
    points = [point(3.0, 1), point(1.0, 1, 0.7, "dmoe"), point(0.5, 1, None, "other")]
    assert acceptable(points, None, points[0].routing) == points[:1]
    assert acceptable(points, 0.6, points[0].routing) == points[:2]
    with pytest.raises(UsageError, match=r"the most is 0\.700"):
        acceptable(points[1:], 0.9, points[0].routing)
    with pytest.raises(UsageError, match="no trace of original routing"):
        acceptable(points[2:], 0.9, points[0].routing)


def test_costs_are_the_slower_of_memory_and_arithmetic() -> None:
    work = Work(expert_bytes=200, expert_weights=100, layer_bytes=400, layer_weights=200, block_length=32, top_k=8)
    slow_memory = costs_of(work, Rates(transfer=100, memory=10, flops=1e9), experts=64)
    assert slow_memory == Costs(transfer_seconds=2.0, compute_seconds=20.0, attention_seconds=40.0)
    slow_products = costs_of(work, Rates(transfer=100, memory=1e9, flops=100), experts=64)
    assert slow_products == Costs(2.0, 2 * 4 * 100 / 100, 2 * 32 * 200 / 100)


def profile(path: Path, device: str, **figures: float) -> Path:
    lines = [f'{name} = {{ value = {value}, unit = "x", source = "y" }}' for name, value in figures.items()]
    path.write_text("\n".join([f'device = "{device}"', *lines]))
    return path


RATES = {"memory_bandwidth": 100.0, "memory_efficiency": 0.5, "compute": 40.0, "compute_efficiency": 0.25}


def test_rates_of_a_profile(tmp_path: Path) -> None:
    cpu = profile(tmp_path / "cpu.toml", "cpu", disk_bandwidth=7.0, **RATES)
    assert read_rates(cpu) == Rates(7.0, 50.0, 10.0)
    gpu = profile(tmp_path / "gpu.toml", "cuda", link_bandwidth=8.0, link_efficiency=0.5, disk_bandwidth=7.0, **RATES)
    assert read_rates(gpu) == Rates(4.0, 50.0, 10.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("not toml", "no hardware profile"),
        ("disk_bandwidth = 3", "disk_bandwidth has no value above 0"),
        (None, "can't be"),
    ],
)
def test_profiles_that_are_none(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = tmp_path / "profile.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=complaint):
        read_rates(path)


def found(points: list[Point]) -> Found:
    outcome = points[0].outcome
    return Found(
        points=points,
        best=frontier(points),
        knobs=Knobs(eviction="lru"),
        default=replace(outcome, step_seconds=4.0),
        tuned=outcome,
        chosen=points[0],
        smallest=points[-1],
        context=4096,
        source='a "trace"',
    )


def test_the_table_has_a_line_per_routing_and_a_column_per_budget() -> None:
    lines = table(
        found([point(3.0, 4000), point(3.1, 2000), point(1.0, 4000, 0.7, "dmoe"), point(2.0, 2000, 0.7, "dmoe")])
    )
    head, slots, original, dmoe, *rest = lines.splitlines()
    assert head.split() == ["ms", "per", "step", "votes", "4.00", "KB", "2.00", "KB"]
    assert slots.split() == ["kept", "4000", "slots", "2000", "slots"]
    assert original.split() == ["original", "1.000", "3e+03*", "3.1e+03*"]
    assert dmoe.split() == ["dmoe", "0.700", "1e+03*", "2e+03*"]
    assert any("simulated" in line for line in rest)
    assert any("25.0% of a step saved" in line for line in rest)


def test_the_config_is_taken_and_says_what_was_found(tmp_path: Path) -> None:
    points = [point(3.0, 4000, 0.7, "dmoe"), point(3.1, 2000, 0.7, "dmoe")]
    text = config_text(found(points), {"model": 'odd "name"', "host_mem": "none"}, points[0], 8000)
    path = tmp_path / "tuned.toml"
    path.write_text(text)
    assert load_config(path) == {
        "model": 'odd "name"',
        "host_mem": None,
        "gpu_mem": 8000,
        "max_context": 4096,
        "routing": "dmoe",
        "eviction": "lru",
        "predictor": "combined",
        "prefetch_depth": 2,
        "transfers_in_flight": 2,
    }
    assert "simulated" in text
    assert "dmoe in 2000 bytes" in text
    assert tomllib.loads(text)


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from offload_engine.tune.plot import plot

    points = [point(3.0, 4000), point(3.1, 2000), point(1.0, 4000, None, "dmoe")]
    plot(points, frontier(points), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
