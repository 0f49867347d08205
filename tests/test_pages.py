"""Pages that the system is asked for before anybody waits for them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import sys
import time

import pytest
import torch
from torch import Tensor

from offload_engine import pages
from offload_engine.pages import Toucher, huge_pages, touch

PAGE = mmap.PAGESIZE


def fresh(count: int) -> Tensor:
    return torch.frombuffer(huge_pages(count * PAGE), dtype=torch.uint8)


def test_touching_leaves_what_others_write_meanwhile_alone() -> None:
    memory = fresh(20_000)
    toucher = Toucher(memory)
    memory[::PAGE] = 7
    assert toucher.wait() == 0
    assert bool((memory[::PAGE] == 7).all())
    assert int(memory.count_nonzero()) == 20_000


def test_what_is_stopped_ends_with_the_piece_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []

    def slowly(piece: Tensor) -> bool:
        pieces.append(piece.numel())
        time.sleep(0.01)
        return True

    monkeypatch.setattr(pages, "_populate", slowly)
    monkeypatch.setattr(pages, "PIECE_BYTES", PAGE)
    toucher = Toucher(fresh(10_000))
    toucher.stop()
    toucher.stop()
    assert len(pieces) < 100
    assert toucher.wait() == 0
    assert not toucher._thread.is_alive()


@pytest.mark.parametrize("granted", [1, 2])
def test_what_is_refused_is_counted(monkeypatch: pytest.MonkeyPatch, granted: int) -> None:
    """The first call asks for a page, the others for pieces of two."""
    for counted in (lambda: Toucher(fresh(5)).wait(), lambda: touch(fresh(5))):
        asked: list[int] = []

        def some(piece: Tensor, asked: list[int] = asked) -> bool:
            asked.append(piece.numel() // PAGE)
            return len(asked) <= granted

        with monkeypatch.context() as patch:
            patch.setattr(pages, "_populate", some)
            patch.setattr(pages, "PIECE_BYTES", 2 * PAGE)
            assert counted() in ((5 - 2 * (granted - 1)) * PAGE, False)
        assert asked == [1, *[2] * granted]


def test_where_the_kernel_knows_no_such_way_zeros_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_populate", lambda _piece: False)
    for touches in (lambda memory: Toucher(memory).wait() == 0, touch):
        memory = fresh(3).fill_(9)
        assert touches(memory)
        assert memory[::PAGE].tolist() == [0, 0, 0]


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_all_pieces_are_asked_for(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    asked = []
    monkeypatch.setattr(pages, "_populate", lambda piece: asked.append(piece.numel()) or True)
    monkeypatch.setattr(pages, "PIECE_BYTES", 2 * PAGE)
    memory = torch.zeros(2 * pieces * PAGE, dtype=torch.uint8)
    assert touch(memory)
    assert Toucher(memory).wait() == 0
    assert sum(asked[1 : 1 + pieces]) == memory.numel()
    assert len(asked) == 2 * (1 + pieces)


@pytest.mark.parametrize(
    ("code", "patience", "there"),
    [(errno.EAGAIN, 60.0, True), (errno.EAGAIN, -1.0, False), (errno.ENOMEM, 60.0, False)],
)
def test_a_kernel_out_of_breath_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, code: int, patience: float, there: bool
) -> None:
    class Library:
        calls = 0

        def madvise(self, *_arguments: object) -> int:
            self.calls += 1
            ctypes.set_errno(code)
            return -1 if self.calls < 3 else 0

    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda *_arguments, **_options: library)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(pages, "PATIENCE", patience)
    assert pages._populate(torch.zeros(1)) is there
    assert library.calls == (3 if there else 1)
