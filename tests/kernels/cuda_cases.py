"""What the CUDA kernel has to decide, by torch; cases chosen to trip it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from cuda_emulation import set_order
from selection_cases import LLADA2, by, same
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.executor import ranked_experts
from offload_engine.kernels import cuda_selection
from offload_engine.kernels.cuda import CudaLibrary
from offload_engine.kernels.cuda_selection import ABSENT, UNUSED, Routed, SelectionRule, SlotTable, route_scores
from offload_engine.kernels.library import KernelStatus
from offload_engine.routing import RouterShape
from offload_engine.routing.base import block_votes, choose, choose_inside, group_limited, tally, total
from offload_engine.routing.coreset import top_p_coreset

ONE = torch.zeros(64, dtype=torch.long)
"""Every token in one block."""
TORCH = KernelStatus(None, "torch decides here")


@dataclass(frozen=True, eq=False)
class Case:
    name: str
    shape: RouterShape
    scores: Tensor
    selection: Tensor
    block_ids: Tensor
    top_p: float | None = 0.6
    least: int = 16
    absent: float = 0.5
    """Share of the experts that are in no slot."""
    idle_blocks: int = 0
    """Blocks after the last that has tokens."""
    orders: int = 4
    """Orders of threads to try, the first two and some drawn ones."""

    @property
    def blocks(self) -> int:
        return (max(int(self.block_ids.max()), 0) + 1 if len(self.block_ids) else 1) + self.idle_blocks

    @property
    def rule(self) -> SelectionRule:
        return SelectionRule(self.shape.top_k, self.shape, self.top_p, self.least)

    def table(self) -> SlotTable:
        table = SlotTable(self.shape.num_experts, torch.device("cpu"))
        slots = torch.randperm(self.shape.num_experts, generator=torch.Generator().manual_seed(1)).int()
        table.slots.copy_(slots.masked_fill(slots < self.absent * self.shape.num_experts, ABSENT))
        return table


def unconfined(case: Case) -> RoutingDecision:
    """By those of `routing.TopK`."""
    allowed, pads = group_limited(case.selection, case.shape), case.block_ids < 0
    experts, weights = choose(case.scores, allowed, case.shape.top_k, case.shape, pads)
    wanted, _anyone = tally(case.selection, experts, case.block_ids)
    idle = wanted.new_zeros(case.blocks - len(wanted), wanted.shape[1])
    return RoutingDecision(experts, weights, None, torch.cat([wanted, idle]).clamp(min=0.0))


@lru_cache(maxsize=64)
def decided(case: Case) -> RoutingDecision:
    """By the torch operations of `routing.Coreset`."""

    def decide() -> RoutingDecision:
        if case.top_p is None:
            return unconfined(case)
        votes, voted = block_votes(case.selection, case.block_ids, case.shape.top_k)
        idle = case.blocks - votes.shape[0]
        votes = torch.cat([votes, votes.new_zeros(idle, votes.shape[1])])
        voted = torch.cat([voted, voted.new_zeros(idle, voted.shape[1])])
        coreset = top_p_coreset(votes, voted, case.top_p, case.least)
        experts, weights = choose_inside(case.scores, case.selection, coreset, case.block_ids, case.shape)
        return RoutingDecision(experts, weights, coreset, votes.clamp(min=0.0))

    decision = by(TORCH, decide)
    assert isinstance(decision, RoutingDecision)
    return decision


def difference(routed: Routed, case: Case, table: SlotTable) -> str | None:
    """What is not as torch decides, bit for bit; None if all is."""
    wanted = decided(case)
    for name in ("experts", "weights", "coreset", "block_scores"):
        if not same(getattr(routed, name), getattr(wanted, name)):
            return f"{name}: {getattr(routed, name)} is not {getattr(wanted, name)}"
    used = torch.zeros_like(routed.used)
    for experts, block in zip(wanted.experts, case.block_ids, strict=True):
        used[block.clamp(min=0), experts[experts >= 0]] = True
    ranked, scores = by(TORCH, lambda: ranked_experts(wanted))
    missing = [expert for expert in ranked if table.slots[expert] == ABSENT]
    sums = [score for expert, score in zip(ranked, scores, strict=True) if table.slots[expert] == ABSENT]
    sums += [0.0] * (case.shape.num_experts - len(sums))
    missing = [len(missing), *missing] + [-1] * (case.shape.num_experts - len(missing))
    slots = table.slots.where(used.any(0), torch.tensor(UNUSED, dtype=torch.int32))
    assert routed.lookup is not None
    if not torch.equal(routed.used, used):
        return f"used: {routed.used} is not {used}"
    if routed.lookup.missing.tolist() != missing:
        return f"missing: {routed.lookup.missing.tolist()} is not {missing}"
    if routed.lookup.scores.tolist() != sums:
        return f"scores of the missing: {routed.lookup.scores.tolist()} is not {sums}"
    if not torch.equal(routed.lookup.slots, slots):
        return f"slots: {routed.lookup.slots} is not {slots}"
    return None if table.finished.item() == 0 else f"the count of thread blocks stays at {table.finished.item()}"


@contextmanager
def garbage_in_outputs() -> Iterator[None]:
    """They don't hold what the launch before wrote."""
    outputs = cuda_selection._outputs

    def filled(*given: Any) -> Routed:
        routed = outputs(*given)
        for tensor in (*routed[:5], *(routed.lookup or ())):
            if tensor is not None:
                tensor.view(torch.uint8).fill_(1)
        return routed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_selection, "_outputs", filled)
        yield


def disagreement(library: CudaLibrary, case: Case) -> str | None:
    """What the kernel decides otherwise than torch in one of the case's orders; with two launches each, for what the
    first leaves to the second.
    """
    table = case.table()
    for order in sorted([*range(case.orders)] * 2):
        set_order(library, order)
        with garbage_in_outputs():
            routed = route_scores(library, case.rule, case.scores, case.selection, case.block_ids, case.blocks, table)
        found = difference(routed, case, table)
        if found:
            return f"{case.name}, order {order}: {found}"
    return None


def _drawn(seed: int, tokens: int, shape: RouterShape = LLADA2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, shape.num_experts, generator=generator) * 2).sigmoid()


def _where_the_last_bit_decides(seed: int) -> Case:
    """top_p is exactly what the coreset's first 30 hold, in the order in which they are added."""
    scores, ids = _drawn(seed, 32), torch.zeros(32, dtype=torch.long)
    votes, _voted = by(TORCH, lambda: block_votes(scores, ids, 8))
    before = (votes / total(votes, -1)).sort(descending=True, stable=True).values.cumsum(-1)[0, 30]
    return Case(f"last bit {seed}", LLADA2, scores, scores, ids, float(before), 1)


def _last_bits() -> Iterator[Case]:
    yield from map(_where_the_last_bit_decides, range(3))
    # The total is 1 only if added in double from the first, and 1 + 2^-22 only if not in float32.
    shape, below_one = RouterShape(8, 8, 1, 1, True, 1.0), 1 - 2.0**-24
    lost_at_the_end = torch.tensor([[1.0, 2.0**-24, *[2.0**-54] * 4, 0.0, 0.0]])
    yield _alike("the order of the total", lost_at_the_end, shape=shape, top_p=below_one, least=0)
    lost_in_float32 = torch.tensor([[1.0, *[2.0**-24] * 4, 0.0, 0.0, 0.0]])
    yield _alike("the precision of the total", lost_in_float32, shape=shape, top_p=below_one, least=0)


def _alike(name: str, scores: Tensor, block_ids: Tensor = ONE, shape: RouterShape = LLADA2, **options: Any) -> Case:
    """Without a bias."""
    return Case(name, shape, scores, scores, block_ids[: len(scores)], **options)


def adversarial() -> list[Case]:
    """What goes wrong in such kernels, or could."""
    confined = [*_blocks(), *_numbers(), *_routers(), *_last_bits()]
    return [*confined, *_unconfined(confined)]


def _unconfined(cases: list[Case]) -> Iterator[Case]:
    """The same, without coresets."""
    for case in cases:
        if not case.name.startswith("last bit"):
            yield replace(case, name=f"{case.name}, no coreset", top_p=None)
    # Nothing but -inf in the groups that are kept, for a group with one expert is worth no more: there is no choice.
    barred = torch.full((3, 16), -torch.inf)
    barred[:, 13] = 1.0
    shape = RouterShape(16, 4, 4, 2, False, 1.0)
    yield _alike("groups of nothing", barred, shape=shape, top_p=None)


def _blocks() -> Iterator[Case]:
    yield _alike("a block", _drawn(0, 32))
    bias = torch.randn(256, generator=torch.Generator().manual_seed(9)) * 0.3
    yield Case("three blocks, a bias", LLADA2, _drawn(1, 96), _drawn(1, 96) + bias, torch.arange(96) // 32)
    yield _alike("blocks in disorder, some idle", _drawn(2, 70), torch.arange(70) * 7 % 3, idle_blocks=2)
    yield _alike("pads", _drawn(3, 40), torch.tensor([-1, 0, 1, -1] * 10))
    yield _alike("only pads", _drawn(3, 40), torch.full((40,), -1))
    yield _alike("no token", _drawn(3, 0))
    yield _alike("one token", _drawn(4, 1), least=1)
    yield _alike("all in a slot", _drawn(15, 32), absent=0.0)
    yield _alike("blocks that race", _drawn(18, 4), torch.arange(4), absent=0.0, orders=100)
    yield _alike("none in a slot", _drawn(16, 64), torch.arange(64) // 32, absent=1.0)


def _numbers() -> Iterator[Case]:
    yield _alike("all equal", torch.full((32, 256), 0.5))
    yield _alike("all zero", torch.zeros(32, 256), least=3)
    ties = (_drawn(5, 64) * 4).round() / 4
    yield Case("ties", LLADA2, ties, ties - 0.25, torch.arange(64) // 32)
    yield _alike("two zeros", torch.where(_drawn(11, 32) > 0.5, 0.0, -0.0), least=20)
    strange = _drawn(10, 32)
    strange[3, 7], strange[4, 9], strange[5] = torch.nan, torch.inf, -torch.inf
    yield _alike("NaN and infinities", strange, absent=1.0)
    yield _alike("NaN, and all of the votes", strange, top_p=1.0)
    yield _alike("all NaN", torch.full((32, 256), torch.nan))
    yield _alike("negative votes", _drawn(12, 32) - 2.0)
    yield _alike("votes for and against", _drawn(12, 32) - 0.97)
    yield _alike("denormal votes", _drawn(13, 32) * 1e-41, least=2)
    yield _alike("all of the votes", _drawn(14, 32), top_p=1.0, least=0)


def _routers() -> Iterator[Case]:
    yield _alike("no groups", _drawn(6, 32), shape=RouterShape(256, 8, 1, 1, True, 1.0))
    eight = RouterShape(8, 3, 8, 2, True, 0.1)
    yield _alike("groups of one", _drawn(7, 9, eight), shape=eight, least=4)
    six = RouterShape(6, 9, 2, 5, True, 1.0)
    yield _alike("k above the experts", _drawn(8, 5, six), shape=six)
    twelve = RouterShape(12, 12, 3, 1, True, 2.0)
    yield _alike("k above what the groups hold", _drawn(19, 9, twelve), shape=twelve, least=4)
    sixteen = RouterShape(16, 4, 4, 2, False, 1 / 3)
    yield _alike("weights as they are", _drawn(9, 12, sixteen), shape=sixteen)
    # A coreset of one: no group has two of it, so that all are worth the same, and the first ones don't hold it.
    stranding = torch.full((12, 16), 0.01)
    stranding[:, 15] = 0.9
    yield _alike("stranded", stranding, shape=sixteen, top_p=0.05, least=1)
    wide = RouterShape(512, 8, 64, 20, True, 1.0)
    yield _alike("as many as there is room for", _drawn(17, 40, wide), shape=wide)
