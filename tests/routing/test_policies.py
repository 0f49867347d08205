from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.errors import ConfigError
from offload_engine.routing import POLICIES, RouterShape, RoutingOptions, make_policy
from offload_engine.routing.base import group_limited
from offload_engine.routing.coreset import top_p_coreset

GOLDEN = Path(__file__).parent.parent / "golden"
GATE = json.loads((GOLDEN / "gate_256.json").read_text())
LLADA2 = RouterShape(256, 8, 8, 4, True, 2.5)


@pytest.mark.parametrize("case", GATE["cases"], ids=lambda case: f"seed{case['seed']}-p{case['p']}")
def test_dmoe_equals_the_reference_router(case: dict[str, float]) -> None:
    vectors = load_file(GOLDEN / "gate_256.safetensors")
    seed, n, p = case["seed"], case["n"], case["p"]
    policy = make_policy("dmoe", LLADA2, RoutingOptions(top_p=p, min_experts=GATE["guard_size"]))
    decision = policy(vectors[f"logits_{seed}_{n}"], vectors[f"bias_{seed}_{n}"], torch.zeros(int(n), dtype=torch.long))
    assert torch.equal(decision.experts, vectors[f"topk_{seed}_{n}_{p}"].long())
    torch.testing.assert_close(decision.weights, vectors[f"weight_{seed}_{n}_{p}"], rtol=0, atol=1e-6)
    assert decision.coreset is not None
    assert torch.equal(decision.coreset[0], vectors[f"coreset_{seed}_{n}_{p}"].bool())
    assert int(decision.coreset.sum()) == case["coreset"]
    assert decision.experts.unique().numel() == case["unique"]


shapes = st.sampled_from(
    [
        RouterShape(16, 4, 4, 2, True, 2.5),
        RouterShape(16, 4, 1, 1, True, 1.0),
        RouterShape(12, 3, 3, 1, False, 2.0),
        RouterShape(8, 8, 8, 8, True, 1.0),
        RouterShape(4, 1, 2, 2, True, 1.0),
    ]
)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[RouterShape, Tensor, Tensor | None, Tensor]:
    """Few distinct logits, so that ties are everywhere; blocks of any length; pads anywhere."""
    shape = draw(shapes)
    tokens = draw(st.integers(1, 12))
    seed = draw(st.integers(0, 10_000))
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-levels, levels, (tokens, shape.num_experts), generator=generator) / max(1, levels // 2)
    bias = torch.randint(-2, 3, (shape.num_experts,), generator=generator) / 4 if draw(st.booleans()) else None
    block_ids = torch.arange(tokens) // draw(st.integers(1, 12))
    pads = torch.tensor(draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens)))
    return shape, logits, bias, block_ids.where(~pads, -1)


options = st.builds(
    RoutingOptions,
    top_p=st.sampled_from([0.05, 0.4, 0.6, 0.8, 1.0]),
    min_experts=st.integers(1, 20),
    top_k_experts=st.integers(1, 4),
)


@settings(max_examples=80, deadline=None)
@given(inputs(), options, st.sampled_from(sorted(POLICIES)))
def test_every_decision_is_well_formed(
    given_inputs: tuple[RouterShape, Tensor, Tensor | None, Tensor], given_options: RoutingOptions, name: str
) -> None:
    shape, logits, bias, block_ids = given_inputs
    decision = make_policy(name, shape, given_options)(logits, bias, block_ids)
    for token, (experts, weights) in enumerate(zip(decision.experts.tolist(), decision.weights.tolist(), strict=True)):
        real = [expert for expert in experts if expert >= 0]
        assert experts == real + [-1] * (len(experts) - len(real)), "padding comes last"
        assert len(set(real)) == len(real)
        assert all(weight == 0 for weight in weights[len(real) :])
        if block_ids[token] < 0:
            assert not real
            continue
        assert real
        if shape.norm_topk_prob:
            assert sum(weights) == pytest.approx(shape.routed_scaling_factor, rel=1e-5)
        if decision.coreset is not None:
            assert decision.coreset[block_ids[token], real].all(), "an expert outside the coreset"


@settings(max_examples=40, deadline=None)
@given(inputs(), options, st.sampled_from(sorted(POLICIES)))
def test_pads_change_nothing_for_the_others(
    given_inputs: tuple[RouterShape, Tensor, Tensor | None, Tensor], given_options: RoutingOptions, name: str
) -> None:
    shape, logits, bias, block_ids = given_inputs
    policy = make_policy(name, shape, given_options)
    real = block_ids >= 0
    with_pads = policy(logits, bias, block_ids)
    without = policy(logits[real], bias, block_ids[real])
    assert torch.equal(with_pads.experts[real], without.experts)
    torch.testing.assert_close(with_pads.weights[real], without.weights)


@settings(max_examples=40, deadline=None)
@given(inputs(), options)
def test_blocks_do_not_see_each_other(
    given_inputs: tuple[RouterShape, Tensor, Tensor | None, Tensor], given_options: RoutingOptions
) -> None:
    shape, logits, bias, block_ids = given_inputs
    policy = make_policy("dmoe", shape, given_options)
    together = policy(logits, bias, block_ids)
    for block in block_ids.unique().tolist():
        rows = block_ids == block
        alone = policy(logits[rows], bias, block_ids[rows].clamp(max=0))
        assert torch.equal(together.experts[rows], alone.experts)


def by_hand(shape: RouterShape, logits: Tensor, bias: Tensor | None, p: float, least: int) -> RoutingDecision:
    """One block of dMoE, written with loops from REFERENCE §3."""
    scores = logits.sigmoid()
    selection = scores + bias if bias is not None else scores
    votes = torch.zeros(shape.num_experts)
    voted: set[int] = set()
    for row in selection:
        best = sorted(range(shape.num_experts), key=lambda e: (-row[e].item(), e))[: shape.top_k]
        voted |= set(best)
        for expert in best:
            votes[expert] += row[expert]
    shares = votes / votes.sum()
    ranked = sorted(range(shape.num_experts), key=lambda e: (-shares[e].item(), e))
    coreset: list[int] = []
    running = torch.tensor(0.0)
    for expert in ranked:
        if expert in voted and (p >= 1 or running <= p):
            coreset.append(expert)
        running = running + shares[expert]
    coreset = list(dict.fromkeys(coreset + ranked[:least]))
    size = shape.num_experts // shape.n_group
    experts = []
    for row in selection:
        inside = torch.full((shape.num_experts,), -torch.inf)
        inside[coreset] = row[coreset]
        if shape.n_group > 1:
            groups = [
                inside[g * size : (g + 1) * size].sort(descending=True).values[:2].sum() for g in range(shape.n_group)
            ]
            kept = sorted(range(shape.n_group), key=lambda g: (-groups[g].item(), g))[: shape.topk_group]
            limited = inside.clone()
            for group in set(range(shape.n_group)) - set(kept):
                limited[group * size : (group + 1) * size] = -torch.inf
            inside = limited if limited.max() > -torch.inf else inside
        order = sorted(range(shape.num_experts), key=lambda e: (-inside[e].item(), e))[: shape.top_k]
        experts.append([e if inside[e] > -torch.inf else -1 for e in order])
    return RoutingDecision(torch.tensor(experts), torch.empty(0))


@settings(max_examples=40, deadline=None)
@given(inputs(), options)
def test_dmoe_is_the_written_rule(
    given_inputs: tuple[RouterShape, Tensor, Tensor | None, Tensor], given_options: RoutingOptions
) -> None:
    shape, logits, _bias, _ = given_inputs
    one_block = torch.zeros(logits.shape[0], dtype=torch.long)
    decision = make_policy("dmoe", shape, given_options)(logits, None, one_block)
    least = min(given_options.min_experts, shape.num_experts)
    assert torch.equal(decision.experts, by_hand(shape, logits, None, given_options.top_p, least).experts)


def test_ties_go_to_the_lower_index() -> None:
    shape = RouterShape(16, 4, 4, 2)
    for name in POLICIES:
        decision = make_policy(name, shape, RoutingOptions(min_experts=4))(
            torch.zeros(3, 16), None, torch.zeros(3).long()
        )
        assert decision.experts.tolist() == [[0, 1, 2, 3]] * 3, name


def test_p_one_keeps_exactly_the_experts_with_a_vote() -> None:
    votes = torch.tensor([[0.1, 0.0, 0.7, 0.2]]).repeat(1, 50)[:, :128] / 3
    coreset = top_p_coreset(votes, votes > 0, 1.0, 1)
    assert torch.equal(coreset, votes > 0)


def test_the_expert_that_crosses_p_is_kept() -> None:
    votes = torch.tensor([[4.0, 2.0, 1.0, 1.0]])
    for p, kept in ((0.25, 1), (0.5, 2), (0.6, 2), (0.75, 3), (0.8, 3), (0.875, 4)):
        assert int(top_p_coreset(votes, votes > 0, p, 1).sum()) == kept, p


def test_a_token_short_of_experts_uses_fewer_and_is_renormalised() -> None:
    shape = RouterShape(16, 4, 4, 1, True, 2.5)
    logits = torch.full((1, 16), -4.0)
    logits[0, [0, 4, 8, 12]] = torch.tensor([4.0, 3.0, 2.0, 1.0])  # one coreset expert in each group
    decision = make_policy("dmoe", shape, RoutingOptions(top_p=0.9, min_experts=1))(logits, None, torch.zeros(1).long())
    chosen = decision.experts[0]
    assert (chosen >= 0).sum() == 1
    assert decision.weights[0].tolist() == pytest.approx([2.5, 0, 0, 0])


def test_a_groups_score_is_the_sum_of_its_two_best() -> None:
    selection = torch.tensor([[0.9, 0.0, 0.5, 0.5]])
    kept = group_limited(selection, RouterShape(4, 1, 2, 1))
    assert kept.tolist() == [[-torch.inf, -torch.inf, 0.5, 0.5]]


def test_unknown_policy_and_bad_k_are_named() -> None:
    with pytest.raises(ConfigError, match="routing is 'best'; choose one of original, top-k, dmoe"):
        make_policy("best", LLADA2)
    with pytest.raises(ConfigError, match="top_k_experts is 300"):
        make_policy("top-k", LLADA2, RoutingOptions(top_k_experts=300))


def test_top_k_takes_more_than_the_checkpoints_k() -> None:
    decision = make_policy("top-k", LLADA2, RoutingOptions(top_k_experts=20))(
        torch.randn(5, 256), None, torch.zeros(5).long()
    )
    assert decision.experts.shape == (5, 20)
    assert (decision.experts >= 0).all()
