"""What every `ExpertStore` promises. Derive a test class from `StoreContract` and say how one is made."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.errors import TransferError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.layout import SLOT_ALIGNMENT
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.quantized import Matrix, QuantizedMatrix
from tests.checkpoints import random_tensors, tiny_config
from tests.page_cache import cached_bytes, evictable

RAW = tiny_config()
KEY = ExpertKey(2, 7)
EVERY_KEY = [ExpertKey(layer, expert) for layer in (1, 2) for expert in range(16)]
both_ways = pytest.mark.parametrize("direct", [True, False])


@cache
def original_tensors() -> dict[str, Tensor]:
    return random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)


def slab_for(store: ExpertStore) -> memoryview:
    buffer = SlotArena(1, store.slab_bytes).buffer(0)
    buffer[:] = b"\xee" * len(buffer)
    return buffer


def read(store: ExpertStore, key: ExpertKey) -> ExpertWeights:
    slab = slab_for(store)
    store.read(key, slab)
    return store.layout(key).weights(torch.frombuffer(slab, dtype=torch.uint8))


def stored(tensors: dict[str, Tensor], key: ExpertKey) -> ExpertWeights:
    prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}."
    return ExpertWeights(*(tensors[f"{prefix}{which}_proj.weight"] for which in ("gate", "up", "down")))


def same(found: ExpertWeights, wanted: ExpertWeights) -> bool:
    return all(same_matrix(one, other) for one, other in zip(found, wanted, strict=True))


def same_matrix(one: Matrix, other: Matrix) -> bool:
    if isinstance(one, QuantizedMatrix) and isinstance(other, QuantizedMatrix):
        return same_matrix(one.values, other.values) and same_matrix(one.scales, other.scales)
    assert isinstance(one, Tensor)
    assert isinstance(other, Tensor)
    return one.dtype == other.dtype and torch.equal(one, other)


def refuse_direct_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)


def refuse_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def refusing(descriptor: int, buffers: Any, offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", refusing)


class StoreContract:
    """The stores under test hold the experts of `RAW` in float32, 16 in each of the layers 1 and 2."""

    FILE: str
    """The file that experts are read from."""

    def write(self, directory: Path) -> Path:
        """Make the directory that `open` opens, and return it."""
        raise AssertionError("say what is written")

    def open(self, directory: Path, *, direct: bool = True) -> ExpertStore:
        raise AssertionError("say how the store is made")

    def expected(self, matrix: Tensor) -> Matrix:
        """What the store makes of a matrix."""
        return matrix

    @pytest.fixture
    def wanted(self) -> Callable[[ExpertKey], ExpertWeights]:
        return lambda key: ExpertWeights(*map(self.expected, stored(original_tensors(), key)))

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return self.write(tmp_path / "model")

    @both_ways
    def test_every_expert_arrives_as_stored(self, directory: Path, wanted: Any, direct: bool) -> None:
        store = self.open(directory, direct=direct)
        assert list(store.keys()) == EVERY_KEY
        assert all(same(read(store, key), wanted(key)) for key in EVERY_KEY)
        store.close()

    @both_ways
    def test_sizes_tell_what_happens(self, directory: Path, wanted: Any, direct: bool) -> None:
        store = self.open(directory, direct=direct)
        assert store.slab_bytes % SLOT_ALIGNMENT == 0
        assert store.slab_bytes == max(store.layout(key).nbytes for key in EVERY_KEY)
        for key in EVERY_KEY:
            parts = [
                part
                for matrix in wanted(key)
                for part in ((matrix.values, matrix.scales) if isinstance(matrix, QuantizedMatrix) else (matrix,))
            ]
            payload = store.payload_bytes(key)
            assert 0 <= payload - sum(part.nbytes for part in parts) < 64 * len(parts)
            assert payload <= store.read(key, slab_for(store)) <= store.read_bytes(key)

    def test_direct_io_is_used_where_there_is_any(self, directory: Path) -> None:
        try:
            os.close(os.open(directory / self.FILE, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            pytest.skip("this file system has no direct I/O")
        assert self.open(directory).direct
        assert not self.open(directory, direct=False).direct

    @pytest.mark.parametrize("refuse", [refuse_direct_opens, refuse_direct_reads])
    def test_a_file_system_without_direct_io(
        self, directory: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch, refuse: Any
    ) -> None:
        refuse(monkeypatch)
        store = self.open(directory)
        assert not store.direct
        assert same(read(store, KEY), wanted(KEY))

    @both_ways
    def test_reads_leave_the_page_cache_alone(self, directory: Path, direct: bool) -> None:
        store = self.open(directory, direct=direct)
        if direct and not store.direct:
            pytest.skip("this file system has no direct I/O")
        if not evictable(directory / self.FILE):
            pytest.skip("this file system keeps its files in memory")
        for key in EVERY_KEY:
            store.read(key, slab_for(store))
        assert cached_bytes(directory / self.FILE) == 0

    @both_ways
    def test_reads_in_pieces_are_put_together(
        self, directory: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch, direct: bool
    ) -> None:
        """A kernel may give less than it was asked for."""
        store = self.open(directory, direct=direct)
        real = os.preadv
        pieces = 0

        def halting(descriptor: int, buffers: Any, offset: int) -> int:
            nonlocal pieces
            pieces += 1
            if not store.direct:
                return real(descriptor, [buffers[0][:1000]], offset)
            assert offset % SLOT_ALIGNMENT == 0
            return min(real(descriptor, [buffers[0][: 2 * SLOT_ALIGNMENT]], offset), SLOT_ALIGNMENT + 512)

        monkeypatch.setattr(os, "preadv", halting)
        assert same(read(store, KEY), wanted(KEY))
        assert pieces >= store.payload_bytes(KEY) // SLOT_ALIGNMENT

    @both_ways
    def test_a_short_read_names_expert_file_and_bytes(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
    ) -> None:
        store = self.open(directory, direct=direct)
        first: list[int] = []

        def ending(_descriptor: int, _buffers: Any, offset: int) -> int:
            first.append(offset)
            return max(0, first[0] + 1000 - offset)

        monkeypatch.setattr(os, "preadv", ending)
        message = rf"expert 7 of layer 2: .*{self.FILE} gave 1000 bytes at offset \d+, wanted \d+"
        with pytest.raises(TransferError, match=message):
            store.read(KEY, slab_for(store))

    def test_an_io_error_names_expert_and_file(
        self, directory: Path, wanted: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = self.open(directory)

        def failing(*_: Any) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", failing)
            message = rf"expert 7 of layer 2: .*{self.FILE} can't be read \(Input/output error\)"
            with pytest.raises(TransferError, match=message):
                store.read(KEY, slab_for(store))
        assert same(read(store, KEY), wanted(KEY)), "the disk may come to itself again"

    @pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0"])
    def test_a_file_that_changes_size_is_refused(self, directory: Path, change: Any) -> None:
        store = self.open(directory)
        file = directory / self.FILE
        content = file.read_bytes()
        file.write_bytes(change(content))
        message = (
            rf"expert 7 of layer 2: .*{self.FILE} has {len(change(content))} bytes, but {len(content)} when opened"
        )
        with pytest.raises(TransferError, match=message):
            store.read(KEY, slab_for(store))

    @both_ways
    def test_a_file_whose_header_changes_is_refused(self, directory: Path, direct: bool) -> None:
        store = self.open(directory, direct=direct)
        store.read(KEY, slab_for(store))
        with (directory / self.FILE).open("r+b") as file:
            file.seek(60)
            one = file.read(1)
            file.seek(60)
            file.write(bytes([one[0] ^ 1]))
        os.utime(directory / self.FILE, ns=(time.time_ns(), time.time_ns() + 10**9))
        for _ in range(2):
            with pytest.raises(TransferError, match=rf"expert 7 of layer 2: .*{self.FILE} has another header"):
                store.read(KEY, slab_for(store))

    def test_a_file_that_another_replaces_stays_readable(self, directory: Path, wanted: Any) -> None:
        store = self.open(directory)
        other = directory / "other"
        other.write_bytes(bytes((directory / self.FILE).stat().st_size))
        other.replace(directory / self.FILE)
        assert same(read(store, KEY), wanted(KEY))

    def test_a_file_deleted_while_open_stays_readable(self, directory: Path, wanted: Any) -> None:
        store = self.open(directory)
        (directory / self.FILE).unlink()
        assert same(read(store, KEY), wanted(KEY))

    def test_unknown_experts_and_small_slabs_are_refused(self, directory: Path) -> None:
        store = self.open(directory)
        for ask in (store.layout, store.payload_bytes, store.read_bytes):
            with pytest.raises(TransferError, match="expert 0 of layer 0: no such expert"):
                ask(ExpertKey(0, 0))
        wanted = store.read_bytes(KEY)
        with pytest.raises(TransferError, match=rf"expert 7 of layer 2: slab of 0 bytes, wanted {wanted}"):
            store.read(KEY, slab_for(store)[:0])

    def test_close_is_idempotent_frees_the_file_and_reads_after_it_say_so(self, directory: Path) -> None:
        before = psutil.Process().num_fds()
        store = self.open(directory)
        store.close()
        store.close()
        assert psutil.Process().num_fds() == before
        with pytest.raises(TransferError, match=r"expert 7 of layer 2: .* after the store was closed"):
            store.read(KEY, slab_for(store))

    @both_ways
    def test_threads_read_at_once(self, directory: Path, wanted: Any, direct: bool) -> None:
        store = self.open(directory, direct=direct)
        arena = SlotArena(8, store.slab_bytes)
        together = threading.Barrier(8, timeout=30)

        def work(slot: int) -> bool:
            together.wait()
            for key in EVERY_KEY[slot:] + EVERY_KEY[:slot]:
                store.read(key, arena.buffer(slot))
                if not same(arena.weights(slot, store.layout(key)), wanted(key)):
                    return False
            return True

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))
