"""The CUDA kernel, on an emulated device, decides as the torch operations do, bit for bit, given the same scores."""

from __future__ import annotations

import pytest
import torch
from cuda_cases import Case, adversarial, difference, disagreement
from cuda_emulation import set_order
from hypothesis import given, settings
from hypothesis import strategies as st
from selection_cases import LLADA2, routings, same
from torch import Tensor

from offload_engine.kernels.cuda import CudaLibrary
from offload_engine.kernels.cuda_selection import CoresetRule, SlotTable, route_logits, route_scores
from offload_engine.routing import RouterShape
from offload_engine.routing.base import select_scores

Given = tuple[RouterShape, Tensor, Tensor | None, Tensor]

quick = settings(deadline=None, max_examples=60)


@pytest.mark.parametrize("case", adversarial(), ids=lambda case: case.name)
def test_it_decides_as_in_torch_where_that_is_hard(emulated: CudaLibrary, case: Case) -> None:
    assert disagreement(emulated, case) is None


@quick
@given(
    given_routing=routings(),
    top_p=st.one_of(st.sampled_from([0.1, 0.5, 0.6, 1.0, 1 - 1e-12]), st.floats(0.001, 1.0)),
    least=st.sampled_from([0, 1, 4, 16, 300]),
    order=st.integers(0, 10**6),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_it_decides_as_in_torch(
    emulated: CudaLibrary, given_routing: Given, top_p: float, least: int, order: int, absent: float
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
    rule = CoresetRule(8, LLADA2, 0.6, 16)
    plain = route_scores(emulated, rule, scores, scores, ids, 2)
    full = route_scores(emulated, rule, scores, scores, ids, 2, SlotTable(256, torch.device("cpu")))
    assert plain.lookup is None
    assert all(map(same, plain[:5], full[:5]))


def test_what_it_has_room_for() -> None:
    def fits(experts: int, k: int, groups: int, kept: int = 1) -> bool:
        return CoresetRule(k, RouterShape(experts, k, groups, kept), 0.6, 16).fits(experts)

    assert fits(512, 8, 64)
    assert not fits(513, 8, 1)
    assert not fits(520, 8, 65)
    assert not fits(10, 2, 3)
    assert not fits(8, 0, 1)
    assert not fits(8, 2, 1, kept=0)


def test_what_it_cannot_take_is_refused_by_name(emulated: CudaLibrary) -> None:
    rule, good, ids = CoresetRule(2, RouterShape(8, 2), 0.6, 1), torch.rand(3, 8), torch.zeros(3, dtype=torch.long)
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
    uneven = CoresetRule(2, RouterShape(8, 2, 3, 1), 0.6, 1)
    with pytest.raises(ValueError, match="in 3 groups"):
        route_scores(emulated, uneven, good, good, ids, 1)
