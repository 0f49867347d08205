"""A random model of a few thousand parameters behind an engine, and the same model in plain float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from offload_engine.engine.engine import Engine
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.reference_model import ReferenceModel

SEED = 7
CONFIG = tiny_config()
MASK = CONFIG["mask_token_id"]


def open_tiny(directory: Path, **options: Any) -> Engine:
    """An engine on `CONFIG`'s checkpoint in `directory`, made if absent; it serves token ids only."""
    if not (directory / "config.json").exists():
        write_checkpoint(directory, CONFIG, seed=SEED)
    return Engine.from_pretrained(directory, gpu_mem="2GB", **{"routing": "original", **options})


def reference() -> ReferenceModel:
    """The model of `open_tiny`."""
    return ReferenceModel(CONFIG, random_tensors(CONFIG, dtype=torch.float32, layout="split", seed=SEED))
