from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import SamplingParams
from offload_engine.decode.sampler import accept, propose, unmask_schedule

MASK = 7


def logits_of(rows: int, seed: int = 0, vocab: int = 16) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_best_token_that_is_not_the_mask() -> None:
    logits = torch.zeros(1, 16)
    logits[0, MASK] = 10.0
    logits[0, 3] = 5.0
    probability = logits.softmax(-1)[0, 3]
    tokens, confidence = propose(logits.clone(), MASK, SamplingParams(), None)
    assert tokens.tolist() == [3]
    assert confidence[0] == pytest.approx(probability), "the mask's share of the softmax counts"


def test_greedy_ties_go_to_the_lower_id() -> None:
    assert propose(torch.zeros(3, 16), MASK, SamplingParams(), None).tokens.tolist() == [0, 0, 0]


@given(
    temperature=st.floats(0.1, 5),
    top_k=st.integers(0, 16),
    top_p=st.floats(0.05, 1),
    seed=st.integers(0, 1000),
)
def test_a_drawn_token_is_never_the_mask_and_its_confidence_is_the_plain_probability(
    temperature: float, top_k: int, top_p: float, seed: int
) -> None:
    logits = logits_of(5, seed)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, confidence = propose(logits.clone(), MASK, params, torch.Generator().manual_seed(seed))
    assert MASK not in tokens.tolist()
    plain = logits.softmax(-1).gather(1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(confidence, plain)


def test_top_k_and_top_p_confine_the_draw() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    generator = torch.Generator().manual_seed(0)

    def drawn(**params: float) -> set[int]:
        settings = SamplingParams(temperature=2.0, **params)  # type: ignore[arg-type]
        return {int(propose(logits.clone(), MASK, settings, generator).tokens) for _ in range(200)}

    assert drawn(top_k=1) == {0}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.01) == {0}
    assert drawn() > {0, 1, 2}
    assert len(drawn(top_p=0.7)) < len(drawn())


def test_the_same_seed_draws_the_same_tokens() -> None:
    params = SamplingParams(temperature=1.0)
    one, two, other = (
        propose(logits_of(20), MASK, params, torch.Generator().manual_seed(seed)).tokens.tolist() for seed in (1, 1, 2)
    )
    assert one == two != other


def test_draws_follow_the_softmax() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]])).repeat(4000, 1)
    tokens = propose(
        torch.cat((logits, torch.full((4000, 5), -40.0)), 1), MASK, SamplingParams(temperature=1.0), None
    ).tokens
    shares = torch.bincount(tokens, minlength=8)[:3] / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), rtol=0, atol=0.05)


def test_accepts_all_above_the_threshold_or_the_most_confident() -> None:
    confidence = torch.tensor([0.2, 0.9, 0.5, 0.96, 0.9]).tolist()
    assert accept(confidence, 1, 0.95) == [3]
    assert accept(confidence, 1, 0.85) == [1, 3, 4]
    assert accept(confidence, 2, 0.95) == [1, 3], "a tie goes to the lower position"
    assert accept(confidence, 9, 0.95) == [0, 1, 2, 3, 4]
    assert accept(confidence, 0, 1.0) == []


@given(st.lists(st.floats(0, 1, width=32), max_size=8), st.integers(0, 9), st.floats(0, 1))
def test_acceptance_compares_as_torch_does(confidence: list[float], minimum: int, threshold: float) -> None:
    rows = torch.tensor(confidence, dtype=torch.float32)
    above = (rows > threshold).nonzero().flatten().tolist()
    best = rows.sort(descending=True, stable=True).indices[:minimum].sort().values.tolist()
    assert accept(confidence, minimum, threshold) == (above if len(above) >= minimum else best)


@given(st.integers(1, 128), st.integers(1, 200))
def test_the_schedule_unmasks_every_position_and_puts_the_remainder_first(block_length: int, steps: int) -> None:
    schedule = unmask_schedule(block_length, steps)
    assert len(schedule) == min(steps, block_length), "a step that need unmask nothing never comes"
    assert sum(schedule) == block_length
    assert schedule == sorted(schedule, reverse=True)
    assert max(schedule) - min(schedule) <= 1
