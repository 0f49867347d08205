"""The engine: a model under a memory budget that turns prompts into answers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, cast, overload

import torch
from torch import Tensor

from offload_engine.config import EngineConfig
from offload_engine.core import Completion, ForwardInfo, Phase, RoutingDecision, SamplingParams, StepEvent
from offload_engine.decode.access import Access
from offload_engine.decode.answers import Events, completions, events_of_one
from offload_engine.decode.batch import Batch
from offload_engine.decode.block_diffusion import BlockDiffusionDecoder
from offload_engine.decode.grouping import Grouping
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.decode.prompts import Prompt, check_fits, checked_batch_size, encoded, is_prompt
from offload_engine.decode.scoring import LayerRouting, check_room, score
from offload_engine.decode.session import Session
from offload_engine.decode.state import DecodingState, never
from offload_engine.decode.threads import compute_threads
from offload_engine.engine.adjusting import changed, reroute, resize, tell_plan
from offload_engine.engine.assembly import Parts, assemble, keep_hot_set
from offload_engine.engine.dropping import dropped
from offload_engine.engine.extending import Custom
from offload_engine.engine.facts import EngineFacts
from offload_engine.engine.options import EngineOptions
from offload_engine.errors import UsageError
from offload_engine.experts.activity import ExpertActivity
from offload_engine.experts.observe import ObservedExperts, TraceRecorder
from offload_engine.experts.ranked import ranked_experts
from offload_engine.memory import MemoryPlan, score_bytes
from offload_engine.memory.refusal import refusals
from offload_engine.metrics import EngineStats, measure_peak
from offload_engine.model.hub import Progress
from offload_engine.model.moe import ExpertExecutor
from offload_engine.text import Message

NO_TOKEN = -1
"""Stands for a special token that is unknown; nothing is generated then."""


class Engine(EngineFacts):
    """One loaded model. Not for concurrent use: a call while another runs is refused, never interleaved.

    Made by `from_pretrained`; release its memory and threads with `close()` or a `with` block. One that is dropped
    without is freed all the same, later, with a `ResourceWarning`. Several engines may live in one process; on a CPU
    each plan counts what the process holds already, and the peak measured is the process's.
    """

    def __init__(self, config: EngineConfig, parts: Parts, stats: EngineStats) -> None:
        self.config = config
        self.stats = stats
        """Counted since the engine was made; each `Completion` carries its own share."""
        self.on_prefill: Callable[[int, int], None] | None = None
        """Told during each prefill, by the thread that runs it, how many of its tokens are done, and how many there
        are; once more when it is over: a long prompt takes a while, and nothing else is told meanwhile."""
        self._prefilling = 0
        self._parts = parts
        self._recorder: TraceRecorder | None = None
        self._access = Access()
        self.activity = ExpertActivity(parts.experts, parts.source.config.num_experts)
        """Where experts are and which are used, for whoever watches."""
        told = (self._count_unique, self._tell_prefill, self.activity)
        self._observed = ObservedExperts(parts.experts, told, parts.experts.layers[-1])
        source, plan = parts.source, parts.plan
        self._decoder = BlockDiffusionDecoder(
            model=parts.model,
            experts=self._observed,
            policy=parts.policy,
            caches=[
                PrefixCache(source.config, plan.kv_positions, parts.dtype, parts.device) for _ in range(plan.sequences)
            ],
            stats=stats,
            mask_token_id=NO_TOKEN if source.mask_token_id is None else source.mask_token_id,
            eos_token_id=NO_TOKEN if source.eos_token_id is None else source.eos_token_id,
            prefill_chunk=config.prefill_chunk,
            threads=parts.threads,
            context=plan.context,
            fused_commit=config.fused_commit,
            forward_tokens=plan.forward_tokens,
            graphs=parts.graphs,
            grouping=None
            if plan.sequences == 1
            else Grouping(lambda: stats.slots_per_layer, config.lanes_together, source.config.num_experts),
        )
        tell_plan(stats, plan)
        self._dropped = weakref.finalize(self, dropped, source.name, parts, self._decoder.caches)
        self._dropped.atexit = False  # the process gives everything back by itself
        parts.experts.warm_up()  # last, so that it takes nothing from what the engine still needs

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        config: EngineConfig | Path | str | None = None,
        progress: Progress | None = None,
        **overrides: Unpack[EngineOptions],
    ) -> Engine:
        """Load a checkpoint directory, a hub id, or (None) the built-in model.

        `config` is an `EngineConfig` or a TOML file; `overrides` are fields of `EngineConfig` and win over it. Where
        they name a policy, `eviction`, `predictor` and `routing` also take one of your own (`extending`). `progress` is
        told of the download and of the weights. Raises `ConfigError`, `ModelError`s, or `MemoryBudgetError` before
        anything large is allocated.
        """
        given: dict[str, Any] = {"model": model, **overrides}
        custom = Custom.taken_from(given)
        if isinstance(config, EngineConfig):
            settings = changed(config, **given)
        else:
            settings = EngineConfig.build(Path(config) if config is not None else None, **given)
        stats = EngineStats()
        with refusals("the model was loaded"):
            parts = assemble(settings, stats, progress, custom)
            try:
                return cls(settings, parts, stats)
            except BaseException:
                parts.close()
                raise

    @overload
    def generate(
        self,
        prompt: str | list[int] | list[Message],
        params: SamplingParams | None = ...,
        *,
        raw: bool = ...,
        batch_size: int | None = ...,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: list[str] | list[list[int]] | list[list[Message]],
        params: SamplingParams | None = ...,
        *,
        raw: bool = ...,
        batch_size: int | None = ...,
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: str | list[int] | list[Message] | list[str] | list[list[int]] | list[list[Message]],
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        batch_size: int | None = None,
    ) -> Completion | list[Completion]:
        """Answer one prompt (a string, a list of token ids or of messages), or several (a list of such), in order.

        A string goes through the chat template unless `raw`. Several are answered `batch_size` at a time (None: as many
        as the engine was made for). Raises `PromptError`, and `UsageError` when the engine is busy.
        """
        if not isinstance(prompt, str) and hasattr(prompt, "tolist"):
            prompt = prompt.tolist()  # a tensor or an array
        several = not isinstance(prompt, str) and len(prompt) > 0 and all(map(is_prompt, prompt))
        prompts = cast("list[Prompt]", prompt if several else [prompt])
        done = dict(self.complete(prompts, params, raw=raw, batch_size=batch_size))
        return [done[number] for number in range(len(prompts))] if several else done[0]

    def complete(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        batch_size: int | None = None,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[tuple[int, Completion]]:
        """The answers of several prompts as they are finished, each with its prompt's place in `prompts`.

        Prompts are refused as a whole or not at all, and by this call rather than by the first answer. Once `cancelled`
        says so, every answer under way ends with what was decided, and no other is begun.
        """
        together = checked_batch_size(batch_size, self.plan)
        ids = [self.prepare(one, params, raw=raw) for one in prompts]
        return completions(self._events(ids, params or SamplingParams(), cancelled, together))

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        raw: bool = False,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[StepEvent]:
        """One event per denoising step and per finished block; the last one carries the `Completion`.

        `cancelled` is asked after every step; once it says so the answer ends with what was decided. Errors in the
        arguments are raised by this call, not by the first event.
        """
        ids = self.prepare(prompt, params, raw=raw)
        return events_of_one(self._events([ids], params or SamplingParams(), cancelled, together=1))

    def prepare(self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False) -> list[int]:
        """The token ids that `stream` would begin with; raises what it would raise of these arguments."""
        ids = self._encode(prompt, raw)
        self._check_fits(ids, params or SamplingParams())
        return ids

    def logits(self, token_ids: Sequence[int], *, block_length: int = 32) -> Tensor:
        """[T, vocab] float32: one block-causal forward over the whole sequence, no cache.

        Raises `MemoryBudgetError` when the forward needs more than the plan leaves.
        """
        with self._access.call(), self._access.work():
            with torch.inference_mode():
                logits = self._parts.model.logits(self._score(token_ids, block_length, self._observed))
            return logits.clone()  # an inference tensor would refuse to be changed in place

    def routing(self, token_ids: Sequence[int], *, block_length: int = 32) -> list[LayerRouting]:
        """Per MoE layer, where the forward of `logits` sends each token."""
        decisions: list[LayerRouting] = []

        def keep(_info: ForwardInfo, _layer: int, decision: RoutingDecision) -> None:
            experts, weights = decision.experts, decision.weights
            decisions.append(LayerRouting(experts.to(weights.device), weights))

        with self._access.call(), self._access.work(), torch.inference_mode():
            self._score(token_ids, block_length, ObservedExperts(self._parts.experts, [keep]))
        return [LayerRouting(experts.clone(), weights.clone()) for experts, weights in decisions]

    def resize(self, *, gpu_mem: int | str | None = None, expert_mem: int | str | None = None) -> MemoryPlan:
        """Change how much memory the expert cache has, between answers: shrinking evicts and gives the memory back to
        the system, growing takes more; experts that fit stay. Returns the new plan. On a GPU one cache replaces the
        other: if the larger of both budgets doesn't hold the two at once, experts come again from host memory or disk.

        The budgets are those of `EngineConfig`; None leaves one as it is, "none" lifts `expert_mem`. All other parts of
        the plan stay. Raises `MemoryBudgetError`, with nothing changed, for what the budget or the system doesn't hold;
        `UsageError` while the engine is busy, where nothing is asked for, or while an exception that is kept holds
        memory of a slot. After an interrupt the plan is the old one or the new one, whichever the cache then has.
        """
        if gpu_mem is None and expert_mem is None:
            raise UsageError("resize needs a new size; pass gpu_mem, expert_mem or both")
        with self._access.call(), self._access.work():
            config = changed(self.config, gpu_mem=gpu_mem, expert_mem=expert_mem)
            resize(config, self.config, self._parts, self.stats, self._adopt)
        return self.plan

    def _adopt(self, config: EngineConfig, parts: Parts) -> None:
        self.config, self._parts = config, parts

    def set_routing(
        self, routing: str, *, top_p: float | None = None, min_experts: int | None = None
    ) -> tuple[str, ...]:
        """Route by another policy from the next answer on; None leaves an option as it is. Returns what the user should
        know of it. Raises `ConfigError`, and `UsageError` while the engine is busy or a trace is being recorded.
        """
        with self._access.call():
            if self._recorder is not None:
                raise UsageError(
                    "routing can't change while a trace is recorded, which is of one policy; close_trace()"
                )
            config = changed(self.config, routing=routing, top_p=top_p, min_experts=min_experts)
            policy, notices = reroute(config, self._parts)
            self._parts, self.config = replace(self._parts, policy=policy), config
            self._decoder.policy = policy
            for cache in self._decoder.caches:  # its keys and values were computed under the other policy
                cache.reset()
        return tuple(notices)

    def record_trace(self, path: Path | str, block_length: int = 32) -> None:
        """From now on append every routing decision of generated blocks to `path`.

        Raises `TraceError` when `path` can't be a trace of this run. When the disk is or becomes full, answers go on
        without their trace, and `close_trace` says so.
        """
        header = self._trace_header(block_length)
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
        """Join all threads, free the slots, close every file. Idempotent.

        Waits for reads of the disk that are under way. A call that is under way in another thread ends with
        `EngineClosedError`.
        """
        if not self._access.close():
            return
        self._dropped.detach()
        try:
            self._parts.experts.close()
            self._access.wait()
            keep_hot_set(self.config, self._parts)
        finally:
            self._parts.unload()
            for cache in self._decoder.caches:
                cache.release()
            self.close_trace()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _encode(self, prompt: Prompt, raw: bool) -> list[int]:
        return encoded(prompt, self.tokenizer, self.model_config.vocab_size, raw=raw)

    def _check_fits(self, ids: Sequence[int], params: SamplingParams) -> None:
        self._require_special_tokens()
        if params.stop and self.tokenizer is None:
            raise UsageError("stop strings need a tokenizer, and this checkpoint has none")
        room = self._decoder.positions(params.block_length)
        check_fits(ids, params, self.plan, room, self.model_config.max_position_embeddings)

    def _events(
        self, prompts: Sequence[list[int]], params: SamplingParams, cancelled: Callable[[], bool], together: int
    ) -> Events:
        """Each event with its prompt's place in `prompts`."""
        with self.session(together) as session:
            waiting = enumerate(prompts)
            begun = False
            while True:
                while session.has_room and not (begun and cancelled()) and (following := next(waiting, None)):
                    begun = True
                    session.enter(*following, params, cancelled)
                if session.empty:
                    return
                for number, outcome in session.advance():
                    if isinstance(outcome, Exception):
                        raise outcome
                    yield number, outcome

    @contextmanager
    def session(
        self, lanes: int | None = None, turn_blocks: int | None = None, reuse: bool = False
    ) -> Iterator[Session]:
        """The engine to oneself, to enter requests and take steps by hand; `generate` and `Batcher` are made of it.

        At most `lanes` requests at a time; `turn_blocks`: see `Turns`; `reuse`: see `Batch`, but the config's
        `prefix_reuse` goes first. Raises `UsageError` when the engine is busy.
        """
        with self._access.call():
            reuse = {"on": True, "off": False}.get(self.config.prefix_reuse, reuse)
            try:
                yield Session(
                    lambda: Batch(self._decoder, lanes, turn_blocks, reuse),
                    self._access,
                    self.tokenizer,
                    self.stats,
                    self._conclude,
                )
            finally:
                if self._recorder is not None:
                    self._recorder.end_sequence()

    def _conclude(self, state: DecodingState) -> None:
        """An answer is over."""
        if self._recorder is not None:
            self._recorder.end_sequence(state.lane)
        if state.error is not None:
            return
        experts = self._parts.experts
        experts.idle()  # a prefetch under way belongs to this answer
        experts.wait_for_slots()  # and all of them to its peak, ...
        for cache in self._decoder.caches:
            cache.wait_touched()  # ... with what every context may hold
        gpu = self._parts.gpu
        self.stats.measured_peak_bytes = measure_peak() if gpu is None else gpu.peak()

    def _count_unique(self, info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        if info.phase is Phase.DENOISE:
            distinct = ranked_experts(decision).experts
            self.stats.count_unique(layer, len(distinct))
            if self._decoder.grouping is not None:
                self._decoder.grouping.saw(info.blocks[0].lane, layer, set(distinct))

    def _tell_prefill(self, info: ForwardInfo, layer: int, _decision: RoutingDecision) -> None:
        over = info.phase is not Phase.PREFILL
        tokens = self._prefilling if over else sum(one.tokens for one in info.blocks)
        self._prefilling = 0 if over else tokens
        if self.on_prefill is not None and tokens:
            self.on_prefill(tokens if over else tokens * layer // self.model_config.num_hidden_layers, tokens)

    def _score(self, token_ids: Sequence[int], block_length: int, experts: ExpertExecutor) -> Tensor:
        """Hidden states [T, H] of one block-causal forward over `token_ids`."""
        ids = self._encode(token_ids, raw=True)
        parts = self._parts
        check_room(parts.plan, score_bytes(self.model_config, parts.setup, len(ids)), len(ids), block_length)
        self.stats.forwards[Phase.SCORE] = self.stats.forwards.get(Phase.SCORE, 0) + 1
        with self.stats.phase(Phase.SCORE), compute_threads(parts.threads):
            return score(parts.model, ids, block_length, parts.policy, experts)
