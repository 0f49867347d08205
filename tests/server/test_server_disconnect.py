"""A client that disconnects frees its place within one denoising step."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import pytest
from torch import Tensor

from offload_engine.decode.block_diffusion import BlockDiffusionDecoder
from offload_engine.decode.lane import Lane
from offload_engine.decode.session import Outcome, Session
from offload_engine.engine.batching import Ticket
from offload_engine.engine.engine import Engine
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.server.connections import Connection
from tests.server.conftest import BUDGET
from tests.server.serving import ENDLESS, PROBLEM, Served, chat_body, raw_request, serving, until

PATHS = ["/v1/chat/completions", "/v1/denoise"]
Place = Literal["step", "between", "layer"]
"""Within a denoising step, between two of them, before a layer of a prefill."""
LONG = [{"role": "user", "content": f"{PROBLEM} " * 10}]
"""A prompt that no test before has left in the cache."""
STEP = 0.01
"""Seconds that a step takes at least, so that the event loop hears of everything in time."""


class Gate:
    """Stands wherever the model comes by: notes whose steps begin, and holds the model at one place while shut."""

    def __init__(self) -> None:
        self.steps: list[set[int]] = []
        """The requests of each step that began, by number."""
        self.layers = 0
        """Layers of prefills that began."""
        self.place: Place = "step"
        """Where it is shut."""
        self._open = threading.Event()
        self._open.set()
        self._held = threading.Event()

    def begin(self, lanes: Sequence[Lane]) -> None:
        """A step begins."""
        self.steps.append({lane.number for lane in lanes})
        self.wait("step")
        time.sleep(STEP)

    def wait(self, place: Place) -> None:
        """The model comes by."""
        if place == self.place:
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
        """While open, the model goes no further than here."""
        self._held.clear()  # first: who comes by from now on may be through, but is held the next time
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def hold(self) -> None:
        """Until the model has come by, and stands still."""
        assert self._held.wait(30), "nobody comes by"


class Seen:
    """What the server has noticed of clients that went away."""

    def __init__(self) -> None:
        self.lost = 0
        """Connections that the system said are gone."""
        self.cancelled: list[int] = []
        """The requests whose answers were given up for it, by number."""


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, step, advance, prefill = Gate(), BlockDiffusionDecoder.step, Session.advance, LLaDA2Model.prefill

    def gated_step(decoder: BlockDiffusionDecoder, lanes: Sequence[Lane]) -> None:
        gate.begin(lanes)
        step(decoder, lanes)

    def gated_advance(session: Session) -> list[tuple[int, Outcome]]:
        gate.wait("between")
        return advance(session)

    def gated_prefill(
        model: LLaDA2Model, ids: Tensor, pieces: Sequence[Forward], cancelled: Callable[[], bool]
    ) -> bool:
        def asked() -> bool:  # before every layer
            gate.wait("layer")
            gate.layers += not cancelled()
            return cancelled()

        return prefill(model, ids, pieces, asked)

    monkeypatch.setattr(LLaDA2Model, "prefill", gated_prefill)
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


@pytest.mark.parametrize("place", ["step", "between"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_one_alone(endless_engine: Engine, gate: Gate, seen: Seen, path: str, stream: bool, place: Place) -> None:
    gate.place = place
    with serving(endless_engine) as served:
        leaver = begin(served, path, stream=stream)
        until(lambda: len(gate.steps) >= 3)
        (number,) = gate.requests()
        with gate.shut():
            gate.hold()
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
            gate.hold()
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
            gate.hold()
            leaver.close()
            until(lambda: seen.lost == 1)
            until(lambda: len(seen.cancelled) == 1)
        until(lambda: served.server.batcher.waiting == 0)
        first.close()
        until(lambda: served.server.batcher.active == 0)
        assert gate.requests().isdisjoint(seen.cancelled[:1])


@pytest.mark.parametrize("stream", [False, True])
def test_one_whose_prompt_is_read_takes_no_layer_more(
    endless_engine: Engine, gate: Gate, seen: Seen, stream: bool
) -> None:
    gate.place = "layer"
    with serving(endless_engine) as served:
        with gate.shut():
            leaver = begin(served, stream=stream, messages=LONG)
            gate.hold()
            leaver.close()
            until(lambda: len(seen.cancelled) == 1)
            begun = gate.layers
        until(lambda: served.server.batcher.active == 0)
        assert gate.layers == begun
        assert gate.steps == []
