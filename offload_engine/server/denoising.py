"""An answer as it is denoised: events for whoever wants to watch masks turn into words, and experts move."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from torch import Tensor

from offload_engine.core import StepEvent
from offload_engine.engine.engine import Engine
from offload_engine.server.bodies import Job
from offload_engine.server.failures import refusal_of
from offload_engine.server.following import Following
from offload_engine.server.wire import event_of, usage
from offload_engine.text.pieces import token_texts

COUNTED = (
    "denoise_steps",
    "new_tokens",
    "unique_experts",
    "hit_rate",
    "bytes_moved",
    "bytes_read",
    "loads",
    "stall_share",
    "wall_seconds",
)
"""What of the engine's statistics goes with every step."""

Seen = dict[str, Any]


class Denoising:
    """Watches one request, for as long as the engine's `activity` is watched.

    `observe` runs on the engine's thread, where what it sees belongs to the step just taken; `stream` runs on the event
    loop.
    """

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self._job = job
        self._before = engine.stats.snapshot()
        self._uses: Tensor = engine.activity.uses()
        self._seen: deque[Seen] = deque()
        """Of the steps told of and not sent yet, in order."""

    def observe(self, _event: StepEvent) -> None:
        """Keep what belongs to an event and can't be asked for later."""
        activity = self._engine.activity
        uses = activity.uses()
        used, self._uses = uses - self._uses, uses
        self._seen.append(
            {
                "counters": self._counters(),
                "experts": {"held": activity.rows(), "used": [_places(row) for row in used]},
            }
        )

    async def stream(self, following: Following, model: str) -> AsyncIterator[bytes]:
        """Server-sent events `begin`, `step`, `block`, `end` and `error`."""
        policy = self._job.routing or self._engine.routing_name
        shape = {"layers": self._engine.activity.layers, "experts": self._engine.model_config.num_experts}
        begin = {"model": model, "routing": policy, "block_length": self._job.params.block_length, **shape}
        yield event_of(begin, "begin")
        try:
            async for event in following.events():
                seen = self._seen.popleft() if self._seen else {}
                yield event_of(self._told(event) | seen, event.kind)
            yield event_of(self._end(following), "end")
        except Exception as error:
            following.record.error = error
            yield event_of(refusal_of(error).body, "error")

    def _told(self, event: StepEvent) -> Seen:
        """The block as it stands: a cell is null while masked, else its text; and what this step decided."""
        mask, eos = self._engine.mask_token_id, self._engine.eos_token_id
        signs = {token: "" for token in (mask, eos) if token is not None}
        texts = token_texts(event.block_token_ids, signs, self._engine.tokenizer)
        cells = [None if id_ == mask else text for id_, text in zip(event.block_token_ids, texts, strict=True)]
        accepted = [[place, round(sure, 4)] for place, _token, sure in event.accepted]
        return {"block": event.block, "step": event.step, "cells": cells, "accepted": accepted, "text": event.text}

    def _counters(self) -> Seen:
        stats = self._engine.stats.since(self._before)
        return {name: getattr(stats, name) for name in COUNTED}

    def _end(self, following: Following) -> Seen:
        done = following.completion
        assert done is not None
        return {
            "text": done.text,
            "finish_reason": following.finish_reason,
            "stop_reason": following.stop_reason,
            "usage": usage(done),
            "counters": {name: getattr(done.stats, name) for name in (*COUNTED, "tokens_per_second")},
        }


def _places(row: Tensor) -> list[int]:
    places: list[int] = row.nonzero().flatten().tolist()
    return places
