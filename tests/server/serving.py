"""A server of this process, in a thread, and the requests that tests send it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from offload_engine.engine.engine import Engine
from offload_engine.server.running import Server, bind, url_of
from offload_engine.server.settings import ServerSettings

PROBLEM = "A box holds 12 pencils. How many pencils are in 7 boxes?"
ANSWER = "\\boxed{84}"
ENDLESS = {"threshold": 1.0, "max_tokens": 1900}
"""Of an engine whose eos never comes: thousands of steps."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server that listens."""

    url: str
    server: Server
    http: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        url = httpx.URL(self.url)
        return url.host, url.port or 0

    def chat(self, content: Any = PROBLEM, **fields: Any) -> httpx.Response:
        """One chat completion."""
        return self.http.post("/v1/chat/completions", json=chat_body(content, **fields))

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(self.address, timeout=30)


def chat_body(content: Any = PROBLEM, **fields: Any) -> dict[str, Any]:
    """A body of /v1/chat/completions."""
    return {"messages": [{"role": "user", "content": content}], **fields}


def raw_request(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    """A whole request as bytes."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


@contextmanager
def serving(engine: Engine, **settings: Any) -> Iterator[Served]:
    """A server of `engine`, drained when the body ends."""
    chosen = ServerSettings(**{"port": 0, "drain": 0.0, **settings})
    with bind(chosen) as listener:
        url = url_of(listener)
        server = Server(engine, chosen)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            until(lambda: server.started)
            with httpx.Client(base_url=url, timeout=60) as http:
                yield Served(url, server, http)
        finally:
            server.should_exit = True
            thread.join(timeout=60)
            assert not thread.is_alive()


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for it; a test that waits in vain has failed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.005)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error that `response` holds, having seen that it is in OpenAI's format."""
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def events_of(response: httpx.Response) -> list[tuple[str | None, dict[str, Any]]]:
    """The server-sent events of a whole response: name and data."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in event.splitlines())
        found.append((lines.get("event"), json.loads(lines["data"])))
    return found
