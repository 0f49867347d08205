"""Slots: their addresses, their views, their cost, their end."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import psutil
import pytest
import torch

from offload_engine import pages
from offload_engine.errors import EngineClosedError, MemoryBudgetError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.layout import SLOT_ALIGNMENT, plan_reads
from offload_engine.model.weights import ExpertSpans, FileSpan

LAYOUT = plan_reads(
    ExpertSpans(
        *(FileSpan(Path("a"), 100 + i * 48, 48) for i in range(3)), dtype=torch.float32, intermediate=3, hidden=4
    )
).layout
MIB = 2**20


def resident_memory() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def test_slots_are_aligned_and_apart() -> None:
    arena = SlotArena(3, 2 * SLOT_ALIGNMENT)
    for slot in range(3):
        arena.buffer(slot)[:] = bytes([slot + 1]) * arena.slab_bytes
    for slot in range(3):
        assert arena.buffer(slot).tobytes() == bytes([slot + 1]) * arena.slab_bytes
        address = torch.frombuffer(arena.buffer(slot), dtype=torch.uint8).data_ptr()
        assert address % SLOT_ALIGNMENT == 0
    assert arena.nbytes == 6 * SLOT_ALIGNMENT


def test_weights_are_views_of_their_slot() -> None:
    arena = SlotArena(2, SLOT_ALIGNMENT)
    weights = arena.weights(1, LAYOUT)
    assert weights.gate.shape == weights.up.shape == (3, 4)
    assert weights.down.shape == (4, 3)
    values = torch.arange(12, dtype=torch.float32)
    arena.buffer(1)[100 + 96 : 100 + 144] = values.numpy().tobytes()
    assert torch.equal(weights.down, values.view(4, 3))
    assert not arena.weights(0, LAYOUT).down.any()
    assert weights.down.data_ptr() == arena.weights(1, LAYOUT).down.data_ptr()


def test_memory_is_there_from_the_start_exact_and_returned() -> None:
    SlotArena(1, SLOT_ALIGNMENT).close()  # what the first arena costs besides is not the point
    before = resident_memory()
    arena = SlotArena(7, 8 * MIB + SLOT_ALIGNMENT)
    arena.wait_touched()
    grown = resident_memory() - before
    assert 0.95 * arena.nbytes <= grown <= arena.nbytes + 4 * MIB
    arena.close()
    assert resident_memory() - before < 8 * MIB


def test_a_view_outlives_the_arena() -> None:
    arena = SlotArena(1, SLOT_ALIGNMENT)
    weights, buffer = arena.weights(0, LAYOUT), arena.buffer(0)
    arena.close()
    arena.close()
    del arena
    gc.collect()
    buffer[100:104] = torch.ones(1).numpy().tobytes()
    assert weights.gate[0, 0] == 1.0


def test_a_closed_arena_says_so() -> None:
    arena = SlotArena(1, SLOT_ALIGNMENT)
    arena.close()
    with pytest.raises(EngineClosedError, match="closed"):
        arena.buffer(0)
    with pytest.raises(EngineClosedError, match="closed"):
        arena.weights(0, LAYOUT)


@pytest.mark.parametrize("slots", [2**20, 2**60])
def test_refused_memory_is_a_budget_error(slots: int) -> None:
    with pytest.raises(MemoryBudgetError, match=rf"refused {slots * 2**30} bytes for {slots} expert slots") as caught:
        SlotArena(slots, 2**30)
    assert caught.value.exit_code == 4
    assert "--gpu-mem" in str(caught.value)


@pytest.mark.parametrize(("slots", "slab_bytes"), [(0, 4096), (1, 0), (1, 4097), (-1, 4096)])
def test_senseless_sizes_are_refused(slots: int, slab_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiples of 4096"):
        SlotArena(slots, slab_bytes)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_that_is_not_there(slot: int) -> None:
    arena = SlotArena(2, SLOT_ALIGNMENT)
    with pytest.raises(IndexError, match=f"slot {slot}, wanted 0 to 1"):
        arena.buffer(slot)
    with pytest.raises(IndexError, match=f"slot {slot}"):
        arena.weights(slot, LAYOUT)


def test_touching_leaves_what_a_reader_has_written_alone() -> None:
    arena = SlotArena(64, 2 * MIB)
    for slot in reversed(range(64)):  # the toucher comes from the other end
        arena.buffer(slot)[:] = bytes([slot + 1]) * arena.slab_bytes
    arena.wait_touched()
    assert all(arena.buffer(slot).tobytes() == bytes([slot + 1]) * arena.slab_bytes for slot in range(64))


def test_closing_does_not_wait_for_gigabytes_to_be_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []

    def slowly(piece: torch.Tensor) -> bool:
        pieces.append(piece.numel())
        time.sleep(0.01)
        return True

    monkeypatch.setattr(pages, "_populate", slowly)
    monkeypatch.setattr(pages, "PIECE_BYTES", SLOT_ALIGNMENT)
    SlotArena(10_000, SLOT_ALIGNMENT).close()
    assert len(pieces) < 100


def test_memory_refused_after_the_first_page_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def twice(piece: torch.Tensor) -> bool:
        asked.append(piece.numel())
        return len(asked) <= 2

    monkeypatch.setattr(pages, "_populate", twice)
    monkeypatch.setattr(pages, "PIECE_BYTES", 2 * SLOT_ALIGNMENT)
    arena = SlotArena(5, SLOT_ALIGNMENT)
    refused, all_ = 3 * SLOT_ALIGNMENT, 5 * SLOT_ALIGNMENT
    with pytest.raises(MemoryBudgetError, match=f"refused {refused} of the {all_} bytes for 5 expert slots; ask for"):
        arena.wait_touched()
    arena.close()
    assert asked == [SLOT_ALIGNMENT, 2 * SLOT_ALIGNMENT, 2 * SLOT_ALIGNMENT]


def test_where_the_kernel_cannot_every_page_is_touched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_populate", lambda _piece: False)
    before = resident_memory()
    arena = SlotArena(4, 8 * MIB)
    assert resident_memory() - before >= 0.95 * arena.nbytes
    arena.wait_touched()
