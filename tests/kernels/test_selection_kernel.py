"""The C kernels decide as the torch operations do, bit for bit, whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import LLADA2, STRANGE, by, routings, same
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.experts.ranked import ranked_experts, standing
from offload_engine.kernels import selection
from offload_engine.kernels.library import Library, choose
from offload_engine.routing import POLICIES, Coreset, RouterShape, RoutingOptions, RoutingPolicy, TopK, make_policy
from offload_engine.routing.base import block_votes, choose_inside, total

quick = settings(deadline=None, max_examples=120)


def agree(library: Library, policy: RoutingPolicy, logits: Tensor, bias: Tensor | None, block_ids: Tensor) -> None:
    plain = by(choose(library, "off"), lambda: policy(logits, bias, block_ids))
    fast = by(choose(library, "auto"), lambda: policy(logits, bias, block_ids))
    for name in ("experts", "weights", "coreset", "block_scores"):
        found, wanted = getattr(fast, name), getattr(plain, name)
        assert same(found, wanted), f"{name}: {found} is not {wanted}"
    assert by(choose(library, "auto"), lambda: ranked_experts(fast)) == by(
        choose(library, "off"), lambda: ranked_experts(plain)
    )


@settings(quick, max_examples=400)
@given(
    given_routing=routings(),
    top_p=st.one_of(st.sampled_from([0.1, 0.5, 0.6, 1.0, 1 - 1e-12]), st.floats(0.001, 1.0)),
    least=st.sampled_from([0, 1, 4, 16, 300]),
)
def test_dmoe_decides_as_in_torch(
    library: Library, given_routing: tuple[RouterShape, Tensor, Tensor | None, Tensor], top_p: float, least: int
) -> None:
    shape, logits, bias, block_ids = given_routing
    agree(library, Coreset(shape, top_p, least), logits, bias, block_ids)


@settings(quick, max_examples=300)
@given(seed=st.integers(0, 10**6), rank=st.integers(1, 60))
def test_where_the_last_bit_of_a_sum_decides(library: Library, seed: int, rank: int) -> None:
    """`top_p` is what some expert's predecessors hold, or the float32 next to it."""
    generator = torch.Generator().manual_seed(seed)
    logits, block_ids = torch.randn(32, 256, generator=generator), torch.zeros(32, dtype=torch.long)
    votes, _voted = by(choose(library, "off"), lambda: block_votes(logits.sigmoid(), block_ids, 8))
    before = (votes / total(votes, -1)).sort(descending=True).values.cumsum(-1)[0, rank]
    for top_p in (before, before.nextafter(torch.tensor(0.0)), before.nextafter(torch.tensor(1.0))):
        agree(library, Coreset(LLADA2, float(top_p), 1), logits, None, block_ids)


def test_without_a_coreset_a_token_whose_groups_hold_nothing_stays_without(library: Library) -> None:
    bias = torch.full((8,), -torch.inf)
    bias[6] = 0.0  # alone in its group, which therefore is worth no more than the first
    policy, ids = TopK(RouterShape(8, 2, 4, 1), 2), torch.zeros(3, dtype=torch.long)
    agree(library, policy, torch.randn(3, 8), bias, ids)
    assert (policy(torch.randn(3, 8), bias, ids).experts == -1).all()


@settings(quick, max_examples=200)
@given(given_routing=routings(), k=st.sampled_from([1, 4, 8, 20, 64, 65]))
def test_top_k_decides_as_in_torch(
    library: Library, given_routing: tuple[RouterShape, Tensor, Tensor | None, Tensor], k: int
) -> None:
    shape, logits, bias, block_ids = given_routing
    agree(library, TopK(shape, k), logits, bias, block_ids)


@pytest.mark.parametrize("name", sorted(POLICIES))
@quick
@given(given_routing=routings())
def test_every_policy_decides_as_in_torch(
    library: Library, name: str, given_routing: tuple[RouterShape, Tensor, Tensor | None, Tensor]
) -> None:
    shape, logits, bias, block_ids = given_routing
    options = RoutingOptions(top_k_experts=1, des_k=1, des_beta=1.0, min_experts=4, residency_bonus=0.5)
    agree(library, make_policy(name, shape, options), logits, bias, block_ids)


@quick
@given(given_routing=routings(), share=st.sampled_from([0.0, 0.02, 0.2, 1.0]), limit=st.booleans())
def test_any_coreset_confines_as_in_torch(
    library: Library, given_routing: tuple[RouterShape, Tensor, Tensor | None, Tensor], share: float, limit: bool
) -> None:
    """Coresets below k, empty ones, and ones that strand a token outside its groups."""
    shape, scores, bias, block_ids = given_routing
    values = scores if bias is None else scores + bias
    coreset = torch.rand(81, shape.num_experts, generator=torch.Generator().manual_seed(0)) < share
    found, wanted = (
        by(
            choose(library, kernel),
            lambda: choose_inside(scores, values, coreset, block_ids, shape, limit_groups=limit),
        )
        for kernel in ("auto", "off")
    )
    assert all(map(same, found, wanted))


@quick
@given(
    blocks=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    strange=st.sampled_from(STRANGE),
    chosen=st.lists(st.integers(-1, 15), max_size=60),
)
def test_experts_rank_as_in_torch(library: Library, blocks: int, seed: int, strange: float, chosen: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(blocks, 16, generator=generator)
    scores = scores.masked_fill(torch.rand(blocks, 16, generator=generator) < 0.1, strange)
    decision = RoutingDecision(torch.tensor(chosen, dtype=torch.long)[:, None], torch.empty(0), None, scores)
    for told in (ranked_experts, lambda one: standing(one, ForwardInfo(Phase.DENOISE))):
        found, wanted = (by(choose(library, kernel), lambda: told(decision)) for kernel in ("auto", "off"))  # noqa: B023
        assert found == wanted


def serves(library: Library, *scores: Tensor, ids: Tensor, k: int = 2, router: RouterShape | None = None) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "status", lambda: choose(library, "auto"))
        return selection.serves(ids, k, router, *scores)


def test_only_what_it_can_take_is_taken(library: Library) -> None:
    good, ids = torch.rand(3, 8), torch.zeros(3, dtype=torch.long)
    assert serves(library, good, good, ids=ids, router=RouterShape(8, 2, 4, 2))
    assert not by(choose(library, "off"), lambda: selection.serves(ids, 2, None, good))
    assert not serves(library, good, good.double(), ids=ids)
    assert not serves(library, good.T.contiguous().T, ids=ids)
    assert not serves(library, good.to("meta"), ids=ids)
    assert not serves(library, good, good[:2], ids=ids)
    assert not serves(library, good, ids=ids[:2])
    assert not serves(library, good, ids=ids.int())
    assert not serves(library, good, ids=torch.zeros(6, dtype=torch.long)[::2])
    assert not serves(library, torch.rand(3, 1025), ids=ids)
    assert not serves(library, good, ids=ids, k=65)
    assert not serves(library, good, ids=ids, router=RouterShape(8, 2, 3, 2))
    wanted = torch.rand(3, 8, requires_grad=True)
    assert not serves(library, wanted, good, ids=ids)
    with torch.no_grad():
        assert serves(library, wanted, good, ids=ids)


def test_what_would_be_out_of_bounds_is_refused(library: Library) -> None:
    scores, router = torch.rand(2, 8), RouterShape(8, 2)
    kernel = choose(library, "auto")
    ids, coreset = torch.tensor([0, 3]), torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(IndexError, match="block 3 has no row in a coreset of 2"):
        by(kernel, lambda: selection.choose_inside(scores, scores, coreset, ids, 2, router))
    with pytest.raises(ValueError, match=r"coreset is torch.bool \[2, 7\] on cpu, wanted bool \[B, 8\]"):
        by(kernel, lambda: selection.choose_inside(scores, scores, coreset[:, :7], ids, 2, router))
    with pytest.raises(ValueError, match="8 experts, 2 of them per token, in 9 groups don't fit"):
        by(kernel, lambda: selection.route(scores, scores, ids, 2, RouterShape(8, 2, 9, 2)))
    with pytest.raises(IndexError, match="beyond the 8 that block scores name"):
        by(kernel, lambda: selection.ranked(torch.tensor([[0, 8]]), scores))
    with pytest.raises(ValueError, match="no kernel is in use"):
        by(choose(library, "off"), lambda: selection.vote(scores, torch.tensor([0, 0]), 2))


def test_a_torch_path_remains_for_gradients(library: Library) -> None:
    logits, ids = torch.randn(4, 256), torch.zeros(4, dtype=torch.long)
    policy = Coreset(LLADA2, 0.6, 16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "status", lambda: choose(library, "auto"))
        decision = policy(logits.clone().requires_grad_(), None, ids)
        assert decision.weights.requires_grad
        assert same(decision.weights.detach(), policy(logits, None, ids).weights)
