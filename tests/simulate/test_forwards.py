from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import Phase
from offload_engine.experts.scheduling.outlook import FURTHEST
from offload_engine.simulate.forwards import Pass, Size, forwards, sized
from offload_engine.trace import TraceRecord
from tests.simulate.trace_data import record, steps

COMMIT = {"phase": Phase.COMMIT, "block": 0, "step": 0}
OPENING = {"block": 1, "step": 0}


def test_a_fused_commit_is_one_forward() -> None:
    """The first layer's scores: commit 2 and 1 for 5 and 3, the step 3, 2, 1 for 3, 4, 5."""
    fused = [record(1, (5, 3), **COMMIT), record(1, (3, 4, 5), **OPENING), record(2, (0,), **COMMIT)]
    trace = list(forwards([*steps((0, 1)), *fused, record(2, (1,), **OPENING), *steps((7,), (7,), block=1)[2:]], 32))
    assert [len(one.layers) for one in trace] == [2, 2, 2]
    both = trace[1]
    assert both.passes == (Pass(0, Phase.COMMIT, 0, 0), Pass(0, Phase.DENOISE, 1, 0))
    assert (both.info.phase, both.info.block, both.info.step) == (Phase.DENOISE, 1, 0)
    assert [one.tokens for one in both.info.blocks] == [32, 32]
    assert (both.layers[0].experts, both.layers[0].scores) == ((3, 5, 4), (4.0, 3.0, 2.0))
    assert both.layers[0].learned == ((3, 5, 4), (4.0, 3.0, 2.0))
    assert both.layers[1].experts == (0, 1)
    assert both.layers[1].learned == ((1,), (1.0,))
    assert trace[0].layers[0].learned is None


def test_a_commit_of_its_own_is_a_forward_of_its_own() -> None:
    alone = [record(1, **COMMIT), record(2, **COMMIT)]
    phases = [one.info.phase for one in forwards([*steps((0,)), *alone, *steps((1,), block=1)])]
    assert phases == [Phase.DENOISE, Phase.COMMIT, Phase.DENOISE]


def test_runners_up_of_several_sequences_are_no_more_than_of_one() -> None:
    named = [tuple(range(100 * lane + 10, 100 * lane + 40)) for lane in (0, 1)]
    (together,) = forwards([record(1, (lane,), sequence=lane, runners_up=named[lane]) for lane in (0, 1)])
    assert together.layers[0].runners_up == tuple(one for pair in zip(*named, strict=True) for one in pair)[:FURTHEST]


def test_sequences_decoded_together_share_forwards() -> None:
    batch = [record(layer, (lane,), sequence=lane) for layer in (1, 2) for lane in (0, 1, 2)]
    (together,) = forwards(batch)
    assert [one.lane for one in together.info.blocks] == [0, 1, 2]
    assert together.layers[1].experts == (0, 1, 2)
    assert together.layers[1].learned is None, "all of them go on"


def test_a_single_layer_tells_a_fused_commit_from_the_next_step() -> None:
    places = [{"step": 0}, {"step": 1}, COMMIT, OPENING, {"block": 1, "step": 1}]
    alone = [record(1, **place) for place in places]
    assert [len(one.passes) for one in forwards(alone)] == [1, 1, 2, 1]


def test_sizes_are_what_a_trace_can_tell() -> None:
    """A prompt of two blocks, then a block of two steps, committed with the first of two steps of the next."""
    fused = [record(layer, **place) for layer in (1, 2) for place in ({**COMMIT, "block": 2}, {**OPENING, "block": 3})]
    records = [record(1, phase=Phase.PREFILL), *steps((0,), (0,), block=2), *fused, *steps((0,), (0,), block=3)[2:]]
    found = [one.size for one in sized(list(forwards(records)), 8)]
    assert found == [
        Size(tokens=16, positions=12, masked=0),
        Size(tokens=8, positions=24, masked=8),
        Size(tokens=8, positions=24, masked=4),
        Size(tokens=16, positions=28, masked=8),
        Size(tokens=8, positions=32, masked=4),
    ]


@dataclass(frozen=True)
class Plan:
    """What a decoder did: blocks of so many steps, committed along with the next one or alone."""

    blocks: Sequence[int]
    fused: bool
    layers: int


def written(plan: Plan) -> list[list[TraceRecord]]:
    """The records of each forward that the plan takes."""
    made = []
    for block, count in enumerate(plan.blocks):
        for number in range(count):
            passes = [{"block": block, "step": number}]
            if block and number == 0:
                commit = {"phase": Phase.COMMIT, "block": block - 1, "step": 0}
                made += [] if plan.fused else [[commit]]
                passes = [commit, *passes] if plan.fused else passes
            made.append(passes)
    return [[record(layer, **one) for layer in range(1, plan.layers + 1) for one in passes] for passes in made]


@given(
    st.builds(Plan, st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans(), st.integers(2, 4)),
)
def test_forwards_come_back_as_they_were_run(plan: Plan) -> None:
    made = written(plan)
    trace = list(forwards([one for forward in made for one in forward]))
    assert [len(one.layers) for one in trace] == [plan.layers] * len(made)
    assert [len(one.passes) * plan.layers for one in trace] == [len(forward) for forward in made]
    assert sum(one.info.phase is Phase.DENOISE for one in trace) == sum(plan.blocks)
