"""What an engine tells of itself, and of what it was made of."""

from __future__ import annotations

from pathlib import Path

import torch

from offload_engine.engine.assembly import Parts
from offload_engine.errors import TokenizerError
from offload_engine.experts.scheduling.cache import Occupancy
from offload_engine.memory import MemoryPlan
from offload_engine.model.config import ModelConfig
from offload_engine.routing.base import RoutingPolicy
from offload_engine.text import Tokenizer
from offload_engine.trace import TraceHeader


class EngineFacts:
    """The read-only half of an engine. May be asked from any thread."""

    _parts: Parts

    @property
    def plan(self) -> MemoryPlan:
        """How the budget is divided."""
        return self._parts.plan

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know: the routing chosen, warnings of the plan; and as it comes up in use, what makes a
        run slower than it could be.
        """
        return (*self._parts.notices, *self._parts.notices_in_use())

    @property
    def model_config(self) -> ModelConfig:
        """The model's architecture."""
        return self._parts.source.config

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None where the checkpoint has none: it then serves token ids only."""
        return self._parts.source.tokenizer

    @property
    def mask_token_id(self) -> int | None:
        """The id of a position still undecided; None where it is unknown."""
        return self._parts.source.mask_token_id

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends an answer; None where it is unknown."""
        return self._parts.source.eos_token_id

    @property
    def routing_name(self) -> str:
        """The routing policy in force."""
        return self._parts.policy.name

    @property
    def policy(self) -> RoutingPolicy:
        """The routing policy in force, with its parameters."""
        return self._parts.policy

    @property
    def directory(self) -> Path:
        """Where the checkpoint lies."""
        return self._parts.source.directory

    @property
    def dtype(self) -> torch.dtype:
        """What is computed in."""
        return self._parts.dtype

    def occupancy(self) -> Occupancy:
        """How many expert slots are free, loading and resident just now. May be called from any thread."""
        return self._parts.experts.occupancy()

    def _require_special_tokens(self) -> None:
        """Raises `TokenizerError` where one that decoding needs is unknown."""
        for kind, token in (("mask", self.mask_token_id), ("eos", self.eos_token_id)):
            if token is None:
                raise TokenizerError(
                    f"{self.directory}: neither a tokenizer nor config.json says which token is the {kind}; "
                    f"pass {kind}_token_id"
                )

    def _trace_header(self, block_length: int) -> TraceHeader:
        """What a trace of this engine's routing says of itself."""
        source, store = self._parts.source, self._parts.store
        return TraceHeader(
            layers=tuple(source.config.moe_layers),
            num_experts=source.config.num_experts,
            top_k=source.config.num_experts_per_tok,
            expert_bytes=store.payload_bytes(next(iter(store.keys()))),
            routing=self._parts.policy.name,
            block_length=block_length,
            model=source.name,
        )
