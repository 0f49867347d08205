"""The nouns every room shares. No torch at run time, no I/O, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from offload_engine.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from offload_engine.metrics import EngineStats


class ExpertKey(NamedTuple):
    """One routed expert of one decoder layer; the unit that is stored, moved, cached and computed."""

    layer: int
    """Index of the decoder layer in the checkpoint, dense layers counted."""
    expert: int


class Phase(StrEnum):
    """Why a forward is run."""

    PREFILL = "prefill"
    DENOISE = "denoise"
    COMMIT = "commit"
    SCORE = "score"
    """A whole-sequence forward without a cache (`Engine.logits`, `Engine.routing`)."""


class BlockPass(NamedTuple):
    """What one forward does for one block; or, in a prefill, for the prompt's whole blocks together."""

    phase: Phase
    lane: int
    """Which of the sequences decoded together; a lane serves one prompt after another."""
    block: int
    """Index of the block in its sequence."""
    step: int
    """Denoising step within the block, from 0."""
    tokens: int


class ForwardInfo(NamedTuple):
    """What one forward of the model is for; handed through the model to whoever executes its experts."""

    phase: Phase
    """DENOISE if the forward denoises anything, whatever it commits along with that."""
    block: int = 0
    """Index of the (first) block in the sequence; of the first block denoised, if any is."""
    step: int = 0
    """Denoising step within that block, from 0."""
    blocks: tuple[BlockPass, ...] = ()
    """The forward's blocks in the order of its tokens; empty where nothing is generated."""

    @staticmethod
    def of(blocks: Sequence[BlockPass]) -> ForwardInfo:
        """The forward that does these; `blocks` is not empty."""
        first = next((one for one in blocks if one.phase is Phase.DENOISE), blocks[0])
        return ForwardInfo(first.phase, first.block, first.step, tuple(blocks))


class Lookup(NamedTuple):
    """What a slot table on a device said of the experts that a layer wants, looked up along with the routing."""

    slots: Tensor
    """[E] int32: the expert's slot, -1 where it is in none, -2 where no token wants it."""
    missing: Tensor
    """[E + 1] int32: how many of those wanted are in no slot, then who, by falling score summed over the blocks."""
    scores: Tensor
    """[E] float32: the sums of these."""


@dataclass(frozen=True, slots=True)
class RoutingDecision:
    """Where each token of a forward goes in one MoE layer.

    `T` tokens, `E` experts, `B` blocks. A token with fewer than k choices is padded with expert -1 and weight 0.
    """

    experts: Tensor
    """[T, k] int64, by falling selection score; -1 where a token has no further choice."""
    weights: Tensor
    """[T, k] float32, normalised over the chosen experts and scaled by `routed_scaling_factor`."""
    coreset: Tensor | None = None
    """[B, E] bool: the experts each block may choose from; None where routing is not confined to one."""
    block_scores: Tensor | None = None
    """[B, E] float32, non-negative: how much each block wants each expert; orders transfers and feeds eviction."""
    lookup: Lookup | None = None
    """Where the experts chosen are, if whoever decided was shown a slot table."""


def _message(error: ValidationError, what: str) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]) or what
    found = first.get("input")
    shown = f", found {found!r}" if not isinstance(found, dict) else ""
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{what}: unknown key {name!r}"
    return f"{what} {name!r}: {reason[0].lower()}{reason[1:]}{shown}"


def usage_error(error: ValidationError, what: str) -> UsageError:
    """The first complaint of pydantic as one line that names the field, the value found and the value wanted."""
    return UsageError(_message(error, what))


class SamplingParams(BaseModel):
    """How an answer is decoded (REFERENCE §2). The defaults are LLaDA2's official settings.

    Raises `UsageError` when a field is unknown, of the wrong type or out of range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_new_tokens: Annotated[int, Field(ge=1)] = 2048
    """Upper bound of the answer's length in tokens; the context may end it earlier."""
    block_length: Annotated[int, Field(ge=1, le=4096)] = 32
    """Tokens denoised together; blocks are aligned to position 0 of the sequence."""
    steps: Annotated[int, Field(ge=1)] = 32
    """Denoising steps a block may take; the schedule unmasks at least `block_length / steps` tokens in each."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Every masked position whose confidence exceeds this is unmasked; 1 means the schedule alone decides."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """0 is greedy."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among the k most probable tokens; 0 means all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the smallest set of tokens whose probability reaches p."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    """Seed of the sampler; None draws a fresh one. Greedy decoding needs none."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings; special tokens are not part of its text, so none matches."""

    @model_validator(mode="before")
    @classmethod
    def _one_stop_string(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        stop = values.get("stop", ())
        return {**values, "stop": (stop,) if isinstance(stop, str) else stop if stop is not None else ()}

    @model_validator(mode="wrap")
    @classmethod
    def _named_errors(
        cls, values: Any, handler: ModelWrapValidatorHandler[SamplingParams], _info: ValidationInfo
    ) -> SamplingParams:
        try:
            params = handler(values)
        except ValidationError as error:
            raise usage_error(error, "sampling parameter") from None
        if any(not text for text in params.stop):
            raise UsageError("sampling parameter 'stop': a stop string may not be empty")
        return params


FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Completion:
    """One finished answer."""

    text: str
    token_ids: list[int]
    """The answer alone, without the prompt; ends with the eos where there was one."""
    finish_reason: FinishReason
    """`eos`; `stop`: a stop string; `length`: `max_new_tokens` or the context was reached; `cancelled`."""
    stats: EngineStats


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What one denoising step, or one finished block, changed."""

    kind: Literal["step", "block"]
    block: int
    """Index of the block in the answer, from 0."""
    step: int
    """Denoising steps taken in this block so far."""
    block_token_ids: tuple[int, ...]
    """The block's answer positions; the mask id where still undecided."""
    accepted: tuple[tuple[int, int, float], ...] = field(default=())
    """(position within the block's answer positions, token id, confidence) for what this step unmasked."""
    text: str = ""
    """New text since the last event that carried any: whole characters only, in order, final."""
    completion: Completion | None = None
    """Set on the last event of a prompt."""
