from __future__ import annotations

import pytest

from offload_engine.core import ExpertKey
from offload_engine.errors import EngineClosedError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.cpu import CpuTransfers
from tests.contracts.transfer_contract import Inbox, TransferContract


class TestOneReader(TransferContract):
    def make(self, store: SafetensorsStore, arena: SlotArena) -> CpuTransfers:
        return CpuTransfers(store, arena, threads=1)


class TestSeveralReaders(TransferContract):
    def make(self, store: SafetensorsStore, arena: SlotArena) -> CpuTransfers:
        return CpuTransfers(store, arena, threads=3)


class TestCpuTransfers:
    store = TransferContract.store
    arena = TransferContract.arena
    SLOTS = 2

    def test_a_copy_after_close_is_refused(self, store: SafetensorsStore, arena: SlotArena) -> None:
        backend = CpuTransfers(store, arena)
        backend.start(Inbox())
        backend.close()
        with pytest.raises(EngineClosedError):
            backend.copy(Stream.COPY, ExpertKey(1, 0), 0)
