"""The store of a converted checkpoint: one slab per expert, so that one direct read fills a slot."""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import Literal

from offload_engine.core import ExpertKey
from offload_engine.disk_file import DiskFile
from offload_engine.errors import CheckpointError, TransferError
from offload_engine.experts.storage.layout import SlabLayout
from offload_engine.experts.storage.packed_header import (
    PACKED_FILE,
    SOURCE_KEY,
    PackedHeader,
    Slab,
    read_packed_header,
    require_experts,
)
from offload_engine.experts.storage.store import named
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.quantized import ExpertFormat
from offload_engine.model.weights import expert_keys

Verify = Literal["first", "always", "never"]
"""When a slab is held against its checksum. first: when it is read for the first time, and for the first time after the
file was written to."""


class PackedStore:
    """Reads experts out of `experts.packed`, past the page cache as `DiskFile` does.

    Raises `CheckpointError` when the file is missing or damaged, holds other experts than config.json wants, or was
    made of another checkpoint than the safetensors files beside it. A store that is deleted while open stays readable;
    one whose size or header changes is refused from then on.
    """

    def __init__(
        self, config: ModelConfig, checkpoint: Checkpoint, *, direct: bool = True, verify: Verify = "first"
    ) -> None:
        """`direct=False` never tries direct I/O."""
        self.path = checkpoint.directory / PACKED_FILE
        self.verify = verify
        header = read_packed_header(self.path)
        require_experts(self.path, header, list(expert_keys(config)), config.hidden_size, config.moe_intermediate_size)
        _require_one_source(checkpoint, header)
        self.source = header.description.source
        self._format = header.description.format
        self._layout = header.layout
        self._slabs = dict(sorted(header.slabs.items()))
        self._verified: dict[ExpertKey, int] = {}
        """Slabs whose checksum was right, and the file's generation at that time."""
        self._file: DiskFile | None = DiskFile(self.path, header.file_bytes, header.header_bytes, direct)
        self._direct = self._file.direct

    @property
    def format(self) -> ExpertFormat:
        """See `ExpertStore`."""
        return self._format

    @property
    def direct(self) -> bool:
        """See `ExpertStore`."""
        return self._direct

    @property
    def slab_bytes(self) -> int:
        """See `ExpertStore`."""
        return self._layout.nbytes

    def keys(self) -> Collection[ExpertKey]:
        """See `ExpertStore`."""
        return self._slabs.keys()

    def payload_bytes(self, key: ExpertKey) -> int:
        """See `ExpertStore`."""
        return self._slab(key).payload

    def read_bytes(self, key: ExpertKey) -> int:
        """See `ExpertStore`."""
        self._slab(key)
        return self._layout.nbytes

    def layout(self, key: ExpertKey) -> SlabLayout:
        """See `ExpertStore`."""
        self._slab(key)
        return self._layout

    def read(self, key: ExpertKey, slab: memoryview) -> int:
        """See `ExpertStore`. Also raises `TransferError` when the slab's checksum is wrong."""
        place, nbytes, file = self._slab(key), self._layout.nbytes, self._file
        if len(slab) < nbytes:
            raise TransferError(f"{named(key)}: slab of {len(slab)} bytes, wanted {nbytes}")
        if file is None:
            raise TransferError(f"{named(key)}: {self.path} was to be read after the store was closed")
        before = file.generation  # a write that another reader notices meanwhile must not pass for checked
        try:
            count = file.read(slab[:nbytes], place.offset, nbytes)
        except TransferError as error:
            raise TransferError(f"{named(key)}: {error}") from None
        if self.verify == "always" or (self.verify == "first" and self._verified.get(key) != file.generation):
            self._check(key, place, slab)
            self._verified[key] = before
        return count

    def close(self) -> None:
        """See `ExpertStore`."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()

    def _check(self, key: ExpertKey, place: Slab, slab: memoryview) -> None:
        found = zlib.crc32(slab[: place.payload])
        if found != place.crc32:
            raise TransferError(
                f"{named(key)}: {self.path} has checksum {found:#010x} at byte {place.offset}, "
                f"wanted {place.crc32:#010x}; the file or the disk is damaged: convert the checkpoint again"
            )

    def _slab(self, key: ExpertKey) -> Slab:
        place = self._slabs.get(key)
        if place is None:
            raise TransferError(f"{named(key)}: no such expert in this checkpoint")
        return place


def _require_one_source(checkpoint: Checkpoint, header: PackedHeader) -> None:
    wanted = header.description.source
    for path, metadata in checkpoint.metadata.items():
        found = metadata.get(SOURCE_KEY)
        if found != wanted:
            said = "is not part of a converted checkpoint" if found is None else f"was made of checkpoint {found}"
            raise CheckpointError(
                f"{checkpoint.directory / PACKED_FILE}: made of checkpoint {wanted}, but {path.name} beside it {said}; "
                "convert again"
            )
