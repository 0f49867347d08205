"""Requests under way together: who has which lane, whose turn it is, and what becomes of an answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

from offload_engine.decode.block_diffusion import BlockDiffusionDecoder, packed
from offload_engine.decode.lane import Lane
from offload_engine.decode.state import DecodingState, Request
from offload_engine.decode.turns import Turns
from offload_engine.errors import EngineClosedError
from offload_engine.memory.plan import prompt_tokens

Told = tuple[int, DecodingState]
"""A request's number and its state, the same object every time."""


class Batch:
    """Answers the requests in a decoder's lanes, step by step; requests may enter between any two steps.

    What is told of a request does not depend on the others, but for the rounding of products of other shapes. Nor does
    its failure: where a forward over several lanes fails, each is tried by itself.
    """

    def __init__(
        self,
        decoder: BlockDiffusionDecoder,
        lanes: int | None = None,
        turn_blocks: int | None = None,
        reuse: bool = False,
    ) -> None:
        """At most `lanes` requests at a time, None: as many as there are caches. `turn_blocks`: see `Turns`. `reuse`:
        begin with the keys and values that earlier requests left of what a prompt begins with.
        """
        self._decoder = decoder
        self._most = len(decoder.caches) if lanes is None else min(lanes, len(decoder.caches))
        self._reuse = reuse
        self._entering: list[Lane] = []
        self._active: dict[int, Lane] = {}
        """By index."""
        self._turns = Turns(self._group_size, turn_blocks)

    @property
    def has_room(self) -> bool:
        """Whether a lane is free."""
        return len(self._entering) + len(self._active) < self._most

    @property
    def empty(self) -> bool:
        """Whether no request is under way."""
        return not self._entering and not self._active

    def enter(self, number: int, request: Request) -> None:
        """Give a free lane to a request. A prompt and at least one answer token must fit a cache in whole blocks."""
        taken = {lane.index for lane in self._entering} | set(self._active)
        free = [index for index in self._decoder.order if index not in taken]
        self._entering.append(self._decoder.lane(free, number, request, self._reuse))

    def advance(self) -> Iterator[Told]:
        """Prefill who has entered, then take a denoising step of those whose turn it is; to be consumed whole.

        Yields after each step of a request, once more with `block_finished` after a block, and last with a finish
        reason or an error, when the lane is free again.
        """
        entering, self._entering = self._entering, []
        for group in self._prefills(entering):
            self._attempt(group, self._decoder.prefill)
        for lane in entering:
            if lane.over:
                yield from self._end(lane)
            else:
                self._active[lane.index] = lane
                self._turns.enter(lane.index, lane.kind)
        turn = [self._active[index] for index in self._turns.next()]
        for lane in [one for one in self._active.values() if one not in turn and one.request.cancelled()]:
            lane.cancel(self._decoder.mask_token_id)
            yield from self._end(lane)
        if turn:
            self._attempt(turn, self._decoder.step)
        for lane in turn:
            yield from self._conclude(lane)

    def _prefills(self, entering: Sequence[Lane]) -> Iterator[list[Lane]]:
        """As many prompts as the plan has room for go through the layers together: one long one, or some short."""
        by_kind: dict[Hashable, list[Lane]] = {}
        for lane in entering:
            by_kind.setdefault(lane.kind, []).append(lane)
        for lanes in by_kind.values():
            most = prompt_tokens(self._decoder.caches[0].context, len(self._decoder.caches))
            yield from packed(lanes, lambda lane: len(lane.missing), most)

    def _attempt(self, lanes: Sequence[Lane], work: Callable[[Sequence[Lane]], None]) -> None:
        """Do `work` for all `lanes`; if that fails, one at a time. Who fails alone has its error."""
        try:
            work(lanes)
        except EngineClosedError:
            raise
        except Exception as error:  # whatever it is, the other requests are no part of it
            if len(lanes) == 1:
                lanes[0].state.error = error
                return
            for lane in lanes:
                self._attempt([lane], work)

    def _group_size(self, kind: Hashable, lanes: int) -> int:
        decoder = self._decoder
        length = next(lane.length for lane in self._active.values() if lane.kind == kind)
        room = lanes if decoder.forward_tokens is None else decoder.forward_tokens // length
        wanted = lanes if decoder.grouping is None else decoder.grouping.together(kind, lanes)
        decoder.stats.lanes_together = max(1, min(wanted, room))
        return decoder.stats.lanes_together

    def _conclude(self, lane: Lane) -> Iterator[Told]:
        """See whether the step that was just taken ends the block or the answer, and tell of it."""
        state, mask = lane.state, self._decoder.mask_token_id
        if state.error is None:
            self._attempt([lane], self._check_end)
        if state.error is None:
            yield lane.number, state
            if state.finish_reason is None and state.masked(lane.length, mask):
                return
            if state.finish_reason is None and len(state.ids) >= state.end:
                state.finish("length", state.end - state.prompt_length)
            state.block_finished = True
            self._decoder.stats.blocks += 1
        if lane.over:
            yield from self._end(lane)
            return
        yield lane.number, state
        lane.uncommitted = True
        state.block += 1
        state.open_block(lane.request.prompt, lane.length, mask)
        self._turns.end_block(lane.index)

    def _check_end(self, lanes: Sequence[Lane]) -> None:
        """Early stop: an eos or a stop string, or nobody wants more."""
        (lane,) = lanes
        state, request, mask = lane.state, lane.request, self._decoder.mask_token_id
        state.check_end(mask, self._decoder.eos_token_id, request.stop)
        if state.finish_reason is None and request.cancelled():
            state.finish("cancelled", state.decided(mask))

    def _end(self, lane: Lane) -> Iterator[Told]:
        """The answer is over; its lane is free."""
        if self._active.pop(lane.index, None) is not None:
            self._turns.leave(lane.index)
        if lane.state.error is not None:
            lane.cache.reset()  # who knows what is in there
        others = [index for index in self._decoder.order if index != lane.index]
        self._decoder.order = [*others, lane.index]  # at once: an interrupt must not lose a lane
        yield lane.number, lane.state


def decode_all(decoder: BlockDiffusionDecoder, requests: Iterable[Request], lanes: int | None = None) -> Iterator[Told]:
    """Answer requests, at most `lanes` at a time (None: as many as there are caches): where one ends the next takes its
    place, and the first to come are the first to end. See `Batch.advance` for what is yielded; a request's error is
    raised.
    """
    waiting = enumerate(requests)
    batch = Batch(decoder, lanes)
    while True:
        while batch.has_room and (following := next(waiting, None)) is not None:
            batch.enter(*following)
        if batch.empty:
            return
        for number, state in batch.advance():
            if state.error is not None:
                raise state.error
            yield number, state
