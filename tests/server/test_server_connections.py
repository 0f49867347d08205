"""Clients that are slow, many, or no HTTP clients at all."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

import httpx
import psutil
import pytest

from tests.server.serving import Served, chat_body, raw_request, serving, until

PATIENCE = 0.6


@pytest.fixture(scope="module")
def hasty(engine):
    """A server with little patience."""
    with serving(engine, patience=PATIENCE, max_connections=20) as served:
        yield served


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    found = b""
    with connection:
        while True:
            try:
                part = connection.recv(65536)
            except ConnectionResetError:
                return found
            if not part:
                return found
            found += part


def trickle(connection: socket.socket, content: bytes) -> None:
    """One byte at a time, more slowly than the server waits for all of them."""
    for byte in content:
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("first", [b"", b"GET /he"])
def test_headers_that_never_end(hasty: Served, first: bytes):
    connection = hasty.connect()
    connection.sendall(first)
    began = time.monotonic()
    found = everything(connection)
    assert b"408" in found.splitlines()[0]
    assert b'"code":"timeout"' in found
    assert PATIENCE <= time.monotonic() - began < PATIENCE + 5


def test_headers_that_trickle(hasty: Served):
    connection = hasty.connect()
    thread = threading.Thread(target=trickle, args=(connection, b"GET /health HTTP/1.1\r\nX-Slow: " + b"y" * 200))
    thread.start()
    began = time.monotonic()
    found = everything(connection)
    thread.join()
    assert b" 408 " in found
    assert time.monotonic() - began < 6


def test_headers_that_trickle_on_a_connection_that_was_used(hasty: Served):
    connection = hasty.connect()
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" in connection.recv(65536)
    thread = threading.Thread(target=trickle, args=(connection, b"GET /health HTTP/1.1\r\nX-Slow: " + b"y" * 200))
    thread.start()
    assert b" 408 " in everything(connection)
    thread.join()


def test_a_body_that_never_comes(hasty: Served):
    connection = hasty.connect()
    whole = raw_request(chat_body())
    connection.sendall(whole[:-5])
    found = everything(connection)
    assert b" 408 " in found
    assert b"the body did not come within 0.6 s" in found


def test_a_client_that_does_not_read(hasty: Served):
    before = len(hasty.server.server_state.connections)
    connection = hasty.connect()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    request = b"GET /v1/stats HTTP/1.1\r\nHost: localhost\r\n\r\n"
    connection.settimeout(0.2)
    try:
        for _ in range(5000):  # pipelined, until nothing goes either way
            connection.sendall(request)
    except TimeoutError:
        pass
    until(lambda: len(hasty.server.server_state.connections) <= before, 10)
    connection.close()


@pytest.mark.parametrize(
    "junk",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"HELO\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000,
    ],
    ids=range(7),
)
def test_what_is_no_http(hasty: Served, junk: bytes):
    connection = hasty.connect()
    connection.sendall(junk)
    head, _, body = everything(connection).partition(b"\r\n\r\n")
    assert head.split()[1] in (b"400", b"403", b"415"), head
    assert body.startswith(b'{"error":{"message":')


def test_many_connections(hasty: Served):
    crowd = [hasty.connect() for _ in range(30)]
    time.sleep(0.1)
    late = hasty.connect()
    late.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    found = everything(late)
    assert b" 503 " in found
    assert b'"code":"overloaded"' in found
    assert b"retry-after: 1" in found.lower()
    for connection in crowd:
        connection.close()
    until(lambda: len(hasty.server.server_state.connections) < 20)
    assert hasty.http.get("/health").status_code == 200


@pytest.mark.slow
def test_thousands_of_connects_leave_memory_as_it_was(hasty: Served):
    process, before = psutil.Process(), 0
    for wave in range(60):
        if wave == 10:  # what the first ones brought with them stays
            before = process.memory_info().rss
        crowd = []
        for _ in range(50):
            with suppress(OSError):
                crowd.append(hasty.connect())
        until(lambda: len(hasty.server.server_state.connections) <= 40)
        for connection in crowd:
            connection.close()
    until(lambda: len(hasty.server.server_state.connections) < 20)
    assert httpx.get(f"{hasty.url}/health").status_code == 200
    assert process.memory_info().rss - before < 8 << 20, "2500 connections, 3 KB of each"


def test_requests_in_a_row_on_one_connection(hasty: Served):
    until(lambda: len(hasty.server.server_state.connections) < 20)
    connection = hasty.connect()
    connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20)
    found = b""
    while found.count(b'{"status":"ok"}') < 20:
        part = connection.recv(65536)
        assert part
        found += part
    connection.close()
