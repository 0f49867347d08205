"""One connection of HTTP/1.1, and the patience the server has with whoever is at its other end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from offload_engine.server.failures import RefusedError, encoded

SWEEP_SECONDS = 1.0
"""How often connections are looked at."""


class Connection(H11Protocol):
    """A connection that is cut when its client is slow: to send a request's headers, or to take what it was sent.

    What is slow within a request's body is the `Guard`'s to judge. Bytes that trickle in buy no time.
    """

    patience = 20.0
    """Seconds."""
    most = 256
    """Connections that are answered; more get 503, and twice as many are not taken at all."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._idle_since: float | None = None
        """When the wait for a request's headers began; None while a request is answered."""
        self._stalled_since: float | None = None
        """When the client stopped to take what it is sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        if len(self.connections) > 2 * self.most:
            transport.abort()
        elif len(self.connections) > self.most:
            self.app = _overloaded

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        if self._answering:
            self._idle_since = None

    def on_response_complete(self) -> None:
        """A response was handed to the system."""
        self._idle_since = self.loop.time()
        super().on_response_complete()
        if self._answering:  # the next request had come already
            self._idle_since = None

    def pause_writing(self) -> None:
        """The client takes less than it is sent."""
        super().pause_writing()
        self._stalled_since = self.loop.time()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._stalled_since = None

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(RefusedError(400, msg.rstrip(".").lower(), code="invalid_http"))

    def cut_if_overdue(self, now: float) -> None:
        """End the connection if its client has owed something for too long; at once if it was ended before."""
        stalled, idle = self._stalled_since, self._idle_since
        if stalled is not None and now - stalled >= self.patience:
            self.transport.abort()
        elif idle is None or now - idle < self.patience:
            return
        elif self.transport.is_closing():  # and what was sent last is not taken
            self.transport.abort()
        else:
            self._idle_since = now
            self._refuse(RefusedError(408, f"no request came within {self.patience:g} s", code="timeout"))

    @property
    def _answering(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, refusal: RefusedError) -> None:
        """Answer what never became a request, and close."""
        body = encoded(refusal.body)
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        events: Iterable[h11.Event] = (
            h11.Response(status_code=refusal.status, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def _overloaded(_scope: Any, _receive: Any, send: Any) -> None:
    refusal = RefusedError(503, "too many connections", code="overloaded", headers={"Retry-After": "1"})
    body = encoded(refusal.body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"retry-after", b"1"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def keep_time(state: ServerState) -> None:
    """Cut what is overdue, until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        for connection in list(state.connections):
            if isinstance(connection, Connection):
                connection.cut_if_overdue(loop.time())
