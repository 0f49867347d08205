from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import BlockPass, ForwardInfo, Phase
from offload_engine.errors import ConfigError, TraceError
from offload_engine.experts.scheduling.predictor import (
    PREDICTORS,
    Combined,
    CrossLayerGate,
    ExpertPredictor,
    FirstStep,
    NoPredictor,
    Oracle,
    Prediction,
    PredictionCounts,
    PreviousStep,
    make_predictor,
)

LAYER = 1


def forward(
    predictor: ExpertPredictor, phase: Phase, block: int, step: int, chosen: Prediction, offer: Prediction | None = None
) -> Prediction:
    """One forward with one MoE layer, as the executor drives it. Returns what was predicted."""
    predictor.begin(ForwardInfo(phase, block, step))
    if offer is not None:
        predictor.offer(LAYER, *zip(*offer, strict=True))
    predicted = predictor.predict(LAYER)
    predictor.observe(LAYER, [expert for expert, _ in chosen], [score for _, score in chosen])
    return predicted


ONE, TWO, THREE = [(5, 2.0), (3, 1.0)], [(3, 4.0), (8, 0.5)], [(1, 1.0)]


def test_none_predicts_nothing() -> None:
    predictor = NoPredictor()
    assert forward(predictor, Phase.DENOISE, 0, 0, ONE, offer=ONE) == []
    assert forward(predictor, Phase.DENOISE, 0, 1, ONE, offer=ONE) == []
    assert predictor.counts == PredictionCounts(predicted=0, correct=0, actual=4)


def test_previous_step_repeats_the_last_step_of_its_layer() -> None:
    predictor = PreviousStep()
    assert forward(predictor, Phase.DENOISE, 2, 0, ONE) == []
    assert forward(predictor, Phase.DENOISE, 2, 1, TWO) == ONE
    assert forward(predictor, Phase.DENOISE, 2, 2, TWO) == TWO
    assert predictor.predict(LAYER + 1) == []


def test_previous_step_carries_the_commit_into_the_next_block() -> None:
    predictor = PreviousStep()
    forward(predictor, Phase.DENOISE, 2, 0, ONE)
    assert forward(predictor, Phase.COMMIT, 2, 1, TWO) == ONE
    assert forward(predictor, Phase.DENOISE, 3, 0, THREE) == TWO


def test_previous_step_neither_serves_nor_learns_from_a_prefill_and_forgets_the_sequence_before() -> None:
    predictor = PreviousStep()
    forward(predictor, Phase.DENOISE, 2, 0, ONE)
    assert forward(predictor, Phase.PREFILL, 0, 0, TWO) == []
    assert forward(predictor, Phase.PREFILL, 4, 0, TWO) == []
    assert forward(predictor, Phase.DENOISE, 5, 0, THREE) == []
    assert forward(predictor, Phase.DENOISE, 5, 1, THREE) == THREE


@pytest.mark.parametrize(("block", "step"), [(0, 0), (2, 1), (1, 7)])
def test_previous_step_sees_a_new_sequence_in_a_step_that_does_not_come_next(block: int, step: int) -> None:
    predictor = PreviousStep()
    forward(predictor, Phase.DENOISE, 2, 1, ONE)
    assert forward(predictor, Phase.DENOISE, block, step, TWO) == []
    assert forward(predictor, Phase.DENOISE, block, step + 1, TWO) == TWO


def batch(*lanes: tuple[int, int, int], phase: Phase = Phase.DENOISE) -> ForwardInfo:
    """A forward over (lane, block, step) each."""
    return ForwardInfo.of([BlockPass(phase, lane, block, step, 32) for lane, block, step in lanes])


def test_previous_step_remembers_while_any_lane_of_a_batch_goes_on() -> None:
    predictor = PreviousStep()

    def named(info: ForwardInfo) -> Prediction:
        predictor.begin(info)
        predicted = predictor.predict(LAYER)
        predictor.observe(LAYER, [5], [1.0])
        return predicted

    assert named(batch((0, 2, 0), (1, 0, 3))) == []
    assert named(batch((0, 2, 1), (1, 0, 4))) == [(5, 1.0)]
    assert named(batch((1, 0, 5))) == [(5, 1.0)], "lane 0 has ended, and what is first now is at an earlier block"
    assert named(batch((0, 0, 0), phase=Phase.PREFILL)) == []
    assert named(batch((0, 2, 0), (1, 0, 6))) == [(5, 1.0)], "a prompt has entered beside lane 1"
    assert named(batch((0, 1, 0), (1, 0, 0))) == [], "both began anew"
    assert named(batch((2, 9, 1))) == [], "nothing is known of lane 2"


def test_previous_step_is_left_alone_by_scoring() -> None:
    predictor = PreviousStep()
    forward(predictor, Phase.DENOISE, 2, 0, ONE)
    assert forward(predictor, Phase.SCORE, 0, 0, TWO) == []
    assert forward(predictor, Phase.DENOISE, 2, 1, TWO) == ONE


@pytest.mark.parametrize("phase", Phase)
def test_cross_layer_gate_passes_on_this_forwards_offer(phase: Phase) -> None:
    predictor = CrossLayerGate()
    assert predictor.wants_preview
    assert forward(predictor, phase, 0, 0, ONE, offer=TWO) == TWO
    assert predictor.predict(LAYER + 1) == []
    predictor.offer(LAYER, [9], [0.1])
    assert predictor.predict(LAYER) == [(9, 0.1)]
    assert forward(predictor, phase, 0, 1, ONE) == []


def test_only_the_gate_wants_previews() -> None:
    assert [name for name in PREDICTORS if make_predictor(name).wants_preview] == ["cross-layer-gate", "combined"]


def test_the_oracle_reads_its_recording() -> None:
    predictor = Oracle([{LAYER: ONE}, {}, {LAYER: TWO}])
    assert predictor.predict(LAYER) == []
    assert forward(predictor, Phase.PREFILL, 0, 0, ONE) == ONE
    assert forward(predictor, Phase.DENOISE, 1, 0, THREE) == []
    assert forward(predictor, Phase.DENOISE, 1, 1, TWO) == TWO
    with pytest.raises(TraceError, match="forward 4 begins, but its recording holds 3"):
        predictor.begin(ForwardInfo(Phase.DENOISE, 1, 2))


def test_predictions_are_the_callers_to_change() -> None:
    predictor = PreviousStep()
    forward(predictor, Phase.DENOISE, 0, 0, ONE)
    predictor.predict(LAYER).clear()
    assert predictor.predict(LAYER) == ONE


def test_counts_compare_the_last_prediction_with_what_was_chosen() -> None:
    predictor = CrossLayerGate()
    assert (predictor.counts.precision, predictor.counts.recall) == (0.0, 0.0)
    predictor.begin(ForwardInfo(Phase.DENOISE, 0, 0))
    predictor.offer(LAYER, [7, 8, 9], [3.0, 2.0, 1.0])
    predictor.predict(LAYER)
    predictor.offer(LAYER, [5, 6, 4, 2], [3.0, 2.0, 1.0, 1.0])
    predictor.predict(LAYER)
    predictor.observe(LAYER, [5, 6, 1], [3.0, 2.0, 1.0])
    predictor.observe(LAYER + 1, [5, 6, 1], [3.0, 2.0, 1.0])  # offered or not: nobody asked for a prediction
    predictor.begin(ForwardInfo(Phase.DENOISE, 0, 1))
    predictor.observe(LAYER, [5, 6], [3.0, 2.0])  # the prediction was for the forward before
    assert predictor.counts == PredictionCounts(predicted=4, correct=2, actual=8)
    assert predictor.counts.precision == 0.5
    assert predictor.counts.recall == 0.25


@pytest.mark.parametrize(("phase", "counted"), [("prefill", 0), ("denoise", 1), ("commit", 1), ("score", 0)])
def test_counts_are_of_forwards_over_one_block(phase: str, counted: int) -> None:
    predictor = CrossLayerGate()
    forward(predictor, Phase(phase), 0, 0, THREE, offer=THREE)
    assert predictor.counts == PredictionCounts(counted, counted, counted)


SETS = st.lists(st.integers(0, 15), unique=True, max_size=8).map(lambda chosen: [(expert, 1.0) for expert in chosen])


@given(steps=st.lists(SETS, min_size=1, max_size=12))
def test_the_oracle_is_always_right_and_the_others_count_their_overlap(steps: list[Prediction]) -> None:
    oracle, previous = Oracle([{LAYER: chosen} for chosen in steps]), PreviousStep()
    for step, chosen in enumerate(steps):
        forward(oracle, Phase.DENOISE, 0, step, chosen)
        forward(previous, Phase.DENOISE, 0, step, chosen)
    total = sum(map(len, steps))
    assert oracle.counts == PredictionCounts(total, total, total)
    overlap = sum(len({*before} & {*after}) for before, after in pairwise(steps))
    assert previous.counts == PredictionCounts(sum(map(len, steps[:-1])), overlap, total)


def test_names() -> None:
    assert {name: make_predictor(name).name for name in PREDICTORS} == {name: name for name in PREDICTORS}
    with pytest.raises(
        ConfigError, match="predictor is 'psychic'; choose one of none, previous-step, cross-layer-gate"
    ):
        make_predictor("psychic")


def test_first_step_knows_what_blocks_begin_with_and_nothing_else() -> None:
    predictor = FirstStep()
    assert forward(predictor, Phase.DENOISE, 0, 0, ONE) == []
    assert forward(predictor, Phase.DENOISE, 0, 1, TWO) == []
    forward(predictor, Phase.COMMIT, 0, 2, TWO)
    assert forward(predictor, Phase.DENOISE, 1, 0, TWO) == [(5, 0.5), (3, 0.5)]
    forward(predictor, Phase.PREFILL, 0, 0, THREE)
    assert forward(predictor, Phase.DENOISE, 1, 0, TWO) == [(3, 0.75), (8, 0.5), (5, 0.25)]


def test_first_step_forgets_what_blocks_stopped_beginning_with() -> None:
    predictor = FirstStep()
    forward(predictor, Phase.DENOISE, 0, 0, ONE)
    for block in range(1, 5):
        forward(predictor, Phase.DENOISE, block, 0, THREE)
    assert [expert for expert, _share in forward(predictor, Phase.DENOISE, 5, 0, THREE)] == [1]


def test_combined_adds_what_its_sources_know() -> None:
    predictor = make_predictor("combined")
    forward(predictor, Phase.DENOISE, 0, 0, ONE)
    guessed = forward(predictor, Phase.DENOISE, 0, 1, ONE, offer=THREE)
    assert {expert for expert, _chance in guessed} == {5, 3, 1}


def test_combined_learns_which_kind_of_guess_comes_true() -> None:
    """The step before is always right, the gate never: after a while only the former is followed."""
    predictor = make_predictor("combined")
    for number in range(1, 12):
        guessed = forward(predictor, Phase.DENOISE, 0, number, ONE, offer=THREE)
    assert {expert for expert, _chance in guessed} == {5, 3}
    assert all(chance > 0.8 for _expert, chance in guessed)


def test_a_guess_is_right_if_any_block_wanted_it_but_what_is_over_is_not_learnt() -> None:
    """Expert 5 is wanted by a block that is committed with the forward, 3 by the one that goes on."""
    predictor = make_predictor("block-history")
    forward(predictor, Phase.DENOISE, 0, 1, [(5, 2.0), (3, 1.0)])
    for step in range(2, 12):
        predictor.begin(ForwardInfo(Phase.DENOISE, 0, step))
        named = {expert for expert, _ in predictor.predict(LAYER)}
        predictor.observe(LAYER, [5, 3], [2.0, 1.0], ([3], [1.0]))
        assert named == ({5, 3} if step == 2 else {3})
    assert predictor.counts.precision == 1.0
    assert predictor.counts.correct == 2 + 9
    assert isinstance(predictor, Combined)
    assert [source.counts.precision for source in predictor.sources] == [1.0, 0.0]


def test_guesses_that_come_true_every_other_time_are_not_worth_their_loads() -> None:
    combined = Combined("gate", [CrossLayerGate()])
    guessed = [
        bool(forward(combined, Phase.DENOISE, 0, number + 1, [(number % 2, 1.0)], offer=[(0, 1.0)]))
        for number in range(12)
    ]
    assert guessed[0], "they are tried"
    assert not any(guessed[8:]), "and then left out"


def test_combined_judges_guesses_by_how_far_ahead_they_were_made() -> None:
    """Offers for the layer are wrong a layer earlier, and right just before it."""
    predictor = make_predictor("combined")
    for number in range(1, 12):
        predictor.begin(ForwardInfo(Phase.DENOISE, 0, number))
        predictor.offer(LAYER, [number + 100], [1.0])
        early = predictor.predict(LAYER, 1)
        predictor.offer(LAYER, [number], [1.0])
        late = predictor.predict(LAYER)
        predictor.observe(LAYER, [number], [1.0])
    assert number + 100 not in dict(early)
    assert number in dict(late)


@given(chosen=st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=2, max_size=8))
def test_combined_guesses_are_distinct_and_fall_in_chance(chosen: list[set[int]]) -> None:
    predictor = make_predictor("combined")
    assert isinstance(predictor, Combined)
    for number, experts in enumerate(chosen):
        ranked = [(expert, float(10 - expert)) for expert in sorted(experts)]
        guessed = forward(predictor, Phase.DENOISE, number // 3, number % 3, ranked, offer=ranked[:2])
        assert len(dict(guessed)) == len(guessed)
        assert all(one >= other for (_, one), (_, other) in pairwise(guessed))
        assert all(predictor.least <= chance < 1.0 for _expert, chance in guessed)
