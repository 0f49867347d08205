"""What every request passes before a handler sees it: who asks, from where, how much, and how fast."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offload_engine.config import format_bytes
from offload_engine.server.failures import RefusedError
from offload_engine.server.settings import ServerSettings, is_loopback

BODIES_IN_MEMORY = 16
"""Bodies of the largest size that may be held at a time; what comes beyond that is told to come again."""
OPEN_PATHS = ("/", "/health")
"""What needs no key, beside the page's own files: nothing here tells anything."""
PAGE = "/page/"


class Guard:
    """ASGI middleware. Hands a request on with its whole body read, or refuses it with OpenAI's error format.

    Without an API key only this machine is served, and a browser on it could be made to ask by any page it shows: so
    the Host must be a loopback name (else a page whose name was pointed at 127.0.0.1 would be let in), an Origin must
    be the server's own or an allowed one, and a body must be JSON by its Content-Type, which no form can send.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings) -> None:
        self._app = app
        self._settings = settings
        self._key = None if settings.api_key is None else _digest(settings.api_key.encode())
        self._held = 0
        """Bytes of bodies in memory."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = b""
        try:
            headers = _headers(scope)
            self._check_place(headers)
            self._check_key(scope, headers)
            if scope["method"] == "POST":
                _check_kind(headers)
                body = await self._read(headers, receive)
        except RefusedError as refusal:
            # the rest of its body may still come, and would be taken for the next request
            refusal.headers.setdefault("Connection", "close")
            await refusal.response()(scope, receive, send)
            return
        try:
            await self._app(scope, _replayed(body, receive), send)
        finally:
            self._held -= len(body)

    def _check_place(self, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = _name_of(host)
        if self._key is None and not is_loopback(name):
            raise RefusedError(403, f"Host is {name[:80]!r}; without an API key this server answers to localhost alone")
        origin = headers.get(b"origin")
        if origin is None or origin.decode("latin-1") in self._settings.allow_origins:
            return
        if urlsplit(origin.decode("latin-1")).netloc != host:
            raise RefusedError(403, "pages of this origin may not use the server; start it with --allow-origin")

    def _check_key(self, scope: Scope, headers: Mapping[bytes, bytes]) -> None:
        path = scope["path"]
        if self._key is None or path in OPEN_PATHS or path.startswith(PAGE) or scope["method"] == "OPTIONS":
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # digests are of one length, so that comparing them tells nothing about the key, its length included
        if not hmac.compare_digest(_digest(given.strip()), self._key) or scheme.lower() != b"bearer":
            raise RefusedError(
                401,
                "no API key was sent, or a wrong one; send the header 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        """The body; `_held` counts it from now on."""
        most = self._settings.max_body
        if int(headers.get(b"content-length", b"0")) > most:  # h11 has seen to it that it is a number
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.patience):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise RefusedError(400, "the client went away")
                    part = message.get("body", b"")
                    if len(body) + len(part) > most:
                        raise _too_large(most)
                    if self._held + len(part) > BODIES_IN_MEMORY * most:
                        raise RefusedError(
                            503, "too many large requests", code="overloaded", headers={"Retry-After": "1"}
                        )
                    body += part
                    self._held += len(part)
                    more = message.get("more_body", False)
        except BaseException as error:
            self._held -= len(body)
            if isinstance(error, TimeoutError):
                wanted = f"the body did not come within {self._settings.patience:g} s"
                raise RefusedError(408, wanted, code="timeout", headers={"x-should-retry": "false"}) from None
            raise
        return bytes(body)


def _check_kind(headers: Mapping[bytes, bytes]) -> None:
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind != b"application/json":
        found = kind.decode("latin-1")[:80] or "missing"
        raise RefusedError(415, f"Content-Type is {found!r}; wanted application/json")
    coding = headers.get(b"content-encoding", b"identity").strip().lower()
    if coding != b"identity":
        raise RefusedError(415, f"Content-Encoding is {coding.decode('latin-1')[:80]!r}; send the body as it is")


def _too_large(most: int) -> RefusedError:
    return RefusedError(413, f"the body is larger than {format_bytes(most)}", code="body_too_large")


def _headers(scope: Scope) -> dict[bytes, bytes]:
    """By name in lower case; one given twice is refused where it would matter which of them counts."""
    found: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        if name in found and name in (b"host", b"authorization", b"origin", b"content-type"):
            raise RefusedError(400, f"the header {name.decode('latin-1')!r} was sent twice")
        found[name] = value
    return found


def _name_of(host: str) -> str:
    """Of a Host header, without port and brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with the whole body."""
    first: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
