"""Denoises answers block by block against prefix caches (REFERENCE §2), one sequence or several together."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from offload_engine.core import BlockPass, ForwardInfo, Phase, SamplingParams
from offload_engine.decode.kv_cache import PrefixCache, Span, side_by_side
from offload_engine.decode.sampler import Proposal, accept, propose, unmask_schedule
from offload_engine.decode.state import DecodingState, Request, StopCheck, never
from offload_engine.decode.threads import compute_threads
from offload_engine.errors import ModelError
from offload_engine.metrics import EngineStats
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertExecutor
from offload_engine.routing.base import RoutingPolicy

Item = TypeVar("Item")

LOGIT_ROWS = 32
"""Positions whose logits are taken together."""


@dataclass(slots=True)
class Lane:
    """A place in the batch, with the cache that belongs to it and the answer that is under way there."""

    index: int
    cache: PrefixCache
    number: int
    """Of its request, among all requests."""
    request: Request
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

    def block_pass(self, phase: Phase) -> BlockPass:
        """What a forward does here: denoise the current block, or commit the one before."""
        state = self.state
        block, step = (state.block - 1, 0) if phase is Phase.COMMIT else (state.block, state.step)
        return BlockPass(phase, self.index, block, step, self.length)


@dataclass(slots=True)
class BlockDiffusionDecoder:
    """Turns prompts into answers with one model, one routing policy and one expert executor."""

    model: LLaDA2Model
    experts: ExpertExecutor
    policy: RoutingPolicy
    caches: Sequence[PrefixCache]
    """One per sequence that may be decoded together with others, all of the same context."""
    stats: EngineStats
    mask_token_id: int
    eos_token_id: int
    prefill_chunk: int = 512
    """Most tokens of a prompt that attend together, rounded down to whole blocks, but at least one block."""
    threads: int | None = None
    """Compute threads; None: as many as torch is set to."""
    context: int | None = None
    """Most positions of prompt and answer together; None: as many as a cache holds."""
    fused_commit: bool = True
    """A finished block is committed in the forward of the next block's first step rather than in one of its own."""
    forward_tokens: int | None = None
    """Most tokens of one forward; None: no limit. At least a block."""

    def decode(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        stop: StopCheck | None = None,
        cancelled: Callable[[], bool] = never,
    ) -> Iterator[DecodingState]:
        """Answer one prompt; see `decode_all`."""
        for _number, state in self.decode_all([Request(prompt, params, stop, cancelled)]):
            yield state

    def decode_all(
        self, requests: Iterable[Request], together: int | None = None
    ) -> Iterator[tuple[int, DecodingState]]:
        """Answer requests, at most `together` at a time (None: as many as there are caches): each denoising step is one
        forward over the current blocks of all of them, and where one ends the next request takes its place.

        Yields a request's number and its state, the same object every time, after each of its denoising steps, and once
        more with `block_finished` after a block. A prompt and at least one answer token must fit a cache in whole
        blocks; all requests have the same `block_length`. What is yielded of a request does not depend on the others,
        but for the rounding of products of other shapes.
        """
        waiting = enumerate(requests)
        free = list(range(len(self.caches) if together is None else min(together, len(self.caches))))
        active: list[Lane] = []
        while True:
            entering: list[Lane] = []
            while free and self._room_for([*active, *entering]) and (following := next(waiting, None)) is not None:
                entering.append(self._enter(free.pop(0), *following))
            self._prefill(entering)
            yield from ((lane.number, lane.state) for lane in entering if lane.state.finish_reason is not None)
            free += [lane.index for lane in entering if lane.state.finish_reason is not None]
            active += [lane for lane in entering if lane.state.finish_reason is None]
            if not active and not entering:
                return
            if not active:
                continue
            self._step(active)
            for lane in active:
                yield from self._conclude(lane)
            free += [lane.index for lane in active if lane.state.finish_reason is not None]
            active = [lane for lane in active if lane.state.finish_reason is None]

    def positions(self, block_length: int) -> int:
        """Most positions prompt and answer may have when blocks of this length must be denoised whole."""
        whole_blocks = self.caches[0].context // block_length * block_length
        return whole_blocks if self.context is None else min(self.context, whole_blocks)

    def _room_for(self, active: Sequence[Lane]) -> bool:
        """Whether a forward may hold one more block than those of `active`."""
        if self.forward_tokens is None or not active:
            return True
        return (len(active) + 1) * active[0].length <= self.forward_tokens

    def _enter(self, index: int, number: int, request: Request) -> Lane:
        """Give lane `index` to a request, of which nothing is computed yet."""
        prompt, length = list(request.prompt), request.params.block_length
        whole = len(prompt) // length * length
        end = min(len(prompt) + request.params.max_new_tokens, self.positions(length))
        state = DecodingState(prompt[:whole], len(prompt), end, len(prompt) // length, lane=index)
        cache = self.caches[index]
        cache.reset()
        return Lane(index, cache, number, request, state, _generator(request.params, cache.keys.device))

    def _prefill(self, entering: Sequence[Lane]) -> None:
        """Bring the whole blocks of the prompts into their caches, and open the first block of each answer.

        As many prompts as the memory plan has room for go through the layers together: one long one, or some short.
        """
        for group in packed(entering, lambda lane: len(lane.state.ids), self.caches[0].context):
            long = [lane for lane in group if lane.state.ids]
            passes = [BlockPass(Phase.PREFILL, lane.index, 0, 0, len(lane.state.ids)) for lane in long]
            shares = [(lane, lane.state.ids) for lane in long]
            remembered = not long or self._remember(
                shares,
                passes,
                lambda: all(lane.request.cancelled() for lane in long),  # noqa: B023 (called at once)
            )
            for lane in group:
                if remembered or lane not in long:
                    lane.state.open_block(lane.request.prompt, lane.length, self.mask_token_id)
                else:
                    lane.state.ids = list(lane.request.prompt)
                    lane.state.finish("cancelled", 0)
                    lane.state.block_finished = True

    @torch.inference_mode()
    def _remember(
        self,
        shares: Sequence[tuple[Lane, list[int]]],
        passes: Sequence[BlockPass],
        cancelled: Callable[[], bool] = never,
    ) -> bool:
        """Bring ids, whole blocks, into the caches of their lanes. False if cancelled on the way."""
        length = shares[0][0].length
        chunk = max(1, self.prefill_chunk // length) * length
        spans = [
            lane.cache.span(min(chunk, len(ids) - start), length, start)
            for lane, ids in shares
            for start in range(0, len(ids), chunk)
        ]
        info = ForwardInfo.of(passes)
        pieces = [self._forward(info, together) for together in packed(spans, lambda span: span.tokens, chunk)]
        token_ids = torch.tensor([token for _lane, ids in shares for token in ids])
        with self._computing(info.phase):
            if not self.model.prefill(token_ids, pieces, cancelled):
                return False
            for lane, ids in shares:
                lane.cache.commit(len(ids))
        return True

    @contextmanager
    def _computing(self, phase: Phase) -> Iterator[None]:
        self.stats.forwards[phase] = self.stats.forwards.get(phase, 0) + 1
        with self.stats.phase(phase), compute_threads(self.threads):
            yield

    def _forward(self, info: ForwardInfo, spans: Sequence[Span]) -> Forward:
        positions = torch.cat([span.positions for span in spans])
        length = spans[0].block_length
        blocks = torch.arange(len(positions), device=positions.device) // length
        return Forward(info, positions, blocks, side_by_side(spans), self.policy, self.experts)

    @torch.inference_mode()
    def _step(self, active: Sequence[Lane]) -> None:
        """One denoising step of the current blocks of all of `active`, in one forward."""
        fused = self._commit_alone(active)
        with self._computing(Phase.DENOISE):
            hidden = self._denoise(active, fused)
            masked = [lane.state.masked(lane.length, self.mask_token_id) for lane in active]
            chosen = [
                rows[torch.tensor(places, device=rows.device) - lane.state.block * lane.length]
                for lane, rows, places in zip(active, hidden, masked, strict=True)
            ]
            proposals = self._propose(active, chosen)
            for lane, places, proposal in zip(active, masked, proposals, strict=True):
                _unmask(lane, places, proposal)
        self.stats.denoise_steps += len(active)

    def _commit_alone(self, active: Sequence[Lane]) -> list[bool]:
        """Commit the finished blocks that the coming step is not to commit; which lanes it is to commit for."""
        room = len(active) if self.forward_tokens is None else self.forward_tokens // active[0].length - len(active)
        fused: list[bool] = []
        for lane in active:
            fuse = lane.uncommitted and self.fused_commit and sum(fused) < room
            if lane.uncommitted and not fuse:
                start = (lane.state.block - 1) * lane.length
                finished = lane.state.ids[start : start + lane.length]
                self._remember([(lane, finished)], [lane.block_pass(Phase.COMMIT)])
                lane.uncommitted = False
            fused.append(fuse)
        return fused

    def _denoise(self, active: Sequence[Lane], fused: Sequence[bool]) -> list[Tensor]:
        """Forward the current blocks, each behind the finished one where that is `fused`; hidden states [B, H] of each
        current block.
        """
        ids: list[int] = []
        spans, passes = [], []
        for lane, fuse in zip(active, fused, strict=True):
            blocks = 2 if fuse else 1
            ids += lane.state.ids[-blocks * lane.length :]
            spans.append(lane.cache.span(blocks * lane.length, lane.length))
            passes += [lane.block_pass(Phase.COMMIT)] if fuse else []
            passes.append(lane.block_pass(Phase.DENOISE))
        forward = self._forward(ForwardInfo.of(passes), spans)
        hidden = self.model(torch.tensor(ids), forward)
        for lane, fuse in zip(active, fused, strict=True):
            if fuse:
                lane.cache.commit(lane.length)
                lane.uncommitted = False
        parts = hidden.split([span.tokens for span in spans])
        return [rows[-lane.length :] for lane, rows in zip(active, parts, strict=True)]

    def _propose(self, active: Sequence[Lane], chosen: Sequence[Tensor]) -> list[Proposal]:
        """Proposals for the rows [n, H] of each lane, a few at a time: logits over a large vocabulary are the largest
        activations there are, and the head that makes them the largest matrix.

        Only whole lots of a lane go together with another's, so that what is drawn for it doesn't depend on the batch.
        """
        lots = [(lane, part) for lane, rows in zip(active, chosen, strict=True) for part in rows.split(LOGIT_ROWS)]
        found: dict[int, list[Proposal]] = {lane.index: [] for lane in active}
        for group in packed(lots, lambda lot: len(lot[1]), LOGIT_ROWS):
            logits = self.model.logits(torch.cat([part for _lane, part in group]))
            for (lane, _part), own in zip(group, logits.split([len(part) for _lane, part in group]), strict=True):
                params = lane.request.params
                found[lane.index].append(propose(own, self.mask_token_id, params, lane.generator))
        return [
            Proposal(torch.cat([one.tokens for one in parts]), torch.cat([one.confidence for one in parts]))
            for parts in found.values()
        ]

    def _conclude(self, lane: Lane) -> Iterator[tuple[int, DecodingState]]:
        """See whether the step that was just taken ends the block or the answer, and tell of it."""
        state, request = lane.state, lane.request
        state.check_end(self.mask_token_id, self.eos_token_id, request.stop)
        if state.finish_reason is None and request.cancelled():
            state.finish("cancelled", state.decided(self.mask_token_id))
        yield lane.number, state
        if state.finish_reason is None and state.masked(lane.length, self.mask_token_id):
            return
        if state.finish_reason is None and len(state.ids) >= state.end:
            state.finish("length", state.end - state.prompt_length)
        state.block_finished = True
        self.stats.blocks += 1
        yield lane.number, state
        if state.finish_reason is None:
            lane.uncommitted = True
            state.block += 1
            state.open_block(request.prompt, lane.length, self.mask_token_id)


def packed(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """Consecutive items in groups whose sizes add up to at most `most`; a larger item is a group of its own."""
    group: list[Item] = []
    for item in items:
        if group and sum(map(size, group)) + size(item) > most:
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _unmask(lane: Lane, places: Sequence[int], proposal: Proposal) -> None:
    """Take a step's proposals for the masked `places` of a block."""
    state, params = lane.state, lane.request.params
    if not bool(proposal.confidence.isfinite().all()):
        raise ModelError(
            f"the model's logits are not finite in block {state.block}, step {state.step}: its weights are "
            "damaged, or its dtype overflows; check the checkpoint, or try dtype float32"
        )
    chosen = accept(proposal.confidence, lane.schedule[state.step], params.threshold)
    proposed = zip(places, proposal.tokens.tolist(), proposal.confidence.tolist(), chosen.tolist(), strict=True)
    state.accepted = tuple((place, token, sure) for place, token, sure, yes in proposed if yes)
    for place, token, _sure in state.accepted:
        state.ids[place] = token
    state.step += 1


def _generator(params: SamplingParams, device: torch.device) -> torch.Generator | None:
    if params.temperature == 0:
        return None
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    return torch.Generator(device).manual_seed(seed)
