"""The transfers' contract on real streams: the stream simulator draws every order there could be, this is the GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload_engine.core import ExpertKey
from offload_engine.experts import arena as arenas
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.experts.transfer.base import Stream
from tests.contracts.transfer_contract import Inbox, TransferContract

transfers = pytest.importorskip("offload_engine.experts.transfer.cuda")
drivers = pytest.importorskip("offload_engine.experts.transfer.cuda_driver")

A_WHILE = 20_000_000
"""Clock cycles of the device: some ten milliseconds, in which an expert is copied a thousand times."""


class TestOnTheGpu(TransferContract):
    @pytest.fixture
    def arena(self, store: SafetensorsStore, cuda: torch.device) -> Any:
        self.driver = drivers.CudaDriver(cuda)
        return arenas.DeviceArena(self.SLOTS, store.slab_bytes, self.driver.allocate)

    def make(self, store: SafetensorsStore, arena: Any) -> Any:
        return transfers.CudaTransfers(store, arena, self.driver, threads=1)

    def test_memory_is_pinned(self, store: SafetensorsStore, arena: Any) -> None:
        backend = self.make(store, arena)
        notices = backend.notices
        backend.close()
        assert not notices

    def test_neither_side_overtakes_the_other(self, store: SafetensorsStore, arena: Any) -> None:
        """Work reads its slot long after it was launched, and copies into the slot are asked for at once."""
        backend, inbox, keys = self.make(store, arena), Inbox(), [ExpertKey(1, expert) for expert in range(16)]
        backend.start(inbox)
        found = torch.zeros(len(keys), device=self.driver.device)

        def late(number: int, gate: torch.Tensor) -> None:
            torch.cuda._sleep(A_WHILE)
            found[number] = gate.sum()

        for number, key in enumerate(keys):
            backend.copy(Stream.COPY, key, number % 2)
            assert inbox.wait_for(number + 1)[-1].error is None
            gate = arena.weights(number % 2, store.layout(key)).gate
            backend.launch(Stream.COMPUTE, lambda number=number, gate=gate: late(number, gate), reads=(number % 2,))
        backend.synchronize()
        seen = found.cpu()
        backend.close()
        slab = arenas.SlotArena(1, store.slab_bytes)
        for number, key in enumerate(keys):
            store.read(key, slab.buffer(0))
            wanted = slab.weights(0, store.layout(key)).gate.to(self.driver.device).sum()
            assert seen[number] == wanted.cpu()
