"""Denoises an answer block by block against a prefix cache (REFERENCE §2)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import FinishReason, ForwardInfo, Phase, SamplingParams
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.decode.sampler import Proposal, accept, propose, unmask_schedule
from offload_engine.decode.threads import compute_threads
from offload_engine.errors import ModelError
from offload_engine.metrics import EngineStats
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertExecutor
from offload_engine.routing.base import RoutingPolicy

LOGIT_ROWS = 32
"""Positions whose logits are taken together."""


@dataclass(slots=True)
class DecodingState:
    """One answer under way."""

    ids: list[int]
    """Prompt and answer up to the end of the current block; the mask id where undecided."""
    prompt_length: int
    end: int
    """Where the answer is cut: `ids[:end]` is prompt and answer at their longest."""
    block: int
    """Index of the current block in the sequence."""
    step: int = 0
    """Steps taken in the current block."""
    accepted: tuple[tuple[int, int, float], ...] = ()
    """(position in the sequence, token id, confidence) of what the last step unmasked."""
    block_finished: bool = False
    finish_reason: FinishReason | None = None
    answer_length: int = 0
    """Once finished: tokens of the answer that count."""

    def finish(self, reason: FinishReason, length: int) -> None:
        """The answer ends here, `length` tokens long."""
        self.finish_reason = reason
        self.answer_length = length

    @property
    def answer(self) -> list[int]:
        """The answer's ids so far, or the whole of it once finished."""
        end = self.prompt_length + self.answer_length if self.finish_reason else len(self.ids)
        return self.ids[self.prompt_length : end]


StopCheck = Callable[[Sequence[int]], int | None]
"""Given the answer's leading decided ids: how many of them to keep if a stop string occurs, else None."""


@dataclass(slots=True)
class BlockDiffusionDecoder:
    """Turns prompts into answers with one model, one routing policy and one expert executor."""

    model: LLaDA2Model
    experts: ExpertExecutor
    policy: RoutingPolicy
    cache: PrefixCache
    stats: EngineStats
    mask_token_id: int
    eos_token_id: int
    prefill_chunk: int = 512
    """Most tokens prefilled in one forward, rounded down to whole blocks, but at least one block."""
    threads: int | None = None
    """Compute threads; None: as many as torch is set to."""
    context: int | None = None
    """Most positions of prompt and answer together; None: as many as the cache holds."""

    def decode(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop: StopCheck | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[DecodingState]:
        """Yield the same state object after every denoising step, and once more with `block_finished` after a block.

        The prompt and at least one answer token must fit the cache in whole blocks. `cancelled` is asked after every
        step and prefill chunk; what was decided until then is the answer.
        """
        length = params.block_length
        whole = len(prompt) // length * length
        end = min(len(prompt) + params.max_new_tokens, self.positions(length))
        state = DecodingState(list(prompt[:whole]), len(prompt), end, block=len(prompt) // length)
        generator = _generator(params, self.cache.keys.device)
        self.cache.reset()
        if not self._prefill(state.ids, length, cancelled):
            state.ids = list(prompt)
            state.finish("cancelled", 0)
            state.block_finished = True
            yield state
        while state.finish_reason is None:
            self._open_block(state, prompt, length)
            yield from self._denoise_block(state, params, generator, stop, cancelled)
            if state.finish_reason is None and len(state.ids) >= end:
                state.finish("length", end - len(prompt))
            if state.finish_reason is None:
                self._commit(state, length)
            state.block_finished = True
            self.stats.blocks += 1
            yield state
            state.block += 1

    def positions(self, block_length: int) -> int:
        """Most positions prompt and answer may have when blocks of this length must be denoised whole."""
        whole_blocks = self.cache.context // block_length * block_length
        return whole_blocks if self.context is None else min(self.context, whole_blocks)

    def _denoise_block(
        self,
        state: DecodingState,
        params: SamplingParams,
        generator: torch.Generator | None,
        stop: StopCheck | None,
        cancelled: Callable[[], bool],
    ) -> Iterator[DecodingState]:
        """Step until the block holds no mask or the answer ends."""
        schedule = unmask_schedule(params.block_length, params.steps)
        while self.mask_token_id in self._open_tokens(state, params.block_length) and state.finish_reason is None:
            self._denoise(state, params, schedule[state.step], generator)
            self._check_end(state, stop)
            if state.finish_reason is None and cancelled():
                state.finish("cancelled", self._decided(state))
            yield state

    @torch.inference_mode()
    def _prefill(self, ids: list[int], length: int, cancelled: Callable[[], bool]) -> bool:
        """Bring the prompt's whole blocks into the cache. False if cancelled on the way."""
        chunk = max(1, self.prefill_chunk // length) * length
        with self._computing(Phase.PREFILL):
            for start in range(0, len(ids), chunk):
                if cancelled():
                    return False
                piece = ids[start : start + chunk]
                self._forward(piece, length, ForwardInfo(Phase.PREFILL, start // length))
                self.cache.commit(len(piece))
        return True

    @contextmanager
    def _computing(self, phase: Phase) -> Iterator[None]:
        with self.stats.phase(phase), compute_threads(self.threads):
            yield

    def _open_block(self, state: DecodingState, prompt: Sequence[int], length: int) -> None:
        """Append the current block: what the prompt says of it, then masks."""
        start = state.block * length
        known = list(prompt[start : start + length])
        state.ids += known + [self.mask_token_id] * (length - len(known))
        state.step = 0
        state.accepted = ()
        state.block_finished = False

    def _open_tokens(self, state: DecodingState, length: int) -> list[int]:
        """The current block's answer positions. A mask id that the prompt holds is the prompt's business."""
        return state.ids[max(state.block * length, state.prompt_length) :]

    @torch.inference_mode()
    def _denoise(
        self, state: DecodingState, params: SamplingParams, least: int, generator: torch.Generator | None
    ) -> None:
        """One step: forward the block, and unmask at least `least` of its positions."""
        length = params.block_length
        start = state.block * length
        with self._computing(Phase.DENOISE):
            hidden = self._forward(state.ids[start:], length, ForwardInfo(Phase.DENOISE, state.block, state.step))
            first = max(state.prompt_length, start)
            masked = [i for i in range(first, start + length) if state.ids[i] == self.mask_token_id]
            tokens, confidence = self._propose(hidden, [i - start for i in masked], params, generator)
            if not bool(confidence.isfinite().all()):
                raise ModelError(
                    f"the model's logits are not finite in block {state.block}, step {state.step}: its weights are "
                    "damaged, or its dtype overflows; check the checkpoint, or try dtype float32"
                )
            chosen = accept(confidence, least, params.threshold)
            state.accepted = tuple(
                (position, token, sure)
                for position, token, sure, yes in zip(
                    masked, tokens.tolist(), confidence.tolist(), chosen.tolist(), strict=True
                )
                if yes
            )
        for position, token, _ in state.accepted:
            state.ids[position] = token
        state.step += 1
        self.stats.denoise_steps += 1

    def _propose(
        self, hidden: Tensor, rows: Sequence[int], params: SamplingParams, generator: torch.Generator | None
    ) -> Proposal:
        """Proposals for these rows of `hidden`, a few at a time: logits over a large vocabulary are the largest
        activations there are.
        """
        chosen = hidden[torch.tensor(rows, device=hidden.device)]
        parts = [
            propose(self.model.logits(part), self.mask_token_id, params, generator) for part in chosen.split(LOGIT_ROWS)
        ]
        return Proposal(torch.cat([part.tokens for part in parts]), torch.cat([part.confidence for part in parts]))

    def _decided(self, state: DecodingState) -> int:
        """Length of the answer before its first mask, at its longest."""
        answer = state.ids[state.prompt_length : state.end]
        return answer.index(self.mask_token_id) if self.mask_token_id in answer else len(answer)

    def _check_end(self, state: DecodingState, stop: StopCheck | None) -> None:
        """Early stop: an eos, or a stop string, with everything before it decided."""
        answer = state.ids[state.prompt_length : state.prompt_length + self._decided(state)]
        eos = answer.index(self.eos_token_id) if self.eos_token_id in answer else None
        kept = stop(answer[:eos]) if stop else None  # what follows an eos is not part of the answer
        if kept is not None:
            state.finish("stop", kept)
        elif eos is not None:
            state.finish("eos", eos + 1)

    @torch.inference_mode()
    def _commit(self, state: DecodingState, length: int) -> None:
        """One more forward over the finished block leaves its exact keys and values in the cache."""
        with self._computing(Phase.COMMIT):
            self._forward(state.ids[-length:], length, ForwardInfo(Phase.COMMIT, state.block, state.step))
            self.cache.commit(length)

    def _forward(self, ids: Sequence[int], length: int, info: ForwardInfo) -> Tensor:
        device = self.cache.keys.device
        positions = self.cache.begin(len(ids), length)
        blocks = torch.arange(len(ids), device=device) // length
        forward = Forward(info, positions, blocks, self.cache, self.policy, self.experts)
        self.stats.forwards[info.phase] = self.stats.forwards.get(info.phase, 0) + 1
        return self.model(torch.tensor(ids, device=device), forward)  # type: ignore[no-any-return]


def _generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    if params.temperature == 0:
        return None
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)
