"""Server-sent events as a response that notices when nobody listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

PING_SECONDS = 15.0
"""A stream with nothing to say says a comment this often, so that nothing on the way takes it for dead."""
HEADERS: Mapping[str, str] = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(StreamingResponse):
    """Sends events as they come, and calls `closing` when the stream has ended or the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], closing: Callable[[], None]) -> None:
        super().__init__(_with_pings(events), headers=HEADERS)
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI. Starlette cancels the stream when the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._closing()


async def _with_pings(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`events`, with a comment wherever nothing comes for a while."""
    following = asyncio.ensure_future(anext(events, None))
    try:
        while True:
            await asyncio.wait({following}, timeout=PING_SECONDS)
            if not following.done():
                yield b": waiting\n\n"
                continue
            event = following.result()
            if event is None:
                return
            yield event
            following = asyncio.ensure_future(anext(events, None))
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await following
