"""A client that disconnects frees its place within one denoising step."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from offload_engine.decode.block_diffusion import BlockDiffusionDecoder
from offload_engine.decode.lane import Lane
from offload_engine.decode.session import Outcome, Session
from offload_engine.engine.batching import Ticket
from offload_engine.engine.engine import Engine
from offload_engine.server.connections import Connection
from tests.server.conftest import BUDGET
from tests.server.serving import ENDLESS, Served, chat_body, raw_request, serving, until

PATHS = ["/v1/chat/completions", "/v1/denoise"]
STEP = 0.01
"""Seconds that a step takes at least, so that the event loop hears of everything in time."""


class Gate:
    """Stands before and at the beginning of every denoising step: notes whose it is, and holds the model while shut."""

    def __init__(self) -> None:
        self.steps: list[set[int]] = []
        """The requests of each step that began, by number."""
        self.between = False
        """Whether it is shut between two steps rather than within one."""
        self._open = threading.Event()
        self._open.set()
        self._held = threading.Event()

    def begin(self, lanes: Sequence[Lane]) -> None:
        """A step begins."""
        self.steps.append({lane.number for lane in lanes})
        self.wait(between=False)
        time.sleep(STEP)

    def wait(self, between: bool) -> None:
        """The model comes by, between two steps or within one."""
        if between == self.between:
            self._held.set()
            assert self._open.wait(60)

    def count(self, number: int) -> int:
        """Steps that began for this request."""
        return sum(number in step for step in self.steps)

    def requests(self) -> set[int]:
        """All that have taken a step."""
        return set().union(*self.steps)

    @contextmanager
    def shut(self) -> Iterator[None]:
        """While open, the model stands still."""
        self._open.clear()
        self._held.clear()
        try:
            assert self._held.wait(30), "nobody comes by"
            yield
        finally:
            self._open.set()


class Seen:
    """What the server has noticed of clients that went away."""

    def __init__(self) -> None:
        self.lost = 0
        """Connections that the system said are gone."""
        self.cancelled: list[int] = []
        """The requests whose answers were given up for it, by number."""


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, step, advance = Gate(), BlockDiffusionDecoder.step, Session.advance

    def gated_step(decoder: BlockDiffusionDecoder, lanes: Sequence[Lane]) -> None:
        gate.begin(lanes)
        step(decoder, lanes)

    def gated_advance(session: Session) -> list[tuple[int, Outcome]]:
        gate.wait(between=True)
        return advance(session)

    monkeypatch.setattr(BlockDiffusionDecoder, "step", gated_step)
    monkeypatch.setattr(Session, "advance", gated_advance)
    return gate


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    seen, lost, cancel = Seen(), Connection.connection_lost, Ticket.cancel

    def note_loss(connection: Connection, error: Exception | None) -> None:
        seen.lost += 1
        lost(connection, error)

    def note_cancelling(ticket: Ticket) -> None:
        cancel(ticket)
        seen.cancelled.append(ticket.id)

    monkeypatch.setattr(Connection, "connection_lost", note_loss)
    monkeypatch.setattr(Ticket, "cancel", note_cancelling)
    return seen


@pytest.fixture(scope="module")
def pair_engine() -> Iterator[Engine]:
    """Like `endless_engine`, with two places."""
    with Engine.from_pretrained(eos_token_id=95, batch_size=2, **BUDGET) as engine:
        yield engine


def begin(served: Served, path: str = PATHS[0], **fields: object) -> socket.socket:
    """The connection of a request that never ends."""
    connection = served.connect()
    connection.sendall(raw_request(chat_body(**ENDLESS | fields), path))
    return connection


@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_one_alone(endless_engine: Engine, gate: Gate, seen: Seen, path: str, stream: bool, between: bool) -> None:
    gate.between = between
    with serving(endless_engine) as served:
        leaver = begin(served, path, stream=stream)
        until(lambda: len(gate.steps) >= 3)
        (number,) = gate.requests()
        with gate.shut():
            leaver.close()
            until(lambda: seen.lost == 1)
            begun = gate.count(number)
            until(lambda: number in seen.cancelled)  # though the model is busy
        until(lambda: served.server.batcher.active == 0)
        assert gate.count(number) <= begun + 1
        assert served.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("other", ["dmoe", "original"])
def test_one_among_several(pair_engine: Engine, gate: Gate, seen: Seen, other: str, stream: bool) -> None:
    """Of the same routing they share forwards; of another they take turns."""
    with serving(pair_engine) as served:
        leaver = begin(served, stream=stream, routing="dmoe")
        until(lambda: len(gate.steps) >= 2)
        (number,) = gate.requests()
        stayer = begin(served, routing=other)
        until(lambda: len(gate.requests()) == 2)
        (another,) = gate.requests() - {number}
        with gate.shut():
            leaver.close()
            until(lambda: seen.lost == 1)
            begun, before = gate.count(number), gate.count(another)
            until(lambda: number in seen.cancelled)
        until(lambda: served.server.batcher.active == 1)
        until(lambda: gate.count(another) >= before + 5)
        assert gate.count(number) <= begun + 1
        assert served.chat(max_tokens=1).status_code == 200, "its place is another's now"
        stayer.close()
        until(lambda: served.server.batcher.active == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_waits_takes_no_step_at_all(endless_engine: Engine, gate: Gate, seen: Seen, stream: bool) -> None:
    with serving(endless_engine) as served:
        first = begin(served)
        until(lambda: len(gate.steps) >= 2)
        leaver = begin(served, stream=stream)
        until(lambda: served.server.batcher.waiting == 1)
        with gate.shut():
            leaver.close()
            until(lambda: seen.lost == 1)
            until(lambda: len(seen.cancelled) == 1)
        until(lambda: served.server.batcher.waiting == 0)
        first.close()
        until(lambda: served.server.batcher.active == 0)
        assert gate.requests().isdisjoint(seen.cancelled[:1])
