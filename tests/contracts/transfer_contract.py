"""What every `TransferBackend` promises. Derive a test class from `TransferContract` and say how one is made."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from offload_engine.core import ExpertKey
from offload_engine.errors import OffloadError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.experts.transfer.base import Stream, TransferBackend, TransferTicket
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from tests.checkpoints import tiny_config, write_checkpoint


class Inbox:
    """Collects completions from whatever thread they come."""

    def __init__(self) -> None:
        self.tickets: list[TransferTicket] = []
        self.changed = threading.Condition()

    def __call__(self, ticket: TransferTicket) -> None:
        with self.changed:
            self.tickets.append(ticket)
            self.changed.notify_all()

    def wait_for(self, count: int) -> list[TransferTicket]:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.tickets) >= count, timeout=60)
            return list(self.tickets)


class TransferContract:
    SLOTS = 6

    def make(self, store: SafetensorsStore, arena: SlotArena) -> TransferBackend:
        raise AssertionError("say how the backend is made")

    @pytest.fixture
    def store(self, tmp_path: Path) -> SafetensorsStore:
        write_checkpoint(tmp_path, tiny_config())
        return SafetensorsStore(ModelConfig.from_dict(tiny_config()), Checkpoint.open(tmp_path))

    @pytest.fixture
    def arena(self, store: SafetensorsStore) -> SlotArena:
        arena = SlotArena(self.SLOTS, store.slab_bytes)
        arena.wait_touched()  # its thread is none of the driver's
        return arena

    def test_a_copy_fills_its_slot_and_is_reported_once(self, store: SafetensorsStore, arena: SlotArena) -> None:
        backend, inbox = self.make(store, arena), Inbox()
        backend.start(inbox)
        keys = [ExpertKey(1, expert) for expert in range(self.SLOTS)]
        tickets = [backend.copy(Stream.COPY, key, slot) for slot, key in enumerate(keys)]
        done = inbox.wait_for(len(keys))
        assert sorted(ticket.key for ticket in done) == keys
        assert {id(ticket) for ticket in done} == {id(ticket) for ticket in tickets}
        backend.close()
        expected = SlotArena(1, store.slab_bytes)
        for slot, key in enumerate(keys):
            assert done[0].error is None
            store.read(key, expected.buffer(0))
            layout = store.layout(key)
            for ours, theirs in zip(arena.weights(slot, layout), expected.weights(0, layout), strict=True):
                assert torch.equal(ours.cpu(), theirs)
        assert len(inbox.tickets) == len(keys)

    def test_a_launch_sees_what_was_copied_before_it(self, store: SafetensorsStore, arena: SlotArena) -> None:
        backend, inbox = self.make(store, arena), Inbox()
        backend.start(inbox)
        backend.copy(Stream.COPY, ExpertKey(1, 3), 2)
        inbox.wait_for(1)
        seen: list[float] = []
        weights = arena.weights(2, store.layout(ExpertKey(1, 3)))
        backend.launch(Stream.COMPUTE, lambda: seen.append(float(weights.gate.abs().sum())), reads=(2,))
        backend.synchronize()
        assert seen
        assert seen[0] > 0
        backend.close()

    def test_failure_is_reported_in_the_ticket(self, store: SafetensorsStore, arena: SlotArena) -> None:
        backend, inbox = self.make(store, arena), Inbox()
        backend.start(inbox)
        backend.copy(Stream.COPY, ExpertKey(1, 99), 0)
        backend.copy(Stream.COPY, ExpertKey(1, 1), 1)
        done = {ticket.key.expert: ticket for ticket in inbox.wait_for(2)}
        assert isinstance(done[99].error, OffloadError)
        assert "99" in str(done[99].error)
        assert done[1].error is None, "one failure does not stop the next copy"
        backend.close()

    def test_what_is_withdrawn_is_reported_only_if_it_was_begun(
        self, store: SafetensorsStore, arena: SlotArena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gate, began, read = threading.Event(), threading.Semaphore(0), store.read

        def gated(key: ExpertKey, slab: memoryview) -> int:
            began.release()
            assert gate.wait(60)
            return read(key, slab)

        monkeypatch.setattr(store, "read", gated)
        backend, inbox = self.make(store, arena), Inbox()
        backend.start(inbox)
        for slot in range(self.SLOTS):
            backend.copy(Stream.COPY, ExpertKey(2, slot), slot)
        assert began.acquire(timeout=60)
        begun = list(backend.withdraw())
        assert 1 <= len(begun) < self.SLOTS
        gate.set()
        backend.copy(Stream.COPY, ExpertKey(1, 1), self.SLOTS - 1)
        inbox.wait_for(len(begun) + 1)
        backend.close()
        assert {(ticket.key, ticket.slot) for ticket in inbox.tickets} == {
            (ExpertKey(1, 1), self.SLOTS - 1),
            *((ticket.key, ticket.slot) for ticket in begun),
        }
        assert not list(backend.withdraw()), "nothing is under way any more"

    def test_close_ends_every_thread_and_may_be_repeated(self, store: SafetensorsStore, arena: SlotArena) -> None:
        before = threading.active_count()
        backend = self.make(store, arena)
        backend.start(Inbox())
        for slot in range(self.SLOTS):
            backend.copy(Stream.COPY, ExpertKey(2, slot), slot)
        backend.close()
        backend.close()
        assert threading.active_count() == before
