"""A checkpoint of `make_checkpoint` of less than a megabyte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tools.checkpoint_maker.presets import Preset, config_of
from tools.make_checkpoint import make_checkpoint

POCKET = config_of(Preset(3, 32, 48, 8, 4, 2, 8, 512), torch.bfloat16)
POCKET_BYTES = 918_048


def write(
    out: Path, config: dict[str, Any] = POCKET, seed: int = 0, shard: int = 10**9, tok: Path | None = None
) -> int:
    """`make_checkpoint`, in silence."""
    return make_checkpoint(out, config, seed=seed, shard_bytes=shard, tokenizer=tok)


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor, through the index and safetensors' own reader."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(folder / file, "pt") as opened:
            names = set(opened.keys())
            assert names == {name for name, where in index["weight_map"].items() if where == file}
            tensors |= {name: opened.get_tensor(name) for name in names}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    return tensors
