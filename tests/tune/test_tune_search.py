"""Trials, the search among them, and what is written of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.cli.simulate import shape_of
from offload_engine.config import EngineConfig, load_config
from offload_engine.errors import UsageError
from offload_engine.experts.scheduling.sharing import ShareMode
from offload_engine.simulate.profile import Figure, load_profile
from offload_engine.simulate.run import Figures
from offload_engine.simulate.timing import Timing
from offload_engine.trace import TraceRecord, read_trace
from offload_engine.tune import search
from offload_engine.tune.report import Found, config_text, table
from offload_engine.tune.routing import Routing, blocks_of
from offload_engine.tune.search import Budget, Point, acceptable, best_knobs, budgets, fastest, frontier, smallest_near
from offload_engine.tune.trial import Knobs, Machine
from tests.mini_config import mini

TRACE = Path(__file__).parent.parent / "data" / "traces" / "llada2-mini-dmoe.jsonl.gz"
EXPERT_BYTES = 6291456


@pytest.fixture(scope="module")
def records() -> tuple[TraceRecord, ...]:
    _, found = read_trace(TRACE)
    return tuple(found)


@pytest.fixture(scope="module")
def machine() -> Machine:
    return Machine(Timing(shape_of(mini(), EXPERT_BYTES), load_profile("cpu-disk")), range(1, 20), 32, None)


def test_slots_for_everything_leave_little_to_wait_for(machine: Machine, records: tuple[TraceRecord, ...]) -> None:
    simulation = machine.run(records)
    full = machine.play(simulation, Knobs(predictor="none"), 256 * 19)
    few = machine.play(simulation, Knobs(predictor="none"), 10 * 19)
    assert full.hit_rate > 0.9
    assert few.hit_rate < full.hit_rate
    assert few.step > full.step
    assert few.stall > full.stall
    assert few.loads > full.loads


def test_no_depth_is_no_prediction(machine: Machine, records: tuple[TraceRecord, ...]) -> None:
    simulation = machine.run(records)
    nothing = machine.play(simulation, Knobs(predictor="none"), 300)
    assert machine.play(simulation, Knobs(prefetch_depth=0), 300) == nothing


def test_a_part_of_the_blocks_warms_up(machine: Machine, records: tuple[TraceRecord, ...]) -> None:
    assert machine.run(records).warm_up == blocks_of(records) // 3 > 0
    single = [record for record in records if record.block == records[-1].block]
    assert machine.run(single).warm_up == 0, "one block is all there is"


def figures(step: float) -> Figures:
    return Figures(
        steps=8, step=step, step_median=step, tokens_per_second=1.0, hit_rate=0.5, stall=0.1, link_busy=0.2, loads=3.0
    )


KNOBS = st.builds(Knobs, *(st.sampled_from(choices) for choices in search.CHOICES.values()))


@given(st.dictionaries(KNOBS, st.integers(1, 100).map(float), max_size=60), KNOBS)
def test_the_search_ends_where_no_single_change_helps(table_of: dict[Knobs, float], start: Knobs) -> None:
    asked: list[Knobs] = []

    def trial(knobs: Knobs) -> Figures:
        asked.append(knobs)
        return figures(table_of.get(knobs, 200.0))

    best, found = best_knobs(trial, start)
    assert found == trial(best)
    assert found.step <= trial(start).step
    for name, choices in search.CHOICES.items():
        for choice in choices:
            other = trial(replace(best, **{name: choice}))  # type: ignore[arg-type]
            assert other.step >= (1 - search.WORTH) * found.step


def test_no_setting_is_tried_twice() -> None:
    asked: list[Knobs] = []

    def trial(knobs: Knobs) -> Figures:
        asked.append(knobs)
        return figures({"lru": 1.0}.get(knobs.eviction, 2.0) * {0: 0.5}.get(knobs.prefetch_depth, 1.0))

    best, _ = best_knobs(trial, Knobs())
    assert best == Knobs(eviction="lru", prefetch_depth=0)
    assert len(asked) == len(set(asked))


def test_how_far_a_search_is_grows_with_what_helps() -> None:
    told: list[tuple[int, int]] = []
    best_knobs(lambda _knobs: figures(1.0), Knobs(), ("off", "auto"), lambda *now: told.append(now))
    choices = sum(map(len, search.CHOICES.values())) + 2
    assert told == [(number, choices) for number in range(1, choices + 1)], "nothing helped"

    told.clear()
    better = search.CHOICES["eviction"][1]
    best_knobs(
        lambda knobs: figures(1.0 if knobs.eviction == better else 2.0), Knobs(), told=lambda *now: told.append(now)
    )
    choices -= 2
    assert told[:2] == [(1, choices), (2, 2 * choices)], "once more from the other option on"
    assert told[2:] == [(number, 2 * choices) for number in range(3, 2 * choices + 1)]


def test_what_is_tried_can_be_configured_and_begins_with_the_default() -> None:
    for name, choices in search.CHOICES.items():
        assert choices[0] == EngineConfig.model_fields[name].default == getattr(Knobs(), name)
        for choice in choices:
            EngineConfig(**{name: choice})


def test_sharing_with_the_cpu_is_tried_where_the_machine_allows_it() -> None:
    def trial(knobs: Knobs) -> Figures:
        return figures(1.0 if knobs.cpu_experts == "auto" else 2.0)

    assert best_knobs(trial, Knobs())[0] == Knobs()
    assert best_knobs(trial, Knobs(), ("off", "auto"))[0] == Knobs(cpu_experts="auto")
    assert best_knobs(lambda _knobs: figures(1.0), Knobs(), ("off", "auto"))[0] == Knobs(), "only where it pays"


def test_points_share_where_that_pays_and_nowhere_else() -> None:
    _, read = read_trace(TRACE.with_name("llada2-mini-original.jsonl.gz"))
    records = tuple(read)[: 19 * 6]
    card = load_profile("rtx4060")
    slow = Figure(value=1e8, unit="B/s", source="a test")
    weak = card.model_copy(update={"host_bandwidth": slow, "host_compute": slow.model_copy(update={"unit": "FLOP/s"})})
    shape, sizes = shape_of(mini(), EXPERT_BYTES), [Budget(1, 800)]
    machine = Machine(Timing(shape, card), range(1, 20), 32, None, ("off", "auto"))
    (part,) = search.survey([Routing("original", records, 1.0)], sizes, machine, Knobs())
    assert part.cpu_experts == "auto"
    assert part.figures.on_cpu > 10
    beside = replace(machine, timing=Timing(shape, weak))
    (copied,) = search.survey([Routing("original", records, 1.0)], sizes, beside, Knobs())
    assert (copied.cpu_experts, copied.figures.on_cpu) == ("off", 0.0)
    alone = replace(machine, sharing=("off",))
    (without,) = search.survey([Routing("original", records, 1.0)], sizes, alone, Knobs())
    assert without.figures == copied.figures
    assert part.figures.step < 0.7 * without.figures.step
    text = table(found([part], {"off": without.figures, "auto": part.figures}))
    assert "c some missing experts are computed on the CPU, for that pays." in text
    assert f"{1000 * part.figures.step:.3g}c" in text
    assert f"auto {1000 * part.figures.step:.3g} ms ({part.figures.on_cpu:.1f} experts on the CPU)" in text


def test_budgets_begin_with_the_whole_one() -> None:
    sizes = budgets(fixed=1000, slab_bytes=10, slots=100)
    assert sizes[0] == Budget(2000, 100)
    assert [size.slots for size in sizes] == sorted({size.slots for size in sizes}, reverse=True)
    assert all(size.nbytes == 1000 + 10 * size.slots for size in sizes)
    assert budgets(fixed=0, slab_bytes=1, slots=2) == [Budget(2, 2)]
    assert budgets(fixed=0, slab_bytes=1, slots=1) == [Budget(1, 1)]


def point(seconds: float, nbytes: int, kept: float | None = 1.0, name: str = "original") -> Point:
    return Point(Routing(name, (), kept, {"routing": name}), Budget(nbytes, nbytes), figures(seconds))


POINTS = st.lists(
    st.builds(point, st.sampled_from([1.0, 2.0, 3.0]), st.integers(1, 3), st.sampled_from([None, 0.5, 1.0])), max_size=8
)


@given(POINTS)
def test_every_point_is_on_the_frontier_or_beaten_by_one_that_is(points: list[Point]) -> None:
    best = frontier(points)

    def measures(one: Point) -> tuple[float, int, float]:
        return one.figures.step, one.budget.nbytes, -(one.routing.kept or 0.0)

    for one in points:
        as_good = [two for two in best if all(a <= b for a, b in zip(measures(two), measures(one), strict=True))]
        assert as_good
        assert (one in best) is all(measures(two) == measures(one) for two in as_good)


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


def found(points: list[Point], sharing: dict[ShareMode, Figures] | None = None) -> Found:
    return Found(
        source='3 steps of a "model"',
        points=points,
        best=frontier(points),
        surveyed=Knobs(),
        fastest=points[0],
        smallest=points[-1],
        chosen=points[0],
        knobs=Knobs(eviction="lru"),
        default=figures(4.0),
        sharing=sharing or {"off": figures(3.0)},
        context=4096,
    )


def test_the_table_has_a_line_per_routing_and_a_column_per_budget() -> None:
    recorded = [point(3.0, 4000), point(3.1, 2000)]
    derived = [point(1.0, 4000, 0.7, "dmoe"), point(2.0, 2000, None, "other"), point(2.5, 2000, 0.7, "dmoe")]
    head, slots, original, dmoe, *rest = table(found([*recorded, derived[0], derived[2]])).splitlines()
    assert head.split() == ["simulated,", "ms", "per", "step", "votes", "4.00", "KB", "2.00", "KB"]
    assert slots.split() == ["kept", "4000", "slots", "2000", "slots"]
    assert original.split() == ["original", "1.000", "3e+03*", "3.1e+03*"]
    assert dmoe.split() == ["dmoe", "0.700", "1e+03*", "2.5e+03*"]
    assert any("25.0% less than with the defaults" in line for line in rest)
    assert table(found([derived[1]])).splitlines()[2].split() == ["other", "?", "2e+03*"]


def test_the_config_is_taken_and_says_what_was_found(tmp_path: Path) -> None:
    points = [point(3.0, 4000, 0.7, "dmoe"), point(3.1, 2000, 0.7, "dmoe")]
    text = config_text(found(points), {"model": 'odd "name"', "host_mem": "none"}, 8000)
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
        "cpu_experts": "off",
    }
    assert "simulated" in text
    assert "dmoe in 2000 bytes" in text
    assert "70.0% of original routing's votes" in text
    assert "An unknown share" in config_text(found([point(1.0, 5, None)]), {}, 9)
    assert "None of them changes an answer.\n" in text
    shared = config_text(replace(found(points), knobs=Knobs(cpu_experts="auto")), {}, 9)
    assert "None of them changes an answer, but for cpu_experts, by rounding.\n" in shared
    assert 'cpu_experts = "auto"\n' in shared


def test_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from offload_engine.tune.plot import plot

    points = [point(3.0, 4000), point(3.1, 2000), point(1.0, 4000, None, "dmoe")]
    plot(points, frontier(points), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
