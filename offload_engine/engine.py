"""The engine: a model under a memory budget that turns prompts into answers."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self, cast, overload

import torch
from torch import Tensor

from offload_engine.assembly import Parts, Progress, assemble, keep_hot_set
from offload_engine.config import EngineConfig, format_bytes
from offload_engine.core import Completion, ForwardInfo, Phase, RoutingDecision, SamplingParams, StepEvent
from offload_engine.decode.block_diffusion import BlockDiffusionDecoder, DecodingState
from offload_engine.decode.events import step_event
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.decode.threads import compute_threads
from offload_engine.errors import EngineClosedError, MemoryBudgetError, PromptError, TokenizerError, UsageError
from offload_engine.experts.cache import Occupancy
from offload_engine.experts.observe import ObservedExperts, TraceRecorder
from offload_engine.memory import MemoryPlan, score_bytes
from offload_engine.metrics import EngineStats, measure_peak
from offload_engine.model.attention import MaskedSequence, block_causal_mask
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward
from offload_engine.model.moe import ExpertExecutor
from offload_engine.routing.base import RoutingPolicy
from offload_engine.text import Message, Tokenizer
from offload_engine.text.answer import AnswerText
from offload_engine.trace import TraceHeader

NO_TOKEN = -1
"""Stands for a special token that is unknown; nothing is generated then."""

Prompt = str | Sequence[int]
"""Text, or token ids."""


class LayerRouting(NamedTuple):
    """Where one MoE layer sent each of T tokens."""

    experts: Tensor
    """[T, k] int64; -1 where a token used fewer than k."""
    weights: Tensor
    """[T, k] float32."""


class Engine:
    """One loaded model. Not for concurrent use: a call while another runs is refused, never interleaved.

    Made by `from_pretrained`; release its memory and threads with `close()` or a `with` block. Several engines may live
    in one process; on a CPU each plan counts what the process holds already, and the peak measured is the process's.
    """

    def __init__(self, config: EngineConfig, parts: Parts, stats: EngineStats) -> None:
        self.config = config
        self.stats = stats
        """Counted since the engine was made; each `Completion` carries its own share."""
        self.notices = parts.notices
        """What the user should know: the routing chosen, warnings of the plan."""
        self._parts = parts
        self._recorder: TraceRecorder | None = None
        self._busy = threading.Lock()
        self._closed = False
        self._observed = ObservedExperts(parts.experts, [self._count_unique])
        source, plan = parts.source, parts.plan
        self._decoder = BlockDiffusionDecoder(
            model=parts.model,
            experts=self._observed,
            policy=parts.policy,
            cache=PrefixCache(source.config, plan.kv_positions, parts.dtype, torch.device("cpu")),
            stats=stats,
            mask_token_id=NO_TOKEN if source.mask_token_id is None else source.mask_token_id,
            eos_token_id=NO_TOKEN if source.eos_token_id is None else source.eos_token_id,
            prefill_chunk=config.prefill_chunk,
            threads=parts.threads,
            context=plan.context,
        )
        stats.planned_peak_bytes, stats.limit_bytes = plan.total, plan.budget
        stats.slots, stats.slots_per_layer = plan.slots, plan.slots_per_layer

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        config: EngineConfig | Path | str | None = None,
        progress: Progress | None = None,
        **overrides: Any,
    ) -> Engine:
        """Load a checkpoint directory, a hub id, or (None) the built-in model.

        `config` is an `EngineConfig` or a TOML file; `overrides` are fields of `EngineConfig` and win over it.
        Raises `ConfigError`, `ModelError`s, or `MemoryBudgetError` before anything large is allocated.
        """
        given: dict[str, Any] = {"model": model, **overrides}
        if isinstance(config, EngineConfig):
            changes = {key: one for key, one in given.items() if one is not None}
            settings = EngineConfig(**config.model_dump(exclude_unset=True) | changes)
        else:
            settings = EngineConfig.build(Path(config) if config is not None else None, **given)
        stats = EngineStats()
        return cls(settings, assemble(settings, stats, progress), stats)

    @property
    def plan(self) -> MemoryPlan:
        """How the budget is divided."""
        return self._parts.plan

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

    @overload
    def generate(
        self, prompt: str | list[int], params: SamplingParams | None = ..., *, raw: bool = ...
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], params: SamplingParams | None = ..., *, raw: bool = ...
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | list[int] | list[str] | list[list[int]],
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
    ) -> Completion | list[Completion]:
        """Answer one prompt (a string or a list of token ids), or several (a list of either), in order.

        A string goes through the chat template unless `raw`. Raises `PromptError`, and `UsageError` when the engine is
        busy.
        """
        if not isinstance(prompt, str) and hasattr(prompt, "tolist"):
            prompt = prompt.tolist()  # a tensor or an array
        if isinstance(prompt, str) or not len(prompt) or not all(map(_is_prompt, prompt)):
            return self._answer(cast("Prompt", prompt), params, raw)
        prompts = cast("list[Prompt]", prompt)
        for one in prompts:  # refused as a whole or not at all
            self.prepare(one, params, raw=raw)
        return [self._answer(one, params, raw) for one in prompts]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[StepEvent]:
        """One event per denoising step and per finished block; the last one carries the `Completion`.

        `cancelled` is asked after every step; once it says so the answer ends with what was decided. Errors in the
        arguments are raised by this call, not by the first event.
        """
        return self._events(self.prepare(prompt, params, raw=raw), params or SamplingParams(), cancelled)

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False) -> list[int]:
        """The token ids that `stream` would begin with; raises what it would raise of these arguments."""
        ids = self._encode(prompt, raw)
        self._check_fits(ids, params or SamplingParams())
        return ids

    def logits(self, token_ids: Sequence[int], *, block_length: int = 32) -> Tensor:
        """[T, vocab] float32: one block-causal forward over the whole sequence, no cache.

        Raises `MemoryBudgetError` when the forward needs more than the plan leaves.
        """
        with self._exclusive():
            with torch.inference_mode():
                logits = self._parts.model.logits(self._score(token_ids, block_length, self._observed))
            return logits.clone()  # an inference tensor would refuse to be changed in place

    def routing(self, token_ids: Sequence[int], *, block_length: int = 32) -> list[LayerRouting]:
        """Per MoE layer, where the forward of `logits` sends each token."""
        decisions: list[LayerRouting] = []

        def keep(_info: ForwardInfo, _layer: int, decision: RoutingDecision) -> None:
            decisions.append(LayerRouting(decision.experts, decision.weights))

        with self._exclusive(), torch.inference_mode():
            self._score(token_ids, block_length, ObservedExperts(self._parts.experts, [keep]))
        return [LayerRouting(experts.clone(), weights.clone()) for experts, weights in decisions]

    def record_trace(self, path: Path | str, block_length: int = 32) -> None:
        """From now on append every routing decision of generated blocks to `path`.

        Raises `TraceError` when `path` can't be a trace of this run. When the disk is or becomes full, answers go on
        without their trace, and `close_trace` says so.
        """
        source, policy = self._parts.source, self._parts.policy
        header = TraceHeader(
            layers=tuple(source.config.moe_layers),
            num_experts=source.config.num_experts,
            top_k=source.config.num_experts_per_tok,
            expert_bytes=self._parts.store.payload_bytes(next(iter(self._parts.store.keys()))),
            routing=policy.name,
            block_length=block_length,
            model=source.name,
        )
        self.close_trace()
        self._recorder = TraceRecorder(Path(path), header)
        self._observed.watchers.append(self._recorder)

    def close_trace(self) -> None:
        """Write what is pending and stop recording. Raises the `TraceError` that the recording met, if any."""
        if self._recorder is not None:
            recorder, self._recorder = self._recorder, None
            self._observed.watchers.remove(recorder)
            recorder.close()

    def close(self) -> None:
        """Join all threads, free the slots, close every file. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._parts.experts.close()
        keep_hot_set(self.config, self._parts)
        self._parts.store.close()
        self._parts.model.to("meta")
        self._decoder.cache.release()
        self.close_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _answer(self, prompt: Prompt, params: SamplingParams | None, raw: bool) -> Completion:
        *_, last = self.stream(prompt, params, raw=raw)
        assert last.completion is not None
        return last.completion

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        if self._closed:
            raise EngineClosedError("the engine is closed; make another one with Engine.from_pretrained")
        if not self._busy.acquire(blocking=False):
            raise UsageError(
                "the engine is busy with another call; wait for it or close its stream, or use a second engine"
            )
        try:
            yield
        finally:
            self._busy.release()

    def _encode(self, prompt: Prompt, raw: bool) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError(
                    f"{self._parts.source.directory}: no tokenizer.json, so prompts must be token ids, not text"
                )
            if raw:
                return self.tokenizer.encode_text(prompt)
            return self.tokenizer.encode_chat([Message(role="user", content=prompt)])
        vocab = self.model_config.vocab_size
        ids: list[int] = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)  # of a tensor or an array
        for place, token in enumerate(ids):
            if not hasattr(token, "__index__") or isinstance(token, bool) or not 0 <= token < vocab:
                raise PromptError(f"prompt token {place} is {token!r}; wanted an id from 0 to {vocab - 1}")
        return [operator.index(token) for token in ids]

    def _check_fits(self, ids: Sequence[int], params: SamplingParams) -> None:
        plan, length = self.plan, params.block_length
        for kind, token in (("mask", self.mask_token_id), ("eos", self.eos_token_id)):
            if token is None:
                raise TokenizerError(
                    f"{self._parts.source.directory}: neither a tokenizer nor config.json says which token is the "
                    f"{kind}; pass {kind}_token_id"
                )
        if params.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and this checkpoint has none")
        if length > plan.forward_tokens:
            raise UsageError(
                f"block_length is {length}, but the memory plan allows forwards of {plan.forward_tokens} tokens; "
                f"set prefill_chunk to {length} or more"
            )
        room = self._decoder.positions(length)
        if len(ids) >= room:
            longest = self.model_config.max_position_embeddings
            way_out = "shorten it"
            if plan.context < longest:
                way_out = f"set max_context higher (the model has {longest} positions; gpu_mem must hold them)"
            raise PromptError(
                f"the prompt has {len(ids)} tokens, but the context holds {room} with the answer in whole blocks of "
                f"{length}; {way_out}"
            )

    def _events(self, ids: list[int], params: SamplingParams, cancelled: Callable[[], bool]) -> Iterator[StepEvent]:
        with self._exclusive():
            before, began = self.stats.snapshot(), time.perf_counter()
            self.stats.prompts += 1
            self.stats.prompt_tokens += len(ids)
            text = AnswerText(self.tokenizer, params.stop)
            try:
                for state in self._decoder.decode(ids, params, text.find_stop, cancelled):
                    event = step_event(state, params.block_length, text)
                    if state.block_finished and state.finish_reason:
                        self._count_answer(state)
                    self.stats.wall_seconds += time.perf_counter() - began
                    if state.block_finished and state.finish_reason:
                        stats = self.stats.since(before)
                        done = Completion(text.whole, state.answer, state.finish_reason, stats)
                        event = replace(event, completion=done)
                    yield event
                    began = time.perf_counter()  # what the caller does with an event is not the engine's time
            finally:
                if self._recorder is not None:
                    self._recorder.end_sequence()

    def _count_answer(self, state: DecodingState) -> None:
        self.stats.new_tokens += len(state.answer)
        self._parts.experts.idle()  # a prefetch under way belongs to this answer
        self._parts.experts.arena.wait_touched()  # and all slots to its peak
        self.stats.measured_peak_bytes = measure_peak()

    def _count_unique(self, info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        if info.phase is Phase.DENOISE:
            distinct = decision.experts.unique()
            self.stats.count_unique(layer, int((distinct >= 0).sum()))

    def _score(self, token_ids: Sequence[int], block_length: int, experts: ExpertExecutor) -> Tensor:
        """Hidden states [T, H] of one block-causal forward over `token_ids`."""
        if block_length < 1:
            raise UsageError(f"block_length is {block_length}; wanted at least 1")
        ids = self._encode(token_ids, raw=True)
        if not ids:
            raise PromptError("there are no token ids to run a forward over; pass at least one")
        plan = self.plan
        needed, room = score_bytes(self.model_config, self._parts.setup, len(ids)), plan.workspace + plan.spare
        if needed > room:
            raise MemoryBudgetError(
                f"one forward over {len(ids)} tokens takes up to {format_bytes(needed)}, but the plan leaves "
                f"{format_bytes(room)}; pass fewer tokens or raise gpu_mem"
            )
        positions = torch.arange(len(ids))
        forward = Forward(
            info=ForwardInfo(Phase.SCORE),
            positions=positions,
            block_ids=positions // block_length,
            key_values=MaskedSequence(block_causal_mask(positions, block_length)),
            policy=self._parts.policy,
            experts=experts,
        )
        self.stats.forwards[Phase.SCORE] = self.stats.forwards.get(Phase.SCORE, 0) + 1
        with self.stats.phase(Phase.SCORE), compute_threads(self._parts.threads):
            return self._parts.model(torch.tensor(ids), forward)  # type: ignore[no-any-return]


def _is_prompt(one: object) -> bool:
    """Whether an item of what `generate` was given is a prompt of its own, rather than a token id."""
    return isinstance(one, Sequence) or getattr(one, "ndim", 0) > 0
