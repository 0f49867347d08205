"""Where experts are read from: the contract of every store, and the one that reads a published checkpoint as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from offload_engine.core import ExpertKey
from offload_engine.disk_file import DiskFile
from offload_engine.errors import CheckpointError, TransferError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.layout import SLOT_ALIGNMENT, ReadPlan, SlabLayout, plan_reads
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.quantized import ExpertFormat
from offload_engine.model.weights import all_expert_spans


class ExpertStore(Protocol):
    """A source of experts. All but `close` may be called from several threads at once."""

    @property
    def slab_bytes(self) -> int:
        """Bytes of the largest slab, a multiple of `SLOT_ALIGNMENT`: what a slot must hold."""

    @property
    def format(self) -> ExpertFormat:
        """How all the experts are stored."""

    @property
    def direct(self) -> bool:
        """Whether every read bypasses the page cache."""

    def keys(self) -> Collection[ExpertKey]:
        """Every expert there is, by rising layer and expert."""

    def payload_bytes(self, key: ExpertKey) -> int:
        """Bytes of the expert's matrices, and of their scales where they are quantised."""

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
    deleted or replaced while open stays readable; one that is written to is refused from then on, for nothing in it
    tells which of its experts are still what they were.
    """

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, direct: bool = True) -> None:
        """`direct=False` never tries direct I/O."""
        layouts: dict[SlabLayout, SlabLayout] = {}  # equal ones made one: each finds out its `example` by itself
        self._plans: dict[ExpertKey, ReadPlan] = {}
        for key, spans in all_expert_spans(config, checkpoint).items():
            plan = plan_reads(spans)
            self._plans[key] = replace(plan, layout=layouts.setdefault(plan.layout, plan.layout))
        self._format = ExpertFormat(_one_dtype(self._plans, checkpoint))
        self._slab_bytes = max((plan.layout.nbytes for plan in self._plans.values()), default=SLOT_ALIGNMENT)
        paths = sorted({window.path for plan in self._plans.values() for window in plan.windows})
        self._files: dict[Path, DiskFile] = {}
        try:
            for path in paths:
                self._files[path] = checkpoint.open_file(path, direct)
        except BaseException:
            self.close()
            raise

    @property
    def direct(self) -> bool:
        """See `ExpertStore`."""
        return all(file.direct for file in self._files.values())

    @property
    def slab_bytes(self) -> int:
        """See `ExpertStore`."""
        return self._slab_bytes

    @property
    def format(self) -> ExpertFormat:
        """See `ExpertStore`."""
        return self._format

    def keys(self) -> Collection[ExpertKey]:
        """See `ExpertStore`."""
        return self._plans.keys()

    def payload_bytes(self, key: ExpertKey) -> int:
        """See `ExpertStore`."""
        layout = self._plan(key).layout
        return (
            sum(place.rows * place.columns for place in (layout.gate, layout.up, layout.down)) * layout.dtype.itemsize
        )

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
            raise TransferError(f"{named(key)}: slab of {len(slab)} bytes, wanted {plan.layout.nbytes}")
        total = 0
        for window in plan.windows:
            file = self._files.get(window.path)
            if file is None:
                raise TransferError(f"{named(key)}: {window.path} was to be read after the store was closed")
            target = slab[window.slab_offset : window.slab_offset + window.nbytes]
            try:
                total += file.read(target, window.file_offset, window.needed)
                if file.generation:
                    raise TransferError(f"{file.path} was written to since it was opened; load the model again")
            except TransferError as error:
                raise TransferError(f"{named(key)}: {error}") from None
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
            raise TransferError(f"{named(key)}: no such expert in this checkpoint")
        return plan


def named(key: ExpertKey) -> str:
    """An expert as errors call it."""
    return f"expert {key.expert} of layer {key.layer}"


def _one_dtype(plans: dict[ExpertKey, ReadPlan], checkpoint: Checkpoint) -> torch.dtype:
    dtypes = {plan.layout.dtype: key for key, plan in plans.items()}
    if len(dtypes) > 1:
        (one, first), (other, second) = list(dtypes.items())[:2]
        raise CheckpointError(
            f"{checkpoint.directory}: {named(first)} is stored as {one}, but {named(second)} as {other}, "
            "wanted one dtype for all experts"
        )
    return next(iter(dtypes), torch.bfloat16)


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
