"""Answers in OpenAI's words: whole ones, and streams of chunks."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any, Literal

from offload_engine.core import Completion
from offload_engine.server.failures import encoded, refusal_of
from offload_engine.server.following import Following

DONE = b"data: [DONE]\n\n"


class Wire:
    """One response of /v1/chat/completions or /v1/completions."""

    def __init__(self, kind: Literal["chat", "text"], model: str) -> None:
        self._chat = kind == "chat"
        self._common = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, following: Following, done: Completion) -> dict[str, Any]:
        """The response of a request that isn't streamed."""
        content: dict[str, Any] = {"text": done.text}
        if self._chat:
            content = {"message": {"role": "assistant", "content": done.text, "refusal": None}}
        choice = {"index": 0, **content, "logprobs": None, **_ending(following)}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._common, "object": kind, "choices": [choice], "usage": usage(done)}

    async def stream(self, following: Following, *, include_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events, a chunk per finished block. An error on the way is the last event."""
        extra: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            if self._chat:
                yield self._chunk({"role": "assistant", "content": ""}, extra)
            async for event in following.events():
                if event.text:
                    yield self._chunk({"content": event.text}, extra)
            yield self._chunk({}, extra, _ending(following))
            if include_usage:
                assert following.completion is not None
                yield event_of(
                    {**self._common, "object": self._kind, "choices": [], "usage": usage(following.completion)}
                )
            yield DONE
        except Exception as error:
            following.record.error = error
            yield event_of(refusal_of(error).body)

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, delta: dict[str, Any], extra: dict[str, Any], ending: dict[str, Any] | None = None) -> bytes:
        content = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **content, "logprobs": None, **(ending or {"finish_reason": None})}
        return event_of({**self._common, "object": self._kind, "choices": [choice], **extra})


def event_of(content: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + encoded(content) + b"\n\n"


def usage(done: Completion) -> dict[str, Any]:
    """Tokens of the prompt, those of them that an earlier turn had left computed, and of the answer."""
    prompt, answer = done.stats.prompt_tokens, done.stats.new_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": done.stats.prompt_tokens_reused},
    }


def _ending(following: Following) -> dict[str, Any]:
    return {"finish_reason": following.finish_reason, "stop_reason": following.stop_reason}
