"""Counters, their differences, the summary line, and the measured peak."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import Phase
from offload_engine.metrics import EngineStats, measure_peak, reset_peak

MB = 1 << 20


def a_run() -> EngineStats:
    stats = EngineStats(
        prompts=1,
        prompt_tokens=40,
        new_tokens=64,
        denoise_steps=16,
        blocks=2,
        hits=90,
        late=4,
        misses=6,
        expert_requests=100,
        bytes_moved=62_900_000,
        wall_seconds=4.0,
        prefill_seconds=0.5,
        denoise_seconds=3.0,
        commit_seconds=0.5,
        stall_seconds=0.4,
        planned_peak_bytes=7_900_000_000,
        measured_peak_bytes=7_610_000_000,
        limit_bytes=8_000_000_000,
    )
    for layer, distinct in ((1, 14), (2, 16), (1, 12), (2, 14)):
        stats.count_unique(layer, distinct)
    return stats


def test_unique_experts_is_the_mean_over_layers_and_denoising_forwards():
    stats = a_run()
    assert stats.unique_experts == 14.0
    assert stats.unique_experts_by_layer == {1: (26, 2), 2: (30, 2)}


def test_derived_values():
    stats = a_run()
    assert stats.hit_rate == 0.9
    assert stats.forward_seconds == 4.0
    assert stats.stall_share == pytest.approx(0.1)
    assert stats.tokens_per_second == 16.0
    assert stats.tokens_per_step == 4.0


def test_what_was_not_counted_is_unknown_rather_than_zero():
    fresh = EngineStats()
    for value in (fresh.hit_rate, fresh.unique_experts, fresh.stall_share, fresh.tokens_per_second):
        assert value is None
    line = fresh.summary_line()
    assert "hit rate n/a" in line
    assert "peak n/a" in line


def test_the_summary_is_one_line_with_every_number_a_user_looks_for():
    line = a_run().summary_line()
    assert line == (
        "16.0 tokens/s, 16 steps (4.0 tokens each), 14.0 unique experts per layer, hit rate 90.0 %, 62.9 MB moved, "
        "stalled 10.0 %, peak 7.61 GB of 7.90 GB planned (limit 8.00 GB)"
    )


def test_a_snapshot_is_left_alone_by_further_counting():
    stats = a_run()
    before = stats.snapshot()
    assert before == stats
    stats.hits += 5
    stats.forwards[Phase.COMMIT] = 1
    stats.count_unique(1, 20)
    assert before.hits == 90
    assert before.forwards == {}
    assert before.unique_experts_by_layer[1] == (26, 2)


@given(
    hits=st.integers(0, 99),
    earlier=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9))),
    later=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9))),
)
def test_since_is_what_a_fresh_counter_would_have_counted(hits, earlier, later):
    running, fresh = EngineStats(slots=7, limit_bytes=9), EngineStats(slots=7, limit_bytes=9)
    for layer, distinct in earlier:
        running.count_unique(layer, distinct)
        running.misses += 1
        running.forwards[Phase.DENOISE] = running.forwards.get(Phase.DENOISE, 0) + 1
    mark = running.snapshot()
    for stats in (running, fresh):
        stats.hits += hits
        stats.forwards[Phase.DENOISE] = stats.forwards.get(Phase.DENOISE, 0) + 3
        for layer, distinct in later:
            stats.count_unique(layer, distinct)
    assert running.since(mark) == fresh


def test_gauges_are_not_subtracted():
    stats = a_run()
    assert stats.since(stats.snapshot()).planned_peak_bytes == 7_900_000_000


def test_as_dict_goes_through_json_and_holds_counters_and_derived_values():
    values = json.loads(json.dumps(a_run().as_dict()))
    assert values["bytes_moved"] == 62_900_000
    assert values["hit_rate"] == 0.9
    assert values["forwards"] == {"prefill": 0, "denoise": 0, "commit": 0, "score": 0}
    assert values["unique_experts_by_layer"] == {"1": 13.0, "2": 15.0}


def test_the_timer_adds_up_and_counts_a_failed_body_too(monkeypatch):
    ticks = iter((10.0, 12.0, 20.0, 20.5))
    monkeypatch.setattr("offload_engine.metrics.time.perf_counter", lambda: next(ticks))
    stats = EngineStats()
    with stats.phase(Phase.DENOISE):
        pass
    with pytest.raises(RuntimeError), stats.phase("denoise"):
        raise RuntimeError
    assert stats.denoise_seconds == 2.5


def test_the_timer_refuses_a_name_nobody_counts():
    ran = False
    with pytest.raises(AttributeError), EngineStats().phase("lunch"):
        ran = True
    assert not ran


PEAK = """
from offload_engine.metrics import measure_peak, reset_peak
reset = reset_peak()
before = measure_peak()
block = bytearray(b"x") * (64 * 2**20)
held = measure_peak()
del block
after = measure_peak()
print(int(reset), before, held, after, int(reset_peak()), measure_peak())
"""


def test_the_peak_rises_with_memory_stays_and_can_be_reset():
    """In a process of its own: what other tests left gives memory back at any time."""
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    reset, before, held, after, again, low = map(int, ran.stdout.split())
    if not reset:
        pytest.skip("this system can't reset a process's peak")
    assert held >= before + 56 * MB
    assert after >= held - MB  # a peak doesn't fall by itself
    assert again
    assert low < held - 48 * MB


def test_without_proc_the_peak_comes_from_getrusage(monkeypatch):
    from pathlib import Path

    def absent(*_args, **_kwargs):
        raise FileNotFoundError

    expected = measure_peak()
    monkeypatch.setattr(Path, "read_text", absent)
    monkeypatch.setattr(Path, "write_text", absent)
    assert measure_peak() == pytest.approx(expected, rel=0.2)
    assert reset_peak() is False
