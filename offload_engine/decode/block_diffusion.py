"""The forwards of block diffusion against prefix caches (REFERENCE §2), over one sequence or several together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from offload_engine.core import BlockPass, ForwardInfo, Phase
from offload_engine.decode.grouping import Grouping
from offload_engine.decode.kv_cache import PrefixCache, Span, places_of, side_by_side
from offload_engine.decode.lane import Lane, generator_of
from offload_engine.decode.reuse import choose
from offload_engine.decode.sampler import Proposal, propose
from offload_engine.decode.state import DecodingState, Request, never
from offload_engine.decode.threads import compute_threads
from offload_engine.errors import ModelError
from offload_engine.metrics import EngineStats
from offload_engine.model.graphs import LayerGraphs, StepGraphs
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertExecutor
from offload_engine.routing.base import RoutingPolicy

Item = TypeVar("Item")

LOGIT_ROWS = 32
"""Positions whose logits are taken together."""


@dataclass(slots=True)
class BlockDiffusionDecoder:
    """Prefills and denoises lanes with one model and one expert executor; `Batch` says which, and when."""

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
    grouping: Grouping | None = None
    """Says how many lanes go together; None: all."""
    graphs: LayerGraphs | None = None
    """Replays attention and router of a denoising step of one lane that commits nothing; None: nobody does."""
    order: list[int] = field(init=False)
    """The lanes by their last use, the newest last."""

    def __post_init__(self) -> None:
        self.order = list(range(len(self.caches)))

    def positions(self, block_length: int) -> int:
        """Most positions prompt and answer may have when blocks of this length must be denoised whole."""
        whole_blocks = self.caches[0].context // block_length * block_length
        return whole_blocks if self.context is None else min(self.context, whole_blocks)

    def lane(self, free: Sequence[int], number: int, request: Request, reuse: bool = False) -> Lane:
        """Give one of the `free` lanes, the least recently used of which comes first, to a request, of which nothing is
        computed yet; but `reuse` what any lane holds of its prompt.
        """
        prompt, length = list(request.prompt), request.params.block_length
        policy = self.policy if request.policy is None else request.policy
        whole = len(prompt) // length * length
        held = [cache.held_by(policy, length) if reuse else [] for cache in self.caches]
        start = choose(held, free, prompt[:whole], length)
        cache = self.caches[start.lane]
        if start.source == start.lane:
            cache.keep(start.positions)
        else:
            cache.begin_like(self.caches[start.source], start.positions)
        cache.policy, cache.block_length = policy, length
        end = min(len(prompt) + request.params.max_new_tokens, self.positions(length))
        state = DecodingState(prompt[:whole], len(prompt), end, len(prompt) // length, lane=start.lane)
        state.reused = start.positions
        self.stats.prompt_tokens_reused += start.positions
        return Lane(start.lane, cache, number, request, policy, state, generator_of(request.params, cache.keys.device))

    def prefill(self, lanes: Sequence[Lane]) -> None:
        """Bring what is missing of the prompts' whole blocks into the caches of `lanes`, all of one kind, and open the
        first block of each answer. Where all are cancelled on the way, so are their answers.
        """
        long = [lane for lane in lanes if lane.missing]
        passes = [
            BlockPass(Phase.PREFILL, lane.index, lane.cache.length // lane.length, 0, len(lane.missing))
            for lane in long
        ]
        remembered = not long or self._remember(
            [(lane, lane.missing) for lane in long],
            passes,
            lambda: all(lane.request.cancelled() for lane in long),
        )
        for lane in lanes:
            if remembered or lane not in long:
                lane.state.open_block(lane.request.prompt, lane.length, self.mask_token_id)
            else:
                lane.state.ids = list(lane.request.prompt)
                lane.cancel(self.mask_token_id)

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
        policy = shares[0][0].policy
        pieces = [self._forward(info, part, policy) for part in packed(spans, lambda span: span.tokens, chunk)]
        token_ids = torch.tensor([token for _lane, ids in shares for token in ids])
        with self._computing(info.phase):
            if not self.model.prefill(token_ids, pieces, cancelled):
                return False
            for lane, ids in shares:
                lane.cache.commit(ids)
        return True

    @contextmanager
    def _computing(self, phase: Phase) -> Iterator[None]:
        self.stats.forwards[phase] = self.stats.forwards.get(phase, 0) + 1
        with self.stats.phase(phase), compute_threads(self.threads):
            yield

    def _forward(self, info: ForwardInfo, spans: Sequence[Span], policy: RoutingPolicy) -> Forward:
        positions = torch.cat([span.positions for span in spans])
        length = spans[0].block_length
        blocks = torch.arange(len(positions), device=positions.device) // length
        places = places_of(spans)
        return Forward(info, positions, blocks, side_by_side(spans), policy, self.experts, places=places)

    @torch.inference_mode()
    def step(self, lanes: Sequence[Lane]) -> None:
        """One denoising step of the current blocks of all `lanes`, which are of one kind, in one forward.

        What is wrong with one lane's logits becomes the error of its state. If this raises, no lane has taken the step.
        """
        fused = self._commit_alone(lanes)
        if self.grouping is not None:
            self.grouping.begin(lanes[0].kind)
        with self._computing(Phase.DENOISE):
            hidden = self._denoise(lanes, fused)
            masked = [lane.state.masked(lane.length, self.mask_token_id) for lane in lanes]
            chosen = [
                rows[torch.tensor(places, device=rows.device) - lane.state.block * lane.length]
                for lane, rows, places in zip(lanes, hidden, masked, strict=True)
            ]
            proposals = self._propose(lanes, chosen)
            for lane, places, proposal in zip(lanes, masked, proposals, strict=True):
                try:
                    lane.unmask(places, proposal)
                except ModelError as error:
                    lane.state.error = error
        self.stats.denoise_steps += len(lanes)

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
        forward = self._forward(ForwardInfo.of(passes), spans, active[0].policy)
        if self.graphs is not None and len(spans) == 1 and not any(fused):
            forward = replace(forward, graphs=StepGraphs(self.graphs, spans[0].place))
        hidden = self.model(torch.tensor(ids), forward)
        for lane, fuse in zip(active, fused, strict=True):
            if fuse:
                lane.cache.commit(lane.state.ids[-2 * lane.length : -lane.length])
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
