"""Does a router's weight say how much its expert matters? (paper §4.1, Observation A, Fig. 3a)

One block of an answer is masked in part, everything before it stands, and the model reconstructs the masked tokens, as
in a denoising step. Then one expert's output is left out for one token in one layer, and the step is computed again: by
how much did the loss grow?
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.engine.engine import Engine
from offload_engine.model.attention import MaskedSequence, block_causal_mask
from offload_engine.model.llada2 import Forward
from offload_engine.model.moe import Beside, Decide, ExpertExecutor, Preview, nothing
from tools.analysis import seam

NOISE = (0.3, 0.8)
"""Share of the answer's tokens masked, drawn uniformly: the range of dMoE's training (paper §5.1)."""


class Case(NamedTuple):
    """One expert left out in one layer."""

    layer: int
    expert: int
    tokens: tuple[int, ...]
    """Positions for which it is left out."""
    weight: float
    """The router's weight for it, summed over `tokens`, in units in which a token's weights add up to 1."""


class Effect(NamedTuple):
    """What leaving an expert out did."""

    case: Case
    increase: float
    """Growth of the mean cross-entropy (nats) of the masked tokens concerned."""


@dataclass(frozen=True, slots=True)
class Masked:
    """A sequence whose last block is partly masked."""

    ids: tuple[int, ...]
    """Up to the end of the block; the mask id where masked."""
    targets: dict[int, int]
    """Masked position -> the token it hides."""
    block_length: int


def mask_block(
    prompt: Sequence[int], answer: Sequence[int], mask_id: int, block_length: int, rng: random.Random
) -> Masked:
    """Hide a share of one block's answer tokens; which block, share and tokens `rng` says. `answer` holds a token."""
    ids = [*prompt, *answer]
    block = rng.randint(len(prompt) // block_length, (len(ids) - 1) // block_length)
    start, end = block * block_length, min((block + 1) * block_length, len(ids))
    own = range(max(start, len(prompt)), end)
    hidden = rng.sample(own, max(1, round(rng.uniform(*NOISE) * len(own))))
    shown = [mask_id if place in set(hidden) else token for place, token in enumerate(ids[:end])]
    return Masked(tuple(shown), {place: ids[place] for place in sorted(hidden)}, block_length)


class _LeavingOut:
    """An `ExpertExecutor` for several copies of one sequence, each with an expert left out: row i lacks `cases[i]`.

    The weight of what is left out becomes 0; the other experts keep theirs.
    """

    def __init__(self, experts: ExpertExecutor, cases: Sequence[Case | None], length: int) -> None:
        self.experts, self.cases, self.length = experts, cases, length
        self.decisions: dict[int, RoutingDecision] = {}
        """Layer -> what the router decided, nothing left out."""

    def begin(self, info: ForwardInfo) -> None:
        self.experts.begin(info)

    def prepare(self, layer: int, preview: Preview) -> None:
        self.experts.prepare(layer, preview)

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:
        return self.experts.route(layer, hidden, decide)

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:
        self.decisions[layer] = decision
        weights = decision.weights.clone()
        for row, case in enumerate(self.cases):
            if case is not None and case.layer == layer:
                places = torch.tensor(case.tokens) + row * self.length
                weights[places] = weights[places].masked_fill(decision.experts[places] == case.expert, 0.0)
        return self.experts.run(layer, hidden, replace(decision, weights=weights), beside)

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        raise NotImplementedError("what is scored goes through the layers at once")


def losses(engine: Engine, masked: Masked, cases: Sequence[Case | None]) -> tuple[Tensor, dict[int, RoutingDecision]]:
    """Cross-entropy [cases, targets] float32 in nats of the hidden tokens, each row with its case left out (None:
    nothing); and per MoE layer where the router sent the tokens of all rows.
    """
    rows, length = len(cases), len(masked.ids)
    positions, policy = torch.arange(length), seam.routing_policy(engine)
    blocks = positions // masked.block_length
    experts = _LeavingOut(seam.executor(engine), cases, length)
    forward = Forward(
        info=ForwardInfo(Phase.SCORE),
        positions=positions.expand(rows, -1),
        block_ids=(blocks + torch.arange(rows).unsqueeze(1) * (int(blocks[-1]) + 1)).flatten(),
        key_values=MaskedSequence(block_causal_mask(positions, masked.block_length)),
        policy=policy,
        experts=experts,
    )
    model, places = seam.network(engine), torch.tensor(list(masked.targets))
    with torch.inference_mode(), seam.threads_of(engine):
        hidden = model(torch.tensor(masked.ids).expand(rows, -1), forward)
        logits = model.logits(hidden[:, places])
        wanted = torch.tensor(list(masked.targets.values())).expand(rows, -1)
        found = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
    return found.view(rows, -1), experts.decisions


def token_cases(
    decisions: dict[int, RoutingDecision], masked: Masked, count: int, scale: float, rng: random.Random
) -> list[Case]:
    """`count` draws of a layer, a masked token, and one of the experts it chose."""
    cases = []
    for _ in range(count):
        layer, token = rng.choice(sorted(decisions)), rng.choice(list(masked.targets))
        decision = decisions[layer]
        chosen = [place for place, expert in enumerate(decision.experts[token].tolist()) if expert >= 0]
        place = rng.choice(chosen)
        weight = float(decision.weights[token, place]) / scale
        cases.append(Case(layer, int(decision.experts[token, place]), (token,), weight))
    return cases


def block_cases(
    decisions: dict[int, RoutingDecision], masked: Masked, count: int, scale: float, rng: random.Random
) -> list[Case]:
    """`count` draws of a layer and one of the experts its block chose, left out for every token of the block."""
    start = (len(masked.ids) - 1) // masked.block_length * masked.block_length
    block = tuple(range(start, len(masked.ids)))
    cases = []
    for _ in range(count):
        layer = rng.choice(sorted(decisions))
        experts, weights = (
            part[start : len(masked.ids)] for part in (decisions[layer].experts, decisions[layer].weights)
        )
        expert = rng.choice(sorted(set(experts.flatten().tolist()) - {-1}))
        weight = float(weights[experts == expert].sum()) / scale
        cases.append(Case(layer, expert, block, weight))
    return cases


def effects(engine: Engine, masked: Masked, cases: Sequence[Case]) -> list[Effect]:
    """By how much each case raises the loss: of its own token if it concerns a single one, of all masked tokens of the
    block otherwise.
    """
    rows = max(1, seam.most_tokens(engine) // len(masked.ids) - 1)
    where = {place: column for column, place in enumerate(masked.targets)}
    found = []
    for start in range(0, len(cases), rows):
        part = cases[start : start + rows]
        # The untouched row runs beside the others: another number of rows would round its products differently.
        rise = losses(engine, masked, [None, *part])[0]
        rise = rise[1:] - rise[0]
        for case, row in zip(part, rise, strict=True):
            own = row[where[case.tokens[0]]] if len(case.tokens) == 1 else row.mean()
            found.append(Effect(case, float(own)))
    return found
