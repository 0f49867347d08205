from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_engine.errors import InternalError, UsageError
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import LRU
from offload_engine.experts.scheduling.predictor import NoPredictor
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.simulate.confined import confined
from offload_engine.simulate.forwards import LayerRun, forwards, sized
from offload_engine.simulate.gate import Gate
from offload_engine.simulate.profile import Profile, load_profile
from offload_engine.simulate.replay import Costs, Replay
from offload_engine.simulate.run import Setting, Simulation
from offload_engine.simulate.synchronous import on_demand
from offload_engine.simulate.timing import ModelShape, Timing
from offload_engine.trace import TraceRecord, read_trace
from tests.simulate.trace_data import SHAPE, machine, record, steps

TRACES = Path(__file__).parent.parent / "data" / "traces"
MINI = ModelShape(
    layers=20,
    moe_layers=19,
    hidden=2048,
    heads=16,
    kv_heads=4,
    head_dim=128,
    dense_width=5120,
    expert_width=512,
    shared_width=512,
    num_experts=256,
    top_k=8,
    vocabulary=157184,
    expert_bytes=6291456,
)
BLOCK = 4
FAST = {"memory_bandwidth": 1e4, "compute": 1e5}
"""So that an expert's 600 bytes take 600 s over a link of 1 B/s, and computing next to nothing."""


def simulation(records: Sequence[TraceRecord], profile: Profile | None = None, warm_up: int = 0) -> Simulation:
    trace = sized(list(forwards(records, BLOCK)), BLOCK)
    return Simulation(trace, (1, 2), Timing(SHAPE, profile or machine(**FAST)), BLOCK, warm_up)


REPEATED = [*steps((0, 1), (0, 1), (0, 1)), *steps((0, 1), (0, 1), block=1)]


def test_what_stays_in_its_slots_is_loaded_once() -> None:
    cold = simulation(REPEATED).figures(Setting(slots=16, predictor="none"))
    assert (cold.steps, cold.loads * cold.steps) == (5, 4)
    assert cold.hit_rate == pytest.approx(16 / 20)
    warm = simulation(REPEATED, warm_up=1).figures(Setting(slots=16, predictor="none"))
    assert (warm.steps, warm.loads, warm.hit_rate, warm.stall, warm.link_busy) == (2, 0.0, 1.0, 0.0, 0.0)
    assert warm.tokens_per_second == pytest.approx(BLOCK / (2 * warm.step))


def test_bounds_surround_the_simulation() -> None:
    wanted = [tuple(range(number % 5, number % 5 + 4)) for number in range(12)]
    found = simulation([*steps(*wanted[:6]), *steps(*wanted[6:], block=1)], warm_up=1)
    setting = Setting(slots=9, predictor="block-history")
    figures, bounds = found.figures(setting), found.bounds(setting)
    assert bounds.infinite < bounds.belady <= figures.step <= bounds.on_demand
    assert bounds.belady_loads <= figures.loads
    assert bounds.belady <= bounds.perfect <= bounds.on_demand


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sets(st.integers(0, 7), min_size=1, max_size=5).map(tuple), min_size=2, max_size=8),
    st.integers(2, 16),
    st.sampled_from(["none", "previous-step", "combined"]),
)
def test_nothing_beats_infinite_bandwidth(wanted: list[tuple[int, ...]], slots: int, predictor: str) -> None:
    """Counted from an empty cache, so that everything wanted has to be loaded once at least."""
    found = simulation(steps(*wanted))
    setting = Setting(slots=slots, predictor=predictor, depth=2)
    figures, bounds = found.figures(setting), found.bounds(setting)
    assert bounds.infinite <= figures.step * (1 + 1e-9)
    assert round(figures.loads * figures.steps) >= 2 * len(set().union(*wanted))
    assert 0 <= figures.stall <= 1
    assert 0 <= figures.hit_rate <= 1


def test_a_host_tier_that_lacks_experts_costs_time() -> None:
    wanted = [tuple(range(number % 5, number % 5 + 4)) for number in range(12)]
    found = simulation(steps(*wanted), machine(**FAST, disk_bandwidth=0.1))
    everything = found.figures(Setting(slots=6, predictor="none"))
    known = found.figures(Setting(slots=6, predictor="none", host_slots=16))
    little = found.figures(Setting(slots=6, predictor="none", host_slots=3))
    assert known == everything, "sixteen is all there are"
    assert little.step > 2 * everything.step
    assert little.loads == everything.loads


def test_pageable_memory_costs_time() -> None:
    found = simulation(steps((0, 1), (2, 3), (4, 5)), machine(**FAST, link_bandwidth=2.0, pageable_bandwidth=1.0))
    pinned, pageable = (found.figures(Setting(slots=4, predictor="none", pinned=one)) for one in (True, False))
    assert pageable.step > 1.5 * pinned.step


def test_on_demand_by_hand() -> None:
    """Each layer 2 + per expert 1, each miss 4: two steps of two layers, the second all hits."""
    trace = list(forwards(steps((0, 1), (0, 1))))
    moments = on_demand(trace, ExpertCache(4, LRU()), Costs(9.0, 1.0, 2.0), 4.0)
    assert [one.seconds for one in moments] == [2 * (2 + 2 * (4 + 1)), 24 + 2 * (2 + 2)]
    assert (moments[-1].stall_seconds, moments[-1].loads, moments[-1].hits) == (16.0, 4, 4)


def test_on_demand_reads_what_the_host_lacks() -> None:
    trace = list(forwards(steps((0, 1), (0, 1))))
    host = ExpertCache(2, LRU())
    moments = on_demand(trace, ExpertCache(2, LRU()), Costs(9.0, 0.0, 0.0), 1.0, host, 10.0)
    assert moments[-1].seconds == 8 * 11.0, "two slots thrash, on the device as on the host"


def test_a_trace_with_too_few_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has 1 blocks, of which 2 are to warm up; .* set --warm-up to less"):
        simulation(steps((0,)), warm_up=2).figures(Setting(slots=4))


def test_a_cost_model_needs_transfers() -> None:
    scheduler = ExpertScheduler(ExpertCache(4, LRU()))
    with pytest.raises(InternalError, match="transfers of its own"):
        Replay(scheduler, NoPredictor(), (1, 2), Timing(SHAPE, machine()))


@given(st.integers(1, 40), st.floats(0.5, 1), st.integers(0, 3), st.integers(0, 5))
def test_a_gate_errs_as_often_as_it_should(count: int, accuracy: float, distance: int, number: int) -> None:
    run = LayerRun(3, tuple(range(count)), tuple(float(count - rank) for rank in range(count)))
    gate = Gate(64, accuracy)
    experts, scores = gate.preview(number, run, distance)
    assert (experts, scores) == gate.preview(number, run, distance)
    assert len(experts) == len(set(experts)) == len(scores) <= count
    assert list(scores) == sorted(scores, reverse=True)
    wrong = count - len(set(experts) & set(run.experts))
    assert wrong == min(round(count * (1 - accuracy * 0.92**distance)), count - count // 2)
    assert set(run.experts[: count // 2]) <= set(experts), "what is wanted most is never missed"


def test_previews_bring_everything_in_time_where_a_layer_is_long_enough() -> None:
    """Four experts take 24 s of the link; from a layer's preview to its routing there are 600."""
    profile = machine(**FAST, link_bandwidth=100.0, layer=600.0)
    found = simulation(steps((0, 1, 2, 3), (4, 5, 6, 7)), profile)
    blind, seeing = (
        found.figures(Setting(slots=16, predictor="cross-layer-gate", gate_accuracy=accuracy))
        for accuracy in (None, 1.0)
    )
    assert blind.hit_rate == 0.0
    assert (seeing.hit_rate, seeing.stall) == (1.0, 0.0)
    assert blind.loads == seeing.loads == 8.0
    assert blind.step == pytest.approx(seeing.step + 2 * 24, rel=0.01)


def test_confining_keeps_the_share_asked_for() -> None:
    """Scores 4, 3, 2, 1 of 10: half is crossed by the second, .7 by the third."""
    four = [record(1, (7, 5, 3, 1))]
    sizes = {
        (share, least): len(next(confined(four, share, least)).experts)
        for share in (0.3, 0.5, 0.7, 1.0)
        for least in (1, 3)
    }
    assert sizes == {
        (0.3, 1): 1,
        (0.5, 1): 2,
        (0.7, 1): 3,
        (1.0, 1): 4,
        (0.3, 3): 3,
        (0.5, 3): 3,
        (0.7, 3): 3,
        (1.0, 3): 4,
    }
    assert next(confined(four, 0.5, 1)).experts == (7, 5)


@pytest.mark.parametrize("name", ["rtx4060", "cpu-disk"])
def test_at_full_size_dmoe_is_several_times_faster_and_beats_waiting(name: str) -> None:
    steps_taken = {}
    for routing in ("original", "dmoe"):
        header, records = read_trace(TRACES / f"llada2-mini-{routing}.jsonl.gz")
        trace = sized(list(forwards(records, header.block_length))[:20], header.block_length)
        found = Simulation(trace, header.layers, Timing(MINI, load_profile(name)), header.block_length)
        setting = Setting(slots=838)
        bounds = found.bounds(setting)
        figures = found.figures(setting)
        assert bounds.infinite <= figures.step < bounds.on_demand
        assert figures.step < found.figures(replace(setting, eviction="lru")).step * 1.02
        steps_taken[routing] = figures.step
    assert steps_taken["original"] > 3 * steps_taken["dmoe"]
