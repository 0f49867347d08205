"""The CUDA kernel for expert selection on the GPU at hand: the emulation draws the order of threads, this is theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from offload_engine.routing import RouterShape, make_policy
from offload_engine.routing.base import block_votes, choose, choose_inside, group_limited, tally
from offload_engine.routing.coreset import top_p_coreset
from tests.gpu.conftest import never_waiting

libraries = pytest.importorskip("offload_engine.kernels.cuda")
selection = pytest.importorskip("offload_engine.kernels.cuda_selection")

LLADA2 = RouterShape(256, 8, 8, 4, True, 2.5)
SHAPES = {
    "llada2": LLADA2,
    "one group": RouterShape(256, 8, 1, 1, True, 1.0),
    "few": RouterShape(16, 4, 4, 2, False, 0.5),
}


@pytest.fixture
def library(cuda: torch.device) -> Any:
    status = libraries.status(cuda.index)
    if status.library is None:
        pytest.skip(status.reason)
    return status.library


def same(found: Tensor, wanted: Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(found.cpu().contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("levels", [0, 4, 1], ids=["random", "ties", "all equal"])
@pytest.mark.parametrize("tokens", [1, 32, 96])
def test_the_gpu_decides_as_torch_on_the_cpu(
    library: Any, cuda: torch.device, name: str, levels: int, tokens: int
) -> None:
    shape = SHAPES[name]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.randn(tokens, shape.num_experts, generator=generator).mul_(2.0).sigmoid()
        if levels:
            scores = scores.mul_(levels).round_().div_(levels) if levels > 1 else torch.full_like(scores, 0.5)
        biased = scores + (torch.randn(shape.num_experts, generator=generator) * 0.05 if not levels else 0.0)
        ids = torch.arange(tokens) // 32
        blocks = int(ids.max()) + 1
        votes, voted = block_votes(biased, ids, shape.top_k)
        coreset = top_p_coreset(votes, voted, 0.6, 4)
        experts, weights = choose_inside(scores, biased, coreset, ids, shape)
        rule = selection.SelectionRule(shape.top_k, shape, 0.6, 4)
        table = selection.SlotTable(shape.num_experts, cuda)
        table.slots[::2] = torch.arange(len(table.slots[::2]), dtype=torch.int32, device=cuda)
        routed = selection.route_scores(library, rule, scores.to(cuda), biased.to(cuda), ids.to(cuda), blocks, table)
        assert same(routed.experts, experts)
        assert same(routed.weights, weights)
        assert same(routed.coreset, coreset)
        assert same(routed.block_scores, votes.clamp(min=0.0))
        used = set(experts[experts >= 0].tolist())
        count, *missing = routed.lookup.missing.tolist()
        assert set(missing[:count]) == {expert for expert in used if expert % 2}
        free = selection.SelectionRule(shape.top_k, shape)
        routed = selection.route_scores(library, free, scores.to(cuda), biased.to(cuda), ids.to(cuda), blocks)
        experts, weights = choose(scores, group_limited(biased, shape), shape.top_k, shape, ids < 0)
        assert same(routed.experts, experts)
        assert same(routed.weights, weights)
        assert same(routed.block_scores, tally(biased, experts, ids)[0].clamp(min=0.0))


@pytest.mark.parametrize("name", ["original", "dmoe"])
def test_policies_ask_the_kernel_and_the_host_waits_once_a_forward(library: Any, cuda: torch.device, name: str) -> None:
    policy = make_policy(name, LLADA2)
    ids, logits = torch.arange(64, device=cuda) // 32, torch.randn(64, 256, device=cuda)
    policy(logits, None, ids)  # which counts the blocks
    with never_waiting():
        decision = policy(logits, None, ids)
    assert decision.block_scores is not None
    assert decision.block_scores.shape == (2, 256)
    rule = selection.SelectionRule(8, LLADA2, None if name == "original" else 0.6, 16)
    assert same(selection.route_logits(library, rule, logits, None, ids, 2).experts, decision.experts.cpu())
