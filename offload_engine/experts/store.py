"""Where experts are read from: the contract of every store, and the one that reads a published checkpoint as it is."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

import torch

from offload_engine.core import ExpertKey
from offload_engine.errors import CheckpointError, TransferError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.layout import (
    SLOT_ALIGNMENT,
    ReadPlan,
    ReadWindow,
    SlabLayout,
    align_down,
    plan_reads,
)
from offload_engine.model.checkpoint import Checkpoint, drop_page_cache
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.weights import all_expert_spans


class ExpertStore(Protocol):
    """A source of experts. All but `close` may be called from several threads at once."""

    @property
    def slab_bytes(self) -> int:
        """Bytes of the largest slab, a multiple of `SLOT_ALIGNMENT`: what a slot must hold."""

    @property
    def dtype(self) -> torch.dtype:
        """What all the experts are stored as."""

    def keys(self) -> Collection[ExpertKey]:
        """Every expert there is, by rising layer and expert."""

    def payload_bytes(self, key: ExpertKey) -> int:
        """Bytes of the expert's matrices."""

    def read_bytes(self, key: ExpertKey) -> int:
        """Bytes that `read` asks of the disk: the payload and the slack around it."""

    def layout(self, key: ExpertKey) -> SlabLayout:
        """Where the matrices are in a slab that `read` has filled; the same on every call."""

    def read(self, key: ExpertKey, slab: memoryview) -> int:
        """Fill `slab`, writable bytes [at least slab_bytes] that start on a multiple of `SLOT_ALIGNMENT`.

        Blocks without holding the interpreter lock; returns the bytes read. Raises `TransferError`, naming the expert,
        when they can't be had; the slab then holds anything.
        """

    def close(self) -> None:
        """Release what the store holds, after the last `read` has returned. Idempotent."""


class SafetensorsStore:
    """Reads experts straight from a checkpoint's shards, past the page cache: with direct I/O where the file system
    knows it, else through the cache and dropped from it at once.

    Raises `CheckpointError` when any expert is missing, misshapen, or stored otherwise than the rest. A shard that is
    deleted while open stays readable; one that changes size is refused from then on.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, direct: bool = True) -> None:
        """`direct=False` never tries direct I/O."""
        self._plans = {key: plan_reads(spans) for key, spans in all_expert_spans(config, checkpoint).items()}
        self._dtype = _one_dtype(self._plans, checkpoint)
        self._slab_bytes = max((plan.layout.nbytes for plan in self._plans.values()), default=SLOT_ALIGNMENT)
        paths = sorted({window.path for plan in self._plans.values() for window in plan.windows})
        self._files: dict[Path, _File] = {}
        try:
            for path in paths:
                self._files[path] = _File(path, checkpoint.file_sizes[path], direct)
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """Whether every read is direct I/O."""
        return all(file.direct for file in self._files.values())

    @property
    def slab_bytes(self) -> int:
        """See `ExpertStore`."""
        return self._slab_bytes

    @property
    def dtype(self) -> torch.dtype:
        """See `ExpertStore`."""
        return self._dtype

    def keys(self) -> Collection[ExpertKey]:
        """See `ExpertStore`."""
        return self._plans.keys()

    def payload_bytes(self, key: ExpertKey) -> int:
        """See `ExpertStore`."""
        layout = self._plan(key).layout
        return sum(place.rows * place.columns for place in (layout.gate, layout.up, layout.down)) * self._dtype.itemsize

    def read_bytes(self, key: ExpertKey) -> int:
        """See `ExpertStore`."""
        return self._plan(key).nbytes

    def layout(self, key: ExpertKey) -> SlabLayout:
        """See `ExpertStore`."""
        return self._plan(key).layout

    def read(self, key: ExpertKey, slab: memoryview) -> int:
        """See `ExpertStore`."""
        plan = self._plan(key)
        if len(slab) < plan.layout.nbytes:
            raise TransferError(f"{_named(key)}: slab of {len(slab)} bytes, wanted {plan.layout.nbytes}")
        total = 0
        for window in plan.windows:
            file = self._files.get(window.path)
            if file is None:
                raise TransferError(f"{_named(key)}: {window.path} was to be read after the store was closed")
            try:
                total += file.read(window, slab)
            except TransferError as error:
                raise TransferError(f"{_named(key)}: {error}") from None
            except OSError as error:
                raise TransferError(f"{_named(key)}: {window.path} can't be read ({error.strerror})") from None
        for move in plan.moves:
            slab[move.target : move.target + move.nbytes] = slab[move.source : move.source + move.nbytes]
        return total

    def close(self) -> None:
        """See `ExpertStore`."""
        while self._files:
            _path, file = self._files.popitem()
            file.close()

    def _plan(self, key: ExpertKey) -> ReadPlan:
        plan = self._plans.get(key)
        if plan is None:
            raise TransferError(f"{_named(key)}: no such expert in this checkpoint")
        return plan


def _named(key: ExpertKey) -> str:
    return f"expert {key.expert} of layer {key.layer}"


def _one_dtype(plans: dict[ExpertKey, ReadPlan], checkpoint: Checkpoint) -> torch.dtype:
    dtypes = {plan.layout.dtype: key for key, plan in plans.items()}
    if len(dtypes) > 1:
        (one, first), (other, second) = list(dtypes.items())[:2]
        raise CheckpointError(
            f"{checkpoint.directory}: {_named(first)} is stored as {one}, but {_named(second)} as {other}, "
            "wanted one dtype for all experts"
        )
    return next(iter(dtypes), torch.bfloat16)


class _File:
    """One shard, open for reading at any place by any thread."""

    def __init__(self, path: Path, size: int, direct: bool) -> None:
        self.path = path
        self.size = size
        try:
            descriptor = _open_direct(path) if direct else None
            self.direct = descriptor is not None
            self.descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        except OSError as error:
            raise CheckpointError(f"{path}: can't be opened ({error.strerror}); was it moved?") from None
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(
                self.descriptor, 0, 0, os.POSIX_FADV_RANDOM
            )  # no read-ahead: it reads what nobody asked for

    def read(self, window: ReadWindow, slab: memoryview) -> int:
        """Fill the window's part of `slab`; returns the bytes read, at least what the window needs."""
        size = os.fstat(self.descriptor).st_size
        if size != self.size:
            raise TransferError(f"{self.path} has {size} bytes, but {self.size} when opened; load the model again")
        target = slab[window.slab_offset : window.slab_offset + window.nbytes]
        got = 0
        while got < window.needed:
            # Where a direct read stopped short of a whole unit, the next one has to begin that unit again.
            start = align_down(got) if self.direct else got
            count = os.preadv(self.descriptor, [target[start:]], window.file_offset + start)
            if start + count <= got:
                raise TransferError(
                    f"{self.path} gave {got} bytes at offset {window.file_offset}, wanted {window.needed}"
                )
            got = start + count
        if not self.direct:
            drop_page_cache(self.descriptor, window.file_offset, window.nbytes)
        return got

    def close(self) -> None:
        os.close(self.descriptor)


def _open_direct(path: Path) -> int | None:
    """Open for direct I/O, proved by a first read; None where the file system refuses it."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return None
        raise
    try:
        os.preadv(descriptor, [mmap.mmap(-1, SLOT_ALIGNMENT)], 0)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def load_all(store: ExpertStore, keys: Collection[ExpertKey]) -> Callable[[int, int], ExpertWeights]:
    """Read these experts into memory of their own: `weights(layer, expert)` for `ResidentExperts`.

    Matrices are aligned as in a slot of the expert cache, so that products with them come out bit for bit the same.
    """
    slots = {key: slot for slot, key in enumerate(keys)}
    arena = SlotArena(max(1, len(slots)), store.slab_bytes)
    for key, slot in slots.items():
        store.read(key, arena.buffer(slot))

    def weights(layer: int, expert: int) -> ExpertWeights:
        key = ExpertKey(layer, expert)
        return arena.weights(slots[key], store.layout(key))

    return weights
