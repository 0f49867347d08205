"""Timing by component, under a clock that ticks once per look, and MoE latency under made-up routings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine import metrics
from offload_engine.core import ForwardInfo, Phase, RoutingDecision, SamplingParams
from offload_engine.engine.engine import Engine
from tests.tools.analysis_engine import CONFIG, open_tiny
from tools.analysis import seam
from tools.analysis.components import timed_components
from tools.analysis.moe_latency import hidden_states, spread, sweep, unique_counts
from tools.analysis.sections.latency import by_count

PARAMS = SamplingParams(max_new_tokens=20, block_length=8)
PROMPT = list(range(1, 12))
LAYERS = CONFIG["num_hidden_layers"]
MOE_LAYERS = LAYERS - 1


class Ticks:
    """A clock that is one second later each time it is read."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> float:
        self.now += 1
        return float(self.now)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_tiny(tmp_path) as opened:
        yield opened


def test_components_add_up_to_the_total(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at the clock lies one second, so that every component's time can be counted by hand."""
    clock = Ticks()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=clock))
    with timed_components(engine, clock) as spent:
        done = engine.generate(PROMPT, PARAMS)
    steps = done.stats.denoise_steps
    assert steps > 2
    assert spent.forwards == steps
    assert spent.attention == LAYERS * steps
    assert spent.moe == 2 * MOE_LAYERS * steps  # the block itself, and the choice of what to prefetch
    assert spent.total == done.stats.denoise_seconds
    # Of a step's looks two bound it, and each of its timed pieces has two: what lies between pieces is "other".
    pieces = LAYERS + 2 * MOE_LAYERS
    assert spent.other == steps * (2 * pieces + 1 - pieces)
    assert spent.moe + spent.attention + spent.other == spent.total
    assert sum(call.seconds for call in spent.calls) == MOE_LAYERS * steps


def test_prefill_and_commit_are_not_denoising(engine: Engine) -> None:
    with timed_components(engine) as spent:
        done = engine.generate(PROMPT, PARAMS)
    assert done.stats.forwards[Phase.PREFILL] == 1
    assert done.stats.forwards[Phase.COMMIT] >= 1
    assert spent.forwards == done.stats.forwards[Phase.DENOISE]
    assert 0 < spent.moe < spent.total == pytest.approx(done.stats.denoise_seconds)
    assert spent.other > 0


def test_distinct_experts_are_those_the_engine_counts(engine: Engine) -> None:
    decisions: list[tuple[int, int]] = []

    def watch(info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        if info.phase is Phase.DENOISE:
            decisions.append((layer, len({e for row in decision.experts.tolist() for e in row if e >= 0})))

    with seam.watching(engine, watch), timed_components(engine) as spent:
        done = engine.generate(PROMPT, PARAMS)
    assert [(call.layer, call.unique) for call in spent.calls] == decisions
    assert sum(unique for _, unique in decisions) == done.stats.unique_experts_sum
    engine.generate(PROMPT, PARAMS)
    assert len(decisions) == done.stats.unique_experts_count, "still watched after the end"


def test_measuring_leaves_no_trace(engine: Engine) -> None:
    plain = engine.generate(PROMPT, PARAMS).token_ids
    with timed_components(engine) as spent, seam.routed(engine, routing="top-k", top_k_experts=1):
        other = engine.generate(PROMPT, PARAMS)
        assert seam.routing_policy(engine).name == "top-k"
    assert other.stats.unique_experts is not None
    assert max(call.unique for call in spent.calls) <= PARAMS.block_length
    calls = len(spent.calls)
    assert engine.generate(PROMPT, PARAMS).token_ids == plain
    assert len(spent.calls) == calls
    assert seam.routing_policy(engine).name == "original"


@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_a_made_up_routing_uses_exactly_its_pool(tokens: int, top_k: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(top_k, tokens * top_k))
    pool = data.draw(st.lists(st.integers(0, 999), min_size=size, max_size=size, unique=True))
    decision = spread(tokens, top_k, pool)
    assert decision.experts.shape == decision.weights.shape == (tokens, top_k)
    assert set(decision.experts.flatten().tolist()) == set(pool)
    assert all(len(set(row)) == top_k for row in decision.experts.tolist())
    torch.testing.assert_close(decision.weights.sum(dim=1), torch.ones(tokens))


@pytest.mark.parametrize("pool", [[1, 2, 3], list(range(9))])
def test_a_pool_that_is_too_small_or_too_large_is_refused(pool: list[int]) -> None:
    with pytest.raises(ValueError, match="can't serve 2 tokens"):
        spread(2, 4, pool)


def test_the_sweep_visits_every_count_and_runs_that_many_experts(engine: Engine) -> None:
    hidden = hidden_states(engine, 1, PROMPT, PARAMS)
    assert hidden.shape == (8, CONFIG["hidden_size"])
    counts = unique_counts(CONFIG["num_experts"], CONFIG["num_experts_per_tok"], len(hidden), 4)
    assert counts == [4, 8, 12, 16]
    before = engine.stats.expert_requests
    points = sweep(engine, 1, hidden, counts, repeats=3)
    assert sorted(point.unique for point in points) == sorted(counts * 3)
    assert engine.stats.expert_requests - before == 3 * sum(counts) + 2 * max(counts)
    assert all(point.seconds > 0 for point in points)
    assert [point.unique for point in points] != sorted(point.unique for point in points), "not shuffled"


def test_medians_by_count() -> None:
    assert by_count([(9, 1.0), (3, 5.0), (9, 3.0), (9, 40.0)]) == {3: 5.0, 9: 3.0}
