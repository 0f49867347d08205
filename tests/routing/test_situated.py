"""A coreset that is held over steps, and one that favours what the cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase
from offload_engine.routing import Coreset, RouterShape, RoutingOptions, SituatedCoreset, make_policy
from offload_engine.routing.base import block_votes, choose_inside, select_scores
from offload_engine.routing.coreset import top_p_coreset

SHAPE = RouterShape(32, 4, 4, 2, True, 2.5)
RULE = Coreset(SHAPE, 0.5, 6)
BLOCK = torch.zeros(8, dtype=torch.long)


def situated(**options: Any) -> SituatedCoreset:
    """`RULE` with these options."""
    return SituatedCoreset(RULE.shape, RULE.top_p, RULE.min_experts, **options)


def logits_of(*seed: int) -> Tensor:
    """Different for every seed."""
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(hash(seed) % 2**40))


def denoise(block: int, step: int) -> ForwardInfo:
    return ForwardInfo(Phase.DENOISE, block, step)


def coreset_of(policy: SituatedCoreset, layer: int, info: ForwardInfo, logits: Tensor) -> Tensor:
    decision = policy.at(layer, info)(logits, None, BLOCK)
    assert decision.coreset is not None
    return decision.coreset


def fresh(logits: Tensor) -> Tensor:
    coreset = RULE(logits, None, BLOCK).coreset
    assert coreset is not None
    return coreset


def test_only_the_options_make_a_policy_situated() -> None:
    assert make_policy("dmoe", SHAPE, RoutingOptions(top_p=0.5, min_experts=6)) == RULE
    for options in ({"hold_steps": 2}, {"residency_bonus": 0.5}):
        policy = make_policy("dmoe", SHAPE, RoutingOptions(top_p=0.5, min_experts=6, **options))  # type: ignore[arg-type]
        assert isinstance(policy, SituatedCoreset)
        assert policy == situated(**options)
        assert policy.name == "dmoe"


def test_a_coreset_serves_as_many_steps_as_asked_and_tokens_choose_inside() -> None:
    policy = situated(hold_steps=3)
    for step in range(8):
        logits = logits_of(step)
        decision = policy.at(1, denoise(0, step))(logits, None, BLOCK)
        held = fresh(logits_of(step // 3 * 3))
        assert decision.coreset is not None
        assert torch.equal(decision.coreset, held)
        scores, selection = select_scores(logits, None)
        experts, weights = choose_inside(scores, selection, held, BLOCK, SHAPE)
        assert torch.equal(decision.experts, experts)
        assert torch.equal(decision.weights, weights)
        assert torch.equal(decision.block_scores, RULE(logits, None, BLOCK).block_scores)  # type: ignore[arg-type]


@st.composite
def generations(draw: st.DrawFn) -> list[tuple[int, int, Phase, int]]:
    """(layer, block, phase, step) of several prompts' forwards, any of them broken off, even between two layers."""
    places: list[tuple[int, int, Phase, int]] = []
    for _prompt in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, 2))
        forwards: list[tuple[int, Phase, int]] = []
        for block in range(first, first + draw(st.integers(1, 3))):
            steps = draw(st.integers(1, 5))
            forwards += [(block, Phase.DENOISE, step) for step in range(steps)]
            forwards.append((block, Phase.COMMIT, steps))
        if first:
            forwards.insert(0, (0, Phase.PREFILL, 0))
        prompt = [(layer, block, phase, step) for block, phase, step in forwards for layer in (1, 2)]
        places += prompt[: draw(st.integers(1, len(prompt)))]
    return places


@settings(max_examples=60, deadline=None)
@given(generations(), st.integers(1, 4), st.lists(st.booleans(), min_size=120, max_size=120))
def test_no_block_prompt_or_broken_generation_leaves_its_coreset_to_another(
    places: list[tuple[int, int, Phase, int]], hold: int, previewed: list[bool]
) -> None:
    policy = situated(hold_steps=hold)
    chosen: dict[int, Tensor] = {}
    for moment, (layer, block, phase, step) in enumerate(places):
        logits, info = logits_of(moment), ForwardInfo(phase, block, step)
        if previewed[moment]:  # a preview shows what would be, and leaves no trace
            seen = logits_of(-moment - 1)
            preview = policy.at(layer, info, preview=True)(seen, None, BLOCK).coreset
            kept = phase is Phase.DENOISE and step % hold
            assert preview is not None
            assert torch.equal(preview, chosen[layer] if kept else fresh(seen))
        coreset = coreset_of(policy, layer, info, logits)
        if phase is not Phase.DENOISE:
            assert torch.equal(coreset, fresh(logits))
            continue
        if step % hold == 0:
            chosen[layer] = fresh(logits)
        assert torch.equal(coreset, chosen[layer])


def test_a_block_that_begins_late_and_a_preview_alone_hold_nothing() -> None:
    policy = situated(hold_steps=4)
    coreset_of(policy, 1, denoise(0, 0), logits_of(0))
    assert torch.equal(coreset_of(policy, 1, denoise(1, 1), logits_of(1)), fresh(logits_of(1)))
    policy.at(2, denoise(0, 0), preview=True)(logits_of(2), None, BLOCK)
    assert torch.equal(coreset_of(policy, 2, denoise(0, 1), logits_of(3)), fresh(logits_of(3)))


def test_called_as_a_plain_policy_it_is_one() -> None:
    policy = situated(hold_steps=4, residency_bonus=9.0, residents=lambda _layer: range(32))
    for step in range(3):
        logits = logits_of(step)
        policy.at(1, denoise(0, step))(logits, None, BLOCK)
        assert torch.equal(policy(logits, None, BLOCK).experts, RULE(logits, None, BLOCK).experts)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1000), st.sets(st.integers(0, 31)), st.floats(0.01, 5.0), st.sampled_from([0.0, -0.8]), st.booleans()
)
def test_votes_for_residents_count_more(seed: int, resident: set[int], bonus: float, shift: float, twice: bool) -> None:
    policy = situated(residency_bonus=bonus, residents=lambda layer: sorted(resident) if layer == 2 else [])
    logits, bias = logits_of(seed), torch.full((32,), shift)
    blocks = torch.arange(8) // 4 if twice else BLOCK
    scores, selection = select_scores(logits, bias)
    votes, voted = block_votes(selection, blocks, SHAPE.top_k)
    raised = votes.clone()
    for block in range(votes.shape[0]):
        for expert in resident:
            if votes[block, expert] > 0:
                raised[block, expert] = votes[block, expert] * (1 + bonus)
    expected = top_p_coreset(raised, voted, RULE.top_p, RULE.min_experts)
    decision = policy.at(2, denoise(0, 0))(logits, bias, blocks)
    assert decision.coreset is not None
    assert torch.equal(decision.coreset, expected)
    experts, weights = choose_inside(scores, selection, expected, blocks, SHAPE)
    assert torch.equal(decision.experts, experts)
    assert torch.equal(decision.weights, weights)
    assert torch.equal(decision.block_scores, votes.clamp(min=0))  # type: ignore[arg-type]
    elsewhere = policy.at(1, denoise(0, 0))(logits, bias, blocks)
    assert torch.equal(elsewhere.experts, RULE(logits, bias, blocks).experts)


def test_an_expert_without_votes_gains_nothing() -> None:
    logits = torch.full((8, 32), -4.0)
    logits[:, :6] = torch.arange(6, 0, -1.0)
    resident = [1, 30, 31]
    policy = SituatedCoreset(SHAPE, 1.0, 1, residency_bonus=1000.0, residents=lambda _layer: resident)
    assert coreset_of(policy, 1, denoise(0, 0), logits).nonzero()[:, 1].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("phase", [Phase.PREFILL, Phase.DENOISE, Phase.COMMIT])
def test_residency_is_read_whenever_a_coreset_is_chosen(phase: Phase) -> None:
    asked: list[int] = []

    def residents(layer: int) -> Sequence[int]:
        asked.append(layer)
        return range(16, 32)

    policy = situated(residency_bonus=3.0, residents=residents)
    for moment in range(3):
        coreset = coreset_of(policy, moment + 1, ForwardInfo(phase), logits_of(moment))
        assert coreset[0, :16].sum() < fresh(logits_of(moment))[0, :16].sum()
    assert asked == [1, 2, 3]


def test_scoring_does_not_ask_the_cache() -> None:
    def residents(_layer: int) -> Sequence[int]:
        raise AssertionError("asked")

    policy = situated(residency_bonus=3.0, residents=residents)
    assert torch.equal(coreset_of(policy, 1, ForwardInfo(Phase.SCORE), logits_of(0)), fresh(logits_of(0)))


def test_held_and_favoured_together() -> None:
    resident = list(range(16))
    policy = situated(hold_steps=2, residency_bonus=3.0, residents=lambda _layer: resident)
    first = coreset_of(policy, 1, denoise(0, 0), logits_of(0))
    resident[:] = range(16, 32)
    assert torch.equal(coreset_of(policy, 1, denoise(0, 1), logits_of(1)), first)
    favoured = situated(residency_bonus=3.0, residents=lambda _layer: resident)
    assert torch.equal(
        coreset_of(policy, 1, denoise(0, 2), logits_of(2)), coreset_of(favoured, 1, denoise(0, 2), logits_of(2))
    )
