"""Whether what a caller hands over can be answered at all."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import cast

from offload_engine.core import SamplingParams
from offload_engine.errors import PromptError, UsageError
from offload_engine.memory import MemoryPlan
from offload_engine.text import Message, Tokenizer

Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation whose next turn is wanted."""


def is_prompt(one: object) -> bool:
    """Whether an item of a list is a prompt of its own, rather than a token id."""
    return isinstance(one, Sequence) or getattr(one, "ndim", 0) > 0


def encoded(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, *, raw: bool) -> list[int]:
    """The token ids of a prompt: a string goes through the chat template unless `raw`, a conversation always.

    Raises `PromptError` for what can't be encoded, `UsageError` for a conversation that is to be raw.
    """
    talks = not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    if not talks and not isinstance(prompt, str):
        return checked_ids(cast("Sequence[int]", prompt), vocab_size)
    if tokenizer is None:
        raise PromptError("the checkpoint has no tokenizer.json, so prompts must be token ids, not text")
    if not isinstance(prompt, str):
        if raw:
            raise UsageError("raw leaves the chat template out, but a conversation needs one; pass text or token ids")
        return tokenizer.encode_chat(cast("Sequence[Message]", prompt))
    if raw:
        return tokenizer.encode_text(prompt)
    return tokenizer.encode_chat([Message(role="user", content=prompt)])


def checked_ids(prompt: Sequence[int], vocab_size: int) -> list[int]:
    """The ids of a list, a tensor or an array; raises `PromptError` for one that the vocabulary lacks."""
    ids: list[int] = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    for place, token in enumerate(ids):
        if not hasattr(token, "__index__") or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise PromptError(f"prompt token {place} is {token!r}; wanted an id from 0 to {vocab_size - 1}")
    return [operator.index(token) for token in ids]


def check_fits(ids: Sequence[int], params: SamplingParams, plan: MemoryPlan, room: int, longest: int) -> None:
    """Raises unless the plan allows for blocks of this length, and the prompt leaves some of the `room` positions that
    whole blocks have in the context; the model has `longest`.
    """
    length = params.block_length
    if length > plan.forward_tokens:
        raise UsageError(
            f"block_length is {length}, but the memory plan allows forwards of {plan.forward_tokens} tokens; "
            f"set prefill_chunk to {length} or more"
        )
    if len(ids) >= room:
        way_out = "shorten it"
        if plan.context < longest:
            way_out = f"set max_context higher (the model has {longest} positions; gpu_mem must hold them)"
        raise PromptError(
            f"the prompt has {len(ids)} tokens, but the context holds {room} with the answer in whole blocks of "
            f"{length}; {way_out}"
        )


def checked_batch_size(batch_size: int | None, plan: MemoryPlan) -> int:
    """How many prompts to answer at a time: `batch_size`, or (None) as many as the plan has KV caches for.

    Raises `UsageError` for more than those.
    """
    most = plan.sequences
    if batch_size is not None and not 1 <= batch_size <= most:
        raise UsageError(
            f"batch_size is {batch_size}, but the memory plan holds the KV cache of {most} sequence{'s' * (most > 1)}; "
            f"pass 1 to {most}, or make the engine with batch_size={batch_size}"
            if batch_size > 0
            else f"batch_size is {batch_size}; wanted 1 to {most}"
        )
    return batch_size or most
