"""One JSON object per line and request. What was asked and answered is in none of them, unless that is wanted."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offload_engine.server.failures import refusal_of
from offload_engine.server.statistics import Telemetry

LOGGER = logging.getLogger("offload_engine.server")
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


@dataclass(slots=True)
class Record:
    """What a handler adds to the line of its request."""

    id: str
    details: dict[str, Any] = field(default_factory=dict)
    first: float | None = None
    """Seconds until the answer's first step."""
    error: Exception | None = None
    """What went wrong after the response had begun."""


def record_of(scope: MutableMapping[str, Any]) -> Record:
    """The record of the request that `scope` is of."""
    record: Record = scope["offload_engine.record"]
    return record


class RequestLog:
    """ASGI middleware, the outermost: gives a request its id, logs and counts it, answers for handlers that failed."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        record = scope["offload_engine.record"] = Record(uuid.uuid4().hex)
        status = 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", record.id.encode()), *SAFE_HEADERS]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            record.error = error
            if not status:
                await refusal_of(error).response()(scope, receive, noting)
        finally:
            self._note(scope, record, status, time.perf_counter() - began)

    def _note(self, scope: Scope, record: Record, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "none")  # the pattern: a path is the client's to make up
        self._telemetry.requests.labels(route, str(status)).inc()
        self._telemetry.seconds.labels(route).observe(seconds)
        if record.first is not None:
            self._telemetry.first.observe(record.first)
        client = scope.get("client")
        line = {
            "id": record.id,
            "client": client[0] if client else None,
            "method": scope["method"][:16],
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            **record.details,
        }
        failed = record.error is not None and refusal_of(record.error).status == 500
        LOGGER.log(
            logging.ERROR if failed else logging.INFO,
            "request",
            extra={"fields": line},
            exc_info=record.error if failed else None,
        )


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON. Of an exception it tells type and places; its message, which may quote a prompt,
    only where prompts may be logged.
    """

    def __init__(self, *, prompts: bool = False) -> None:
        super().__init__()
        self._prompts = prompts

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1].__cause__ or record.exc_info[1]
            line["error"] = type(error).__name__ + (f": {error}" if self._prompts else "")
            frames = traceback.extract_tb(error.__traceback__)
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
        return json.dumps(line, default=str)


def log_to(stream: TextIO | None = None, *, prompts: bool = False) -> logging.Handler:
    """Write the server's log, and what uvicorn has to say of importance, to `stream` (None: standard output)."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonFormatter(prompts=prompts))
    for logger, level in ((LOGGER, logging.INFO), (logging.getLogger("uvicorn"), logging.ERROR)):
        logger.setLevel(level)
        logger.propagate = False
        logger.addHandler(handler)
    return handler
