"""dMoE's coresets from the votes of original routing, and what they keep of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import Phase
from offload_engine.routing.coreset import top_p_coreset
from offload_engine.trace import TraceRecord, read_trace
from offload_engine.tune.routing import as_coresets, blocks_of, kept_share, steps_of

TRACES = Path(__file__).parent.parent / "data" / "traces"


def record(
    scores: dict[int, float],
    step: int = 0,
    *,
    block: int = 0,
    layer: int = 1,
    sequence: int = 0,
    phase: Phase = Phase.DENOISE,
) -> TraceRecord:
    ranked = sorted(scores, key=lambda expert: (-scores[expert], expert))
    return TraceRecord(
        phase=phase,
        sequence=sequence,
        block=block,
        step=step,
        layer=layer,
        experts=tuple(ranked),
        scores=tuple(scores[expert] for expert in ranked),
    )


VOTES = st.lists(st.integers(0, 40).map(lambda quarter: quarter / 4), min_size=1, max_size=12)
"""Multiples of a quarter, whose sums are exact in either precision."""


@given(VOTES, st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.integers(1, 6))
def test_the_coreset_is_that_of_the_routing_policy(votes: list[float], top_p: float, least: int) -> None:
    tensor = torch.tensor([votes])
    wanted = top_p_coreset(tensor, torch.ones_like(tensor, dtype=torch.bool), top_p, least)[0]
    (found,) = as_coresets([record(dict(enumerate(votes)))], top_p, least)
    assert set(found.experts) == set(wanted.nonzero().flatten().tolist())


def test_a_held_coreset_serves_its_block_and_ranks_by_the_step_s_own_votes() -> None:
    steps = [record({0: 3, 1: 2, 2: 1}), record({2: 5, 1: 4, 0: 1}, 1), record({2: 5, 1: 1}, 2)]
    other = record({7: 2, 1: 1}, 1, block=1)
    found = as_coresets([*steps, other], 0.6, 1, hold_steps=2)
    assert [one.experts for one in found] == [(0, 1), (1, 0), (2,), (7,)]
    assert found[1].scores == (4.0, 1.0)
    assert [one.experts for one in as_coresets(steps, 0.6, 1)] == [(0, 1), (2, 1), (2,)]


def test_a_commit_chooses_afresh_and_holds_nothing() -> None:
    votes = {0: 3.0, 1: 1.0}
    trace = [record({1: 3.0, 0: 1.0}), record(votes, phase=Phase.COMMIT), record(votes, 1)]
    assert [one.experts for one in as_coresets(trace, 0.5, 1, hold_steps=4)] == [(1,), (0,), (1,)]


def test_layers_and_sequences_hold_their_own() -> None:
    first, second = {0: 3.0, 1: 1.0}, {1: 3.0, 0: 1.0}
    trace = [record(first), record(second, layer=2), record(second, 1), record(second, 1, sequence=1)]
    assert [one.experts for one in as_coresets(trace, 0.5, 1, hold_steps=2)] == [(0,), (1,), (0,), (1,)]


def test_kept_votes_are_those_of_the_experts_that_are_still_wanted() -> None:
    original = [record({0: 3, 1: 1}), record({0: 1, 1: 1}, 1), record({5: 1}, 2)]
    other = [record({0: 1, 9: 1}), record({0: 1, 1: 1}, 1)]
    assert kept_share(original, other) == pytest.approx((0.75 + 1.0) / 2)
    assert kept_share(original, []) is None
    assert kept_share([record({0: -1.0})], [record({0: -1.0})]) is None, "nothing was voted for"


@pytest.mark.parametrize("top_p", [0.4, 0.6, 0.8, 1.0])
def test_a_real_trace_keeps_what_the_coreset_promises(top_p: float) -> None:
    _, records = read_trace(TRACES / "llada2-mini-original.jsonl.gz")
    original = list(records)
    found = as_coresets(original, top_p, 1)
    kept = kept_share(original, found)
    assert kept is not None
    assert top_p <= kept + 1e-9
    assert (kept == pytest.approx(1.0)) is (top_p == 1.0)
    held = kept_share(original, as_coresets(original, top_p, 1, hold_steps=4))
    assert held is not None
    assert held < kept or top_p == 1.0
    assert (steps_of(found), blocks_of(found)) == (steps_of(original), blocks_of(original))
    assert steps_of(original) > blocks_of(original) > 1


def test_steps_and_blocks_are_counted_once() -> None:
    assert (steps_of([]), blocks_of([])) == (0, 0)
    trace = [record({0: 1}, layer=1), record({0: 1}, layer=2), record({0: 1}, 1), record({0: 1}, block=1)]
    assert (steps_of(trace), blocks_of(trace)) == (3, 2)
    assert steps_of([record({0: 1}, phase=Phase.PREFILL)]) == 0
