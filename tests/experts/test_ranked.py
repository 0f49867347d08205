from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import BlockPass, ForwardInfo, Phase, RoutingDecision
from offload_engine.experts.ranked import ranked_experts, standing
from offload_engine.experts.scheduling.outlook import FURTHEST

EXPERTS = 48
TOKENS = 3
"""Of a block."""


def falling(votes: list[float], experts: set[int]) -> list[int]:
    return sorted(experts, key=lambda expert: (-votes[expert], expert))


@given(
    phases=st.lists(st.sampled_from([Phase.DENOISE, Phase.COMMIT]), min_size=1, max_size=3),
    seed=st.integers(0, 10**6),
    voted=st.sampled_from([0.2, 1.0]),
)
def test_what_goes_on_counts_for_the_next_forward_and_everything_for_this_one(
    phases: list[Phase], seed: int, voted: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(-1, EXPERTS, (len(phases) * TOKENS, 2), generator=generator)
    votes = torch.randint(0, 8, (len(phases), EXPERTS), generator=generator) / 4  # exact in every order of addition
    votes *= torch.rand(votes.shape, generator=generator) < voted
    info = ForwardInfo.of([BlockPass(phase, lane, 0, 0, TOKENS) for lane, phase in enumerate(phases)])
    stand = standing(RoutingDecision(chosen, torch.ones(chosen.shape), None, votes), info)

    sums = votes.sum(0).tolist()
    ran = {expert for expert in chosen.flatten().tolist() if expert >= 0}
    assert stand.ranked.experts == falling(sums, ran)
    assert stand.ranked.scores == [sums[expert] for expert in stand.ranked.experts]

    goes_on = [phase is Phase.DENOISE for phase in phases]
    rows = torch.tensor(goes_on if any(goes_on) else [True] * len(phases))
    kept = {expert for expert in chosen[rows.repeat_interleave(TOKENS)].flatten().tolist() if expert >= 0}
    assert stand.learned.experts == falling(sums, kept)
    assert stand.outlook.chosen == stand.learned.experts
    left = votes[rows].sum(0).tolist()
    others = {expert for expert in range(EXPERTS) if left[expert] > 0} - kept
    assert list(stand.outlook.runners_up) == falling(left, others)[:FURTHEST]


def test_without_votes_experts_are_equals_and_nobody_comes_next() -> None:
    decision = RoutingDecision(torch.tensor([[3, 1], [-1, 3]]), torch.ones(2, 2))
    stand = standing(decision, ForwardInfo(Phase.DENOISE))
    assert stand.ranked == ranked_experts(decision) == ([1, 3], [1.0, 1.0])
    assert not stand.outlook.runners_up
