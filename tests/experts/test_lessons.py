"""When predictor and hot set hear of what layers chose."""

from __future__ import annotations

from collections.abc import Sequence

from offload_engine.core import ForwardInfo, Phase
from offload_engine.experts.hot_set import HotSet
from offload_engine.experts.lessons import Lessons
from offload_engine.experts.ranked import Ranked, Standing
from offload_engine.experts.scheduling.outlook import Outlook
from offload_engine.experts.scheduling.predictor import Combined, ExpertPredictor, Prediction, PreviousStep

DENOISE = ForwardInfo(Phase.DENOISE)


class Listening(ExpertPredictor):
    name = "listening"

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[int, list[int]]] = []

    def _predict(self, layer: int) -> Prediction:
        return []

    def _observe(self, layer: int, experts: Sequence[int], scores: Sequence[float]) -> None:
        self.heard.append((layer, list(experts)))


class Eager(Listening):
    within_forward = True


def said(*experts: int) -> Standing:
    ranked = Ranked(list(experts), [1.0] * len(experts))
    return Standing(ranked, ranked, Outlook(ranked.experts))


def test_all_layers_are_told_of_together_in_their_order() -> None:
    predictor, hot = Listening(), HotSet()
    lessons = Lessons(predictor, hot, last_layer=3)
    lessons.begin(DENOISE)
    lessons.note(1, said(5, 6))
    lessons.note(2, said(7))
    assert not predictor.heard
    assert not hot.hottest(9)
    lessons.note(3, said(8))
    assert predictor.heard == [(1, [5, 6]), (2, [7]), (3, [8])]
    assert {(key.layer, key.expert) for key, _uses in hot.hottest(9)} == {(1, 5), (1, 6), (2, 7), (3, 8)}
    lessons.begin(DENOISE)
    assert len(predictor.heard) == 3, "once"


def test_what_a_forward_that_broke_off_has_chosen_is_learnt_before_the_next() -> None:
    predictor = Listening()
    lessons = Lessons(predictor, HotSet(), last_layer=3)
    lessons.begin(DENOISE)
    lessons.note(1, said(5))
    lessons.begin(ForwardInfo(Phase.PREFILL))
    assert predictor.heard == [(1, [5])]
    assert predictor.counts.actual == 1, "as of the forward it was chosen in"


def test_who_learns_within_a_forward_hears_at_once() -> None:
    for predictor, ears in ((eager := Eager(), eager), (Combined("both", [PreviousStep(), eager := Eager()]), eager)):
        lessons = Lessons(predictor, HotSet(), last_layer=3)
        lessons.begin(DENOISE)
        lessons.note(1, said(5))
        assert ears.heard == [(1, [5])]


def test_prefills_do_not_make_experts_hot() -> None:
    hot = HotSet()
    lessons = Lessons(Listening(), hot, last_layer=1)
    lessons.begin(ForwardInfo(Phase.PREFILL))
    lessons.note(1, said(5))
    assert not hot.hottest(9)
