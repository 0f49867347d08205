"""From a checkpoint to a converted one: its experts in `experts.packed`, everything else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offload_engine.config import format_bytes
from offload_engine.errors import CheckpointError, OffloadError, UsageError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.opening import open_store
from offload_engine.experts.storage.packed_header import PACKED_FILE, SOURCE_KEY, Description
from offload_engine.experts.storage.packed_writer import PackedWriter, packed_format
from offload_engine.experts.storage.rounding import RoundingErrors
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.model.checkpoint import INDEX_FILE, Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.partial_directory import partial_directory
from offload_engine.model.quantized import ExpertFormat, fitting_group
from offload_engine.model.resident_files import settle, write_tensors
from offload_engine.model.safetensors_header import TensorInfo
from offload_engine.model.weights import resident_infos

Kind = Literal["stored", "bf16", "int8", "int4"]
CONFIG_FILE = "config.json"
WEIGHTS = "weights"
"""What progress is told of."""
KEPT_SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md")
"""Files beside the weights that go along: configuration, tokenizer, template, model card. No code, nothing hidden."""
DEFAULT_GROUP = 32
"""Columns of int4 experts that share a scale, where nobody says otherwise."""
MARGIN = 2**20
"""Disk left for directory entries and safetensors headers."""

Progress = Callable[[str, int, int], None]
"""Told what is being written, how much of it is on the disk and how much there is, in bytes."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What came of a conversion."""

    directory: Path
    original: ExpertFormat
    """How the experts were stored."""
    format: ExpertFormat
    """How they are stored now."""
    original_slab: int
    slab: int
    """Bytes of one expert's slot, before and now."""
    expert_bytes: int
    """Of `experts.packed`."""
    resident_bytes: int
    errors: RoundingErrors


def convert(
    source: Path,
    out: Path,
    kind: Kind = "stored",
    *,
    group: int = DEFAULT_GROUP,
    identity: str,
    progress: Progress | None = None,
) -> Conversion:
    """Convert the checkpoint in `source` to the new directory `out`, which appears when all of it is on the disk.

    `kind`: what experts are stored as; int4 has a scale per `group` columns, or per the largest power of two below that
    divides the columns of every matrix. `identity` tells the checkpoint from others; what is written here keeps to what
    has the same. Takes the memory of two slabs and of `SHARD_BYTES` or the largest tensor.

    Raises `UsageError` when `out` exists, `OUT.partial` is not ours to remove or `kind` is impossible,
    `CheckpointError` for a source that can't be used, `OffloadError` when the disk is too small or fails.
    Whatever happens before the end, `out` does not exist.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise UsageError(f"--out {out}: exists already; choose another directory, or remove this one")
    config, checkpoint = ModelConfig.from_file(source / CONFIG_FILE), Checkpoint.open(source)
    if not config.moe_layers:
        raise CheckpointError(f"{source}: the model has no MoE layer, so there is nothing to convert")
    with closing(open_store(config, checkpoint, verify="always")) as store:
        description = _described(config, store, source, kind, group, identity)
        job = _Job(config, checkpoint, store, description, progress or (lambda *_: None))
        with partial_directory(out, source) as partial:
            return job.run(partial, out)


def _described(
    config: ModelConfig, store: ExpertStore, source: Path, kind: Kind, group: int, identity: str
) -> Description:
    if store.format.bits is not None:
        raise UsageError(
            f"{source}: its experts are {store.format} already; rounding twice adds up: convert the original instead"
        )
    if group < 2:
        raise UsageError(f"--group-size is {group}, wanted at least 2")
    hidden, width = config.hidden_size, config.moe_intermediate_size
    fitting = fitting_group(group, hidden, width)
    if kind == "int4" and fitting < 2:
        raise UsageError(f"{source}: matrices of {hidden} and {width} columns have no int4 format; use --experts int8")
    return Description.of(packed_format(kind, store.format.dtype, fitting), hidden, width, identity)


@dataclass(frozen=True, slots=True)
class _Job:
    config: ModelConfig
    checkpoint: Checkpoint
    store: ExpertStore
    description: Description
    progress: Progress

    def run(self, folder: Path, out: Path) -> Conversion:
        """Write everything into `folder`, config.json last: without it no directory loads."""
        infos, beside = resident_infos(self.config, self.checkpoint), _files_beside(self.checkpoint.directory)
        resident = sum(info.nbytes for info in infos)
        with PackedWriter(folder / PACKED_FILE, self.description, list(self.store.keys())) as writer:
            _require_disk(folder, out, writer.nbytes + resident + sum(path.stat().st_size for path in beside) + MARGIN)
            slab, packed = writer.slab_bytes, writer.nbytes
            errors = self._write_experts(writer, packed + resident)
        self._write_resident(folder, infos, packed, packed + resident)
        for path in beside:
            shutil.copyfile(path, folder / path.name)
            settle(folder / path.name)
        settle(folder)
        before, now = self.store.format, self.description.format
        return Conversion(out, before, now, self.store.slab_bytes, slab, packed, resident, errors)

    def _write_experts(self, writer: PackedWriter, total: int) -> RoundingErrors:
        errors, arena = RoundingErrors(), SlotArena(1, self.store.slab_bytes)
        kept = self.description.format == self.store.format
        for count, key in enumerate(self.store.keys(), start=1):
            self.store.read(key, arena.buffer(0))
            original = arena.weights(0, self.store.layout(key))
            stored = writer.write(key, original)
            if not kept:
                errors.add(key, original, stored)
            self.progress(WEIGHTS, count * writer.slab_bytes, total)
        writer.finish()
        return errors

    def _write_resident(self, folder: Path, infos: Sequence[TensorInfo], done: int, total: int) -> None:
        def written(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self.progress(WEIGHTS, done, total)

        write_tensors(folder, self.checkpoint, infos, {SOURCE_KEY: self.description.source}, written)


def _files_beside(directory: Path) -> list[Path]:
    """What goes along unchanged, config.json last."""
    found = [
        path
        for path in sorted(directory.iterdir())
        if path.is_file()
        and path.suffix in KEPT_SUFFIXES
        and not path.name.startswith(".")
        and path.name not in (CONFIG_FILE, INDEX_FILE)
    ]
    return [*found, directory / CONFIG_FILE]


def _require_disk(folder: Path, out: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OffloadError(
            f"--out {out}: needs {format_bytes(needed, round_up=True)} of disk, but {format_bytes(free)} are free; "
            "free some, choose another disk, or fewer bits with --experts"
        )
