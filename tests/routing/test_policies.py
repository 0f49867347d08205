from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from offload_engine.errors import ConfigError
from offload_engine.routing import POLICIES, RouterShape, RoutingOptions, make_policy
from offload_engine.routing.base import group_limited
from offload_engine.routing.coreset import top_p_coreset
from tests.routing.routing_oracle import decide, inputs, options

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
@given(inputs(), options, st.sampled_from(sorted(POLICIES)))
def test_blocks_do_not_see_each_other(
    given_inputs: tuple[RouterShape, Tensor, Tensor | None, Tensor], given_options: RoutingOptions, name: str
) -> None:
    shape, logits, bias, block_ids = given_inputs
    policy = make_policy(name, shape, given_options)
    together = policy(logits, bias, block_ids)
    for block in block_ids.unique().tolist():
        rows = block_ids == block
        alone = policy(logits[rows], bias, block_ids[rows].clamp(max=0))
        assert torch.equal(together.experts[rows], alone.experts)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=60, deadline=None)
@given(inputs(), options)
def test_every_policy_is_its_written_rule(
    name: str, given_inputs: tuple[RouterShape, Tensor, Tensor | None, Tensor], given_options: RoutingOptions
) -> None:
    shape, logits, bias, block_ids = given_inputs
    if name == "dmoe" and bias is not None:
        bias = bias.abs()  # of votes below zero no share can be taken
    decision = make_policy(name, shape, given_options)(logits, bias, block_ids)
    experts, coresets = decide(name, shape, given_options, logits, bias, block_ids)
    for found, expected in zip(decision.experts.tolist(), experts, strict=True):
        assert found == expected + [-1] * (len(found) - len(expected))
    weights = logits.sigmoid()
    for found_weights, chosen, row in zip(decision.weights.tolist(), experts, weights.tolist(), strict=True):
        total = sum(row[expert] for expert in chosen) if shape.norm_topk_prob else 1.0
        expected_weights = [row[expert] / total * shape.routed_scaling_factor for expert in chosen]
        assert found_weights == pytest.approx(expected_weights + [0.0] * (len(found_weights) - len(chosen)), rel=1e-5)
    if decision.coreset is not None:
        for block, coreset in coresets.items():
            assert set(decision.coreset[block].nonzero().flatten().tolist()) == coreset
    assert decision.block_scores is not None
    assert (decision.block_scores >= 0).all()
    assert decision.block_scores.isfinite().all()


def test_ties_go_to_the_lower_index() -> None:
    shape = RouterShape(16, 4, 4, 2)
    for name in POLICIES:
        options = RoutingOptions(min_experts=4, des_k=4, des_beta=0.25, expert_capacity=4)
        decision = make_policy(name, shape, options)(torch.zeros(3, 16), None, torch.zeros(3).long())
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


def test_unknown_policy_is_named() -> None:
    known = "original, top-k, dmoe, des-seq, des-vote, block-capacity"
    with pytest.raises(ConfigError, match=f"routing is 'best'; choose one of {known}"):
        make_policy("best", LLADA2)


@pytest.mark.parametrize(
    ("name", "wrong", "complaint"),
    [
        ("top-k", {"top_k_experts": 300}, "top_k_experts is 300, but this model has 256 .* choose 1 to 256"),
        ("des-seq", {"des_k": 257}, "des_k is 257, but this model has 256 .* choose 1 to 256"),
        ("des-seq", {"des_k": 0}, "des_k is 0"),
        ("des-vote", {"des_beta": 0.003}, "des_beta is 0.003, which keeps 0 of this model's 256 .* choose 0.0039 to 1"),
        ("des-vote", {"des_beta": 1.5}, "des_beta is 1.5, which keeps 384"),
        ("block-capacity", {"expert_capacity": 0}, "expert_capacity is 0, wanted at least 1"),
        ("dmoe", {"hold_steps": 0}, "hold_steps is 0, wanted at least 1"),
        ("dmoe", {"residency_bonus": -0.5}, "residency_bonus is -0.5, wanted a number from 0"),
        ("dmoe", {"residency_bonus": float("nan")}, "residency_bonus is nan"),
    ],
)
def test_impossible_parameters_are_named(name: str, wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_policy(name, LLADA2, RoutingOptions(**wrong))


@pytest.mark.parametrize(("beta", "size"), [(0.15, 38), (0.10, 25), (1.0, 256), (0.00390625, 1)])
def test_des_vote_keeps_the_floor_of_its_share(beta: float, size: int) -> None:
    logits = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    decision = make_policy("des-vote", LLADA2, RoutingOptions(des_beta=beta))(logits, None, torch.zeros(32).long())
    assert decision.coreset is not None
    assert int(decision.coreset.sum()) == size


def test_a_share_that_is_whole_but_for_rounding_is_whole() -> None:
    shape = RouterShape(100, 8)
    decision = make_policy("des-vote", shape, RoutingOptions(des_beta=0.29))(
        torch.randn(32, 100), None, torch.zeros(32).long()
    )
    assert decision.coreset is not None
    assert int(decision.coreset.sum()) == 29


def test_des_is_group_limited_and_block_capacity_is_not() -> None:
    logits = torch.full((1, 16), -4.0)
    logits[0, [0, 4, 8, 12]] = torch.tensor([4.0, 3.0, 2.0, 1.0])  # the best of each group
    shape, options = RouterShape(16, 4, 4, 1), RoutingOptions(des_k=4, des_beta=0.25, expert_capacity=4)
    chosen = {
        name: make_policy(name, shape, options)(logits, None, torch.zeros(1).long()).experts[0].tolist()
        for name in ("des-seq", "des-vote", "block-capacity")
    }
    assert chosen == {"des-seq": [0, -1, -1, -1], "des-vote": [0, -1, -1, -1], "block-capacity": [0, 4, 8, 12]}


def test_a_capacity_beyond_the_experts_there_are_is_plain_top_k() -> None:
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    shape, blocks = RouterShape(16, 4, 4, 2), torch.zeros(20).long()
    decision = make_policy("block-capacity", shape, RoutingOptions(expert_capacity=48))(logits, None, blocks)
    ungrouped = make_policy("original", RouterShape(16, 4))(logits, None, blocks)
    assert torch.equal(decision.experts, ungrouped.experts)


def test_gradients_reach_the_router_through_the_weights_alone() -> None:
    for name in POLICIES:
        logits = torch.randn(8, 16, requires_grad=True)
        options = RoutingOptions(des_beta=0.5)
        decision = make_policy(name, RouterShape(16, 4, 4, 2), options)(logits, torch.zeros(16), torch.zeros(8).long())
        assert decision.block_scores is not None
        assert not decision.block_scores.requires_grad
        (gradient,) = torch.autograd.grad((decision.weights * torch.arange(decision.weights.shape[1])).sum(), logits)
        chosen = torch.zeros(8, 17, dtype=torch.bool).scatter_(
            1, decision.experts.where(decision.experts >= 0, 16), True
        )
        assert (gradient[~chosen[:, :16]] == 0).all()
        assert (gradient[chosen[:, :16]] != 0).any()


def test_top_k_takes_more_than_the_checkpoints_k() -> None:
    decision = make_policy("top-k", LLADA2, RoutingOptions(top_k_experts=20))(
        torch.randn(5, 256), None, torch.zeros(5).long()
    )
    assert decision.experts.shape == (5, 20)
    assert (decision.experts >= 0).all()
