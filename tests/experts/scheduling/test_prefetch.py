from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.experts.scheduling.predictor import Prediction
from offload_engine.experts.scheduling.prefetch import prefetch_order


def test_a_sure_guess_of_the_next_layer_goes_before_a_doubtful_one_of_this() -> None:
    order = prefetch_order([(1, [(0, 1.0), (1, 0.5)]), (2, [(0, 1.0), (1, 0.9)])])
    assert order == [ExpertKey(1, 0), ExpertKey(2, 0), ExpertKey(2, 1), ExpertKey(1, 1)]


def test_layers_with_other_scales_compare() -> None:
    assert prefetch_order([(1, [(0, 300.0)]), (2, [(0, 2.0)])]) == [ExpertKey(1, 0), ExpertKey(2, 0)]
    assert prefetch_order([(1, [(3, 0.0)]), (2, [])]) == [ExpertKey(1, 3)]


predictions = st.lists(
    st.tuples(st.integers(0, 9), st.sampled_from((0.0, 0.5, 1.0, 2.5, 300.0))), unique_by=lambda guess: guess[0]
)


@given(guesses=st.lists(predictions, max_size=4))
def test_every_guess_is_in_it_once_and_equals_keep_their_order(guesses: list[Prediction]) -> None:
    order = prefetch_order(enumerate(guesses))
    assert sorted(order) == sorted(ExpertKey(layer, expert) for layer, said in enumerate(guesses) for expert, _ in said)
    for layer, said in enumerate(guesses):
        falling = sorted(said, key=lambda guess: guess[1], reverse=True)
        assert [key.expert for key in order if key.layer == layer] == [expert for expert, _score in falling]
