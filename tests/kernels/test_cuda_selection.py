"""The CUDA kernel, on an emulated device, decides as the torch operations do, bit for bit, given the same scores."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_cases import TORCH, Case, adversarial, difference, disagreement
from cuda_emulation import set_order
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import LLADA2, by, routings, same
from torch import Tensor

from offload_engine.kernels import cuda_selection
from offload_engine.kernels.cuda import CudaLibrary
from offload_engine.kernels.cuda_selection import (
    Routed,
    SelectionRule,
    SlotTable,
    count_blocks,
    decide,
    looking_up,
    route_logits,
    route_scores,
)
from offload_engine.routing import RouterShape, RoutingOptions, make_policy
from offload_engine.routing.base import select_scores

Given = tuple[RouterShape, Tensor, Tensor | None, Tensor]

quick = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("case", adversarial(), ids=lambda case: case.name)
def test_it_decides_as_in_torch_where_that_is_hard(emulated: CudaLibrary, case: Case) -> None:
    assert disagreement(emulated, case) is None


@quick
@given(
    given_routing=routings(),
    top_p=st.one_of(st.none(), st.sampled_from([0.1, 0.5, 0.6, 1.0, 1 - 1e-12]), st.floats(0.001, 1.0)),
    least=st.sampled_from([0, 1, 4, 16, 300]),
    order=st.integers(0, 10**6),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_it_decides_as_in_torch(
    emulated: CudaLibrary, given_routing: Given, top_p: float | None, least: int, order: int, absent: float
) -> None:
    shape, logits, bias, block_ids = given_routing
    scores, selection = select_scores(logits, bias)
    case = Case("drawn", shape, scores, selection, block_ids, top_p, least, absent)
    table = case.table()
    set_order(emulated, order)
    routed = route_scores(emulated, case.rule, scores, selection, block_ids, case.blocks, table)
    assert difference(routed, case, table) is None


@quick
@given(given_routing=routings(), order=st.integers(0, 10**6))
def test_from_logits_it_decides_by_scores_that_are_torchs_to_a_few_bits(
    emulated: CudaLibrary, given_routing: Given, order: int
) -> None:
    shape, logits, bias, block_ids = given_routing
    set_order(emulated, order)
    blank = torch.zeros_like(logits)
    sized = Case("drawn", shape, blank, blank, block_ids, least=4)
    table = sized.table()
    routed = route_logits(emulated, sized.rule, logits, bias, block_ids, sized.blocks, table)
    members = block_ids >= 0
    scores, selection = routed.scores[members], routed.selection[members]
    torch.testing.assert_close(scores, logits[members].sigmoid(), rtol=4e-7, atol=1e-38, equal_nan=True)
    assert same(selection, scores if bias is None else scores + bias)
    case = Case("drawn", shape, routed.scores, routed.selection, block_ids, least=4)
    assert difference(routed, case, table) is None


def test_without_a_table_nothing_is_looked_up(emulated: CudaLibrary) -> None:
    scores, ids = torch.rand(6, 256), torch.arange(6) // 3
    rule = SelectionRule(8, LLADA2, 0.6, 16)
    plain = route_scores(emulated, rule, scores, scores, ids, 2)
    full = route_scores(emulated, rule, scores, scores, ids, 2, SlotTable(256, torch.device("cpu")))
    assert plain.lookup is None
    assert all(map(same, plain[:5], full[:5]))


@pytest.mark.parametrize("name", ["original", "top-k", "dmoe"])
def test_policies_ask_it_where_it_is(emulated: CudaLibrary, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make_policy(name, LLADA2, RoutingOptions(top_k_experts=3))
    logits, ids = torch.randn(70, 256, generator=torch.Generator().manual_seed(3)), torch.arange(70) // 32
    wanted = by(TORCH, lambda: policy(logits, None, ids))
    asked: list[SelectionRule] = []
    monkeypatch.setattr(cuda_selection, "library_for", lambda _device: emulated)
    monkeypatch.setattr(cuda_selection, "route_logits", watched(route_logits, asked))
    with torch.inference_mode():
        found = policy(logits, None, ids)
    assert [rule.top_p is None for rule in asked] == [name != "dmoe"]
    assert asked[0].k == (3 if name == "top-k" else 8)
    assert torch.equal(found.experts, wanted.experts), "no two scores are near enough for the sigmoid to matter"
    torch.testing.assert_close(found.weights, wanted.weights, rtol=1e-5, atol=1e-7)
    assert same(found.coreset, wanted.coreset)
    torch.testing.assert_close(found.block_scores, wanted.block_scores, rtol=1e-5, atol=1e-6)


def test_a_table_that_is_shown_is_looked_up_in_and_decides_nothing(
    emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_selection, "library_for", lambda _device: emulated)
    policy = make_policy("dmoe", LLADA2, RoutingOptions())
    logits, ids = torch.randn(64, 256, generator=torch.Generator().manual_seed(5)), torch.arange(64) // 32
    plain = policy(logits, None, ids)
    assert plain.lookup is None
    slots = torch.arange(256, dtype=torch.int32).masked_fill_(torch.arange(256) % 3 == 0, -1)
    finished = torch.zeros(1, dtype=torch.int32)
    with looking_up(SlotTable.over(slots, finished)):
        shown = policy(logits, None, ids)
        with looking_up(SlotTable.over(slots[:100], finished)):
            assert policy(logits, None, ids).lookup is None, "another layer's"
    assert all(same(getattr(shown, name), getattr(plain, name)) for name in ("experts", "weights", "coreset"))
    assert shown.lookup is not None
    used = set(plain.experts.flatten().tolist())
    count, *missing = shown.lookup.missing.tolist()
    assert set(missing[:count]) == {expert for expert in used if expert % 3 == 0}
    assert shown.lookup.scores[:count].tolist() == sorted(shown.lookup.scores[:count].tolist(), reverse=True)
    assert policy(logits, None, ids).lookup is None


def watched(route: Callable[..., Routed], asked: list[SelectionRule]) -> Callable[..., Routed]:
    def asking(library: CudaLibrary, rule: SelectionRule, *rest: object) -> Routed:
        asked.append(rule)
        return route(library, rule, *rest)

    return asking


def test_what_it_does_not_serve_is_left_to_torch(emulated: CudaLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, logits, ids = SelectionRule(2, RouterShape(8, 2)), torch.rand(3, 8), torch.zeros(3, dtype=torch.long)
    assert decide(rule, logits, None, ids) is None, "there is no device"
    monkeypatch.setattr(cuda_selection, "library_for", lambda _device: emulated)
    assert decide(rule, logits, None, ids) is not None
    assert decide(rule, logits.double(), None, ids) is None
    assert decide(rule, logits, torch.zeros(8).double(), ids) is None
    assert decide(rule, logits.clone().requires_grad_(), None, ids) is None
    assert decide(SelectionRule(2, RouterShape(9, 2, 2)), torch.rand(3, 9), None, ids) is None
    assert decide(rule, logits.T.contiguous().T, None, ids) is not None


def test_blocks_are_counted_once_for_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, looked = torch.tensor([0, 2, 2, -1]), []
    largest = torch.Tensor.max
    monkeypatch.setattr(torch.Tensor, "max", lambda tensor: looked.append(1) or largest(tensor))
    assert [count_blocks(ids), count_blocks(ids), count_blocks(ids.clone())] == [3, 3, 3]
    assert len(looked) == 2
    assert count_blocks(torch.tensor([-1, -1])) == 1
    assert count_blocks(torch.tensor([], dtype=torch.long)) == 1


def test_what_it_has_room_for() -> None:
    def fits(experts: int, k: int, groups: int, kept: int = 1) -> bool:
        return SelectionRule(k, RouterShape(experts, k, groups, kept), 0.6, 16).fits(experts)

    assert fits(512, 8, 64)
    assert not fits(513, 8, 1)
    assert not fits(520, 8, 65)
    assert not fits(10, 2, 3)
    assert not fits(8, 0, 1)
    assert not fits(8, 2, 1, kept=0)


def test_what_it_cannot_take_is_refused_by_name(emulated: CudaLibrary) -> None:
    rule, good, ids = SelectionRule(2, RouterShape(8, 2), 0.6, 1), torch.rand(3, 8), torch.zeros(3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"scores: \[3\] on cpu; wanted \[tokens, experts\] on a cpu device"):
        route_scores(emulated, rule, ids, ids, ids, 1)
    with pytest.raises(ValueError, match=r"selection: torch.float64 \[3, 8\] on cpu; wanted torch.float32 \[3, 8\]"):
        route_scores(emulated, rule, good, good.double(), ids, 1)
    with pytest.raises(ValueError, match=r"selection: .*, with gaps; wanted"):
        route_scores(emulated, rule, good, good.T.contiguous().T, ids, 1)
    with pytest.raises(ValueError, match=r"scores: \[3, 8\] on meta; wanted"):
        route_scores(emulated, rule, good.to("meta"), good, ids, 1)
    with pytest.raises(ValueError, match=r"block_ids: torch.int64 \[2\] on cpu; wanted torch.int64 \[3\]"):
        route_scores(emulated, rule, good, good, ids[:2], 1)
    with pytest.raises(ValueError, match=r"bias: torch.float32 \[7\]"):
        route_logits(emulated, rule, good, torch.rand(7), ids, 1)
    with pytest.raises(ValueError, match=r"the slot table: torch.int32 \[9\]"):
        route_scores(emulated, rule, good, good, ids, 1, SlotTable(9, torch.device("cpu")))
    with pytest.raises(ValueError, match="8 experts, 2 of them per token, in 1 groups, 0 blocks don't fit"):
        route_scores(emulated, rule, good, good, ids, 0)
    uneven = SelectionRule(2, RouterShape(8, 2, 3, 1), 0.6, 1)
    with pytest.raises(ValueError, match="in 3 groups"):
        route_scores(emulated, uneven, good, good, ids, 1)
