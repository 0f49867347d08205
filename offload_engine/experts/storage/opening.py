"""Opening a checkpoint's experts, whichever way it keeps them."""

from __future__ import annotations

from offload_engine.errors import CheckpointError
from offload_engine.experts.storage.packed import PackedStore, Verify
from offload_engine.experts.storage.packed_header import PACKED_FILE, SOURCE_KEY
from offload_engine.experts.storage.store import ExpertStore, SafetensorsStore
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig


def open_store(config: ModelConfig, checkpoint: Checkpoint, *, verify: Verify = "first") -> ExpertStore:
    """A converted checkpoint's `PackedStore`, else a `SafetensorsStore`. Raises `CheckpointError` as they do.

    `verify`: when slabs are held against their checksums; a published checkpoint has none.
    """
    if (checkpoint.directory / PACKED_FILE).exists():
        return PackedStore(config, checkpoint, verify=verify)
    if any(SOURCE_KEY in metadata for metadata in checkpoint.metadata.values()):
        raise CheckpointError(
            f"{checkpoint.directory / PACKED_FILE}: not found, but this is a converted checkpoint; convert again"
        )
    return SafetensorsStore(config, checkpoint)
