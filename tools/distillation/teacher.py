"""The model that answers: which one it is, and an engine that answers as it does."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import choose_policy, find_source
from offload_engine.engine.engine import Engine
from offload_engine.errors import ModelError, TokenizerError, UsageError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.routing import described
from offload_engine.text import Message, Tokenizer
from tools.distillation.prompts import Prompt
from tools.distillation.shards import Record

BAD_PROMPT = "bad prompt"
"""Why a prompt was dropped that could not be answered at all."""

HARMLESS = frozenset(
    {
        *("device", "gpu_mem", "host_mem", "expert_mem", "threads"),
        *("eviction", "predictor", "prefetch_depth", "hot_set", "transfers_in_flight", "reader_threads"),
    }
)
"""Engine options that change how fast an answer comes and never what it is."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A model with its settings; small, and the same wherever it is unpickled."""

    config: EngineConfig
    """With a context of its own, so that no worker's budget decides how long an answer may be."""
    params: SamplingParams
    """With a seed."""
    name: str
    fingerprint: str
    """Tells this checkpoint's weights, config and tokenizer from any other's."""
    routing: dict[str, Any]
    """The policy's name and parameters."""

    def settings(self) -> dict[str, Any]:
        """Everything that decides what the answers are, for the manifest."""
        told = {"model", "routing"}
        return {
            "model": {"name": self.name, "fingerprint": self.fingerprint},
            "routing": self.routing,
            # a version to come may have more options: only those that were given a value count
            "engine": self.config.model_dump(mode="json", exclude_defaults=True, exclude=told | HARMLESS),
            "sampling": self.params.model_dump(mode="json", exclude={"stop", "seed"}),
            "seed": self.params.seed,
        }

    def open(self) -> Answering:
        """Load the model. Raises `OffloadError`s."""
        return Answering(self)


class Answering:
    """A teacher with its engine loaded."""

    def __init__(self, teacher: Teacher) -> None:
        found = fingerprint(find_source(teacher.config).directory)
        if found != teacher.fingerprint:
            raise ModelError(
                f"{teacher.name}: this worker's copy has fingerprint {found}, wanted {teacher.fingerprint}; "
                "give every worker the same checkpoint"
            )
        self.teacher = teacher
        self.engine = Engine.from_pretrained(config=teacher.config)

    def __call__(self, prompt: Prompt) -> Record:
        """The answer's record, or why it was dropped: it didn't end with an eos, or the prompt has a problem."""
        if prompt.problem is not None:
            return {"dropped": BAD_PROMPT, "id": prompt.id}
        assert self.engine.tokenizer is not None
        ids = _encode(self.engine.tokenizer, prompt.text)
        done = self.engine.generate(ids, self._params(prompt))
        if done.finish_reason != "eos":
            return {"dropped": done.finish_reason, "id": prompt.id}
        return {
            "id": prompt.id,
            "prompt": prompt.text,
            "prompt_ids": ids,
            "answer": done.text,
            "answer_ids": done.token_ids,
            "steps": done.stats.denoise_steps,
        }

    def close(self) -> None:
        """Release the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _params(self, prompt: Prompt) -> SamplingParams:
        """With a seed of the prompt's own: its answer depends on no other prompt, nor on who answers it."""
        digest = hashlib.sha256(f"{self.teacher.params.seed} {prompt.id}".encode()).digest()
        return self.teacher.params.model_copy(update={"seed": int.from_bytes(digest[:7])})


def make_teacher(
    config: EngineConfig, params: SamplingParams, prompts: Sequence[Prompt]
) -> tuple[Teacher, list[Prompt]]:
    """The teacher for `prompts`, and these, those with a problem that don't fit the context.

    The context is `max_context`, else room for the longest prompt with the longest answer, as far as the model has
    positions. No weights are loaded. Raises `ModelError`s, and `UsageError` for settings that can't be used.
    """
    if params.stop:
        raise UsageError(f"stop is {params.stop[0]!r}, but an answer to learn from ends with the eos; leave --stop out")
    if config.residency_bonus:
        raise UsageError(
            f"residency_bonus is {config.residency_bonus:g}, by which answers depend on what the cache holds and no "
            "run makes the same dataset again; leave --residency-bonus out"
        )
    source = find_source(config)
    if source.tokenizer is None:
        raise TokenizerError(f"{source.directory}: no tokenizer.json, so prompts can't be made token ids of")
    policy, _ = choose_policy(config, source.config)
    lengths = {one.id: len(_encode(source.tokenizer, one.text)) for one in prompts if one.problem is None}
    most, block = source.config.max_position_embeddings, params.block_length
    context = config.max_context or -(-(max(lengths.values(), default=0) + params.max_new_tokens) // block) * block
    context = min(context, most)
    room = context // block * block
    here = config.model is not None and Path(config.model).is_dir()
    model = str(source.directory.resolve()) if here else config.model  # workers may run in another directory
    teacher = Teacher(
        config=config.model_copy(update={"max_context": context, "model": model}),
        params=params.model_copy(update={"seed": params.seed or 0}),
        name=source.name,
        fingerprint=fingerprint(source.directory),
        routing=described(policy),
    )
    return teacher, [_fitted(one, lengths.get(one.id, 0), room) for one in prompts]


def _fitted(prompt: Prompt, length: int, room: int) -> Prompt:
    if length < room:
        return prompt
    return replace(prompt, problem=f"the prompt has {length} tokens, but the context holds {room} with its answer")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_chat([Message(role="user", content=text)])
