"""REFERENCE §3 with loops: what each policy should decide, token by token; and inputs to ask it about."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.routing import RouterShape, RoutingOptions

Row = list[float]
Ranking = list[int]

shapes = st.sampled_from(
    [
        RouterShape(16, 4, 4, 2, True, 2.5),
        RouterShape(16, 4, 1, 1, True, 1.0),
        RouterShape(12, 3, 3, 1, False, 2.0),
        RouterShape(8, 8, 8, 8, True, 1.0),
        RouterShape(8, 2, 8, 2, True, 1.0),
        RouterShape(4, 1, 2, 2, True, 1.0),
    ]
)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[RouterShape, Tensor, Tensor | None, Tensor]:
    """Few distinct logits, so that ties are everywhere; blocks of any length, the last cut short; pads anywhere."""
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
    des_k=st.integers(1, 4),
    des_beta=st.sampled_from([0.25, 0.3, 0.5, 1.0]),
    expert_capacity=st.integers(1, 20),
)


def ranked(scores: Row) -> Ranking:
    """All experts, best first; ties to the lower index."""
    return sorted(range(len(scores)), key=lambda expert: (-scores[expert], expert))


def float32_sum(values: Iterable[float]) -> float:
    """One after the other, rounded each time, as a float32 accumulator does."""
    total = torch.tensor(0.0)
    for value in values:
        total = total + value
    return float(total)


def votes_of(rows: list[Row], k: int) -> tuple[Row, set[int]]:
    """What every token's k best experts gather, and who they are."""
    ballots = [ranked(row)[:k] for row in rows]
    sums = [
        float32_sum(row[expert] for row, ballot in zip(rows, ballots, strict=True) if expert in ballot)
        for expert in range(len(rows[0]))
    ]
    return sums, set().union(*ballots)


def dmoe(rows: list[Row], shape: RouterShape, given: RoutingOptions) -> set[int]:
    sums, voted = votes_of(rows, shape.top_k)
    votes = torch.tensor(sums)
    shares = (votes / votes.sum()).tolist()
    order, coreset, running = ranked(shares), set(), torch.tensor(0.0)
    for expert in order:
        if expert in voted and (given.top_p >= 1 or running <= given.top_p):
            coreset.add(expert)
        running = running + shares[expert]
    return coreset | set(order[: given.min_experts])


def des_seq(rows: list[Row], shape: RouterShape, given: RoutingOptions) -> set[int]:
    return {expert for row in rows for expert in ranked(row)[: given.des_k]}


def des_vote(rows: list[Row], shape: RouterShape, given: RoutingOptions) -> set[int]:
    sums, _voted = votes_of(rows, shape.top_k)
    return set(ranked(sums)[: int(given.des_beta * shape.num_experts)])


def block_capacity(rows: list[Row], shape: RouterShape, given: RoutingOptions) -> set[int]:
    best = [max(row[expert] for row in rows) for expert in range(shape.num_experts)]
    return set(ranked(best)[: given.expert_capacity])


CORESETS: dict[str, Callable[[list[Row], RouterShape, RoutingOptions], set[int]]] = {
    "dmoe": dmoe,
    "des-seq": des_seq,
    "des-vote": des_vote,
    "block-capacity": block_capacity,
}
"""By policy: the coreset of a block's rows of selection scores."""


def in_best_groups(row: Row, allowed: set[int], shape: RouterShape) -> set[int]:
    """Those of `allowed` in the best groups; all of them if those groups hold none."""
    size = shape.num_experts // shape.n_group
    groups = [range(group * size, (group + 1) * size) for group in range(shape.n_group)]

    def worth(group: range) -> float:
        best = sorted((row[expert] if expert in allowed else -torch.inf for expert in group), reverse=True)
        return float32_sum(best[:2])

    kept = ranked([worth(group) for group in groups])[: shape.topk_group]
    return {expert for group in kept for expert in groups[group] if expert in allowed} or allowed


def decide(
    name: str, shape: RouterShape, given: RoutingOptions, logits: Tensor, bias: Tensor | None, block_ids: Tensor
) -> tuple[list[Ranking], dict[int, set[int]]]:
    """Each token's experts, best first (none for a pad), and the coreset of each block that has tokens."""
    scores = logits.sigmoid()
    rows: list[Row] = (scores if bias is None else scores + bias).tolist()
    blocks: list[int] = block_ids.tolist()
    everyone = set(range(shape.num_experts))
    coresets = {}
    for block in set(blocks) - {-1}:
        members = [row for row, own in zip(rows, blocks, strict=True) if own == block]
        coresets[block] = CORESETS[name](members, shape, given) if name in CORESETS else everyone
    k = given.top_k_experts if name == "top-k" else shape.top_k
    experts: list[Ranking] = []
    for row, block in zip(rows, blocks, strict=True):
        allowed = set() if block < 0 else coresets[block]
        if allowed and name != "block-capacity":
            allowed = in_best_groups(row, allowed, shape)
        experts.append([expert for expert in ranked(row) if expert in allowed][:k])
    return experts, coresets
