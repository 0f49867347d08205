"""Everything that ends a request otherwise than with an answer, in OpenAI's error format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.responses import Response

from offload_engine.config import brief
from offload_engine.errors import (
    EngineClosedError,
    MemoryBudgetError,
    OffloadError,
    PromptError,
    QueueFullError,
    UsageError,
)


class RefusedError(Exception):
    """A request that is not answered, and what its client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param, self.code = param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI has it."""
        kind = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": str(self),
            "type": kind.get(self.status, fallback),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> Response:
        """The whole response."""
        return Response(encoded(self.body), self.status, self.headers, media_type="application/json")


def encoded(content: Any) -> bytes:
    """`content` as JSON in UTF-8. What can't be encoded, half of a surrogate pair, becomes a question mark."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


def refusal_of(error: Exception) -> RefusedError:
    """What a client is told of `error`. What isn't its own doing is told without particulars."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, QueueFullError):
        wait = max(1, math.ceil(error.retry_after))
        return RefusedError(429, str(error), code="queue_full", headers={"Retry-After": str(wait)})
    if isinstance(error, PromptError):
        code = "context_length_exceeded" if "the context holds" in str(error) else None
        return RefusedError(400, str(error), param="messages", code=code)
    if isinstance(error, UsageError):
        return RefusedError(400, str(error))
    if isinstance(error, EngineClosedError):
        return shutting_down()
    if isinstance(error, MemoryBudgetError):
        return RefusedError(503, "the system is short of memory; try again later", code="out_of_memory")
    if isinstance(error, OffloadError):
        return RefusedError(
            500, f"the model failed: {type(error).__name__}; the server's log has more", code="model_failed"
        )
    return RefusedError(500, "the server failed; its log has more", code="internal_error")


def refusal_of_status(status: int, headers: Mapping[str, str] | None = None) -> RefusedError:
    """For a status that routing decided on, such as 404 and 405."""
    return RefusedError(status, HTTPStatus(status).phrase.lower(), headers=headers)


def invalid_body(error: ValidationError) -> RefusedError:
    """The first complaint about a body, naming the field, the value found and what was wanted."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if not _is_branch(part))
    reason = first["msg"].removeprefix("Value error, ").replace("Input should be", "wanted", 1)
    reason = reason[:1].lower() + reason[1:]
    if first["type"] == "json_invalid":
        reason = reason.removeprefix("invalid JSON: ")
        return RefusedError(400, f"the body is not JSON in UTF-8: {reason}", code="invalid_json")
    if first["type"] == "missing":
        return RefusedError(400, f"{place!r} is missing", param=place, code="missing_required_parameter")
    if not place:
        return RefusedError(400, f"the body: {reason}")
    return RefusedError(400, f"{place!r} is {brief(first['input'])}; {reason}", param=place, code="invalid_value")


def shutting_down() -> RefusedError:
    """For requests that come, or could not be finished, while the server stops."""
    return RefusedError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "10"})


def too_late(seconds: float) -> RefusedError:
    """For a request whose deadline passed before anything was decided. Its client's library shouldn't ask again by
    itself: it would wait as long behind the same queue.
    """
    return RefusedError(
        504,
        f"no answer was begun within the server's deadline of {seconds:g} s; send fewer requests at a time",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )


def _is_branch(part: int | str) -> bool:
    """Whether a part of a place is pydantic's name for a member of a union rather than the client's for a field."""
    return isinstance(part, str) and (part[:1].isupper() or "[" in part or part in ("str", "int", "float", "bool"))
