"""A place in the batch, and what is done there."""

from __future__ import annotations

import math
import secrets
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from offload_engine.core import BlockPass, Phase, SamplingParams
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.decode.sampler import Proposal, accept, unmask_schedule
from offload_engine.decode.state import DecodingState, Request
from offload_engine.errors import ModelError
from offload_engine.routing.base import RoutingPolicy


@dataclass(slots=True, eq=False)
class Lane:
    """A place in the batch, with the cache that belongs to it and the answer that is under way there."""

    index: int
    cache: PrefixCache
    number: int
    """Of its request, among all requests."""
    request: Request
    policy: RoutingPolicy
    state: DecodingState
    generator: torch.Generator | None
    uncommitted: bool = False
    """The block before the current one is finished, and the cache does not have it yet."""
    schedule: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = unmask_schedule(self.length, self.request.params.steps)

    @property
    def length(self) -> int:
        """Tokens of a block."""
        return self.request.params.block_length

    @property
    def kind(self) -> Hashable:
        """What lanes that share a forward have in common: the policy itself, hashable or not, and the block length."""
        return id(self.policy), self.length

    @property
    def missing(self) -> list[int]:
        """Of the prompt's whole blocks, before the first block of the answer is opened: those not in the cache."""
        return self.state.ids[self.cache.length :]

    @property
    def over(self) -> bool:
        """Whether the answer has ended, well or not."""
        return self.state.finish_reason is not None or self.state.error is not None

    def block_pass(self, phase: Phase) -> BlockPass:
        """What a forward does here: denoise the current block, or commit the one before."""
        state = self.state
        block, step = (state.block - 1, 0) if phase is Phase.COMMIT else (state.block, state.step)
        return BlockPass(phase, self.index, block, step, self.length)

    def cancel(self, mask: int) -> None:
        """The answer ends with what is decided."""
        self.state.finish("cancelled", self.state.decided(mask))
        self.state.block_finished = True

    def unmask(self, places: Sequence[int], proposal: Proposal) -> None:
        """Take a step's proposals for the masked `places` of the block.

        Raises `ModelError`, with nothing taken, where the model was sure of nothing.
        """
        state, params = self.state, self.request.params
        tokens, sure = proposal.tokens.tolist(), proposal.confidence.tolist()
        if not all(map(math.isfinite, sure)):
            raise ModelError(
                f"the model's logits are not finite in block {state.block}, step {state.step}: its weights are "
                "damaged, or its dtype overflows; check the checkpoint, or try dtype float32"
            )
        chosen = accept(sure, self.schedule[state.step], params.threshold)
        state.accepted = tuple((places[row], tokens[row], sure[row]) for row in chosen)
        for place, token, _sure in state.accepted:
            state.ids[place] = token
        state.step += 1


def generator_of(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    """What an answer is drawn with; None where nothing is drawn."""
    if params.temperature == 0:
        return None
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)
