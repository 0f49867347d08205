"""The embedding table stays on the host where the layers are on a device; here torch's meta device stands for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.weights import load_resident
from tests.checkpoints import tiny_config, write_checkpoint

META = torch.device("meta")


@pytest.mark.parametrize("tied", [False, True])
def test_only_rows_of_the_table_go_to_the_device(tmp_path: Path, tied: bool) -> None:
    config = tiny_config(tie_word_embeddings=tied)
    write_checkpoint(tmp_path, config)
    model = load_resident(ModelConfig.from_dict(config), Checkpoint.open(tmp_path), torch.float32, META)
    tables = {name for name, tensor in model.state_dict().items() if tensor.device.type == "cpu"}
    assert tables == (set() if tied else {"model.word_embeddings.weight"})
    rows = model.model.embed(torch.arange(5), META)
    assert (rows.device, rows.shape) == (META, (5, config["hidden_size"]))
    assert rows.dtype == torch.float32


def test_rows_are_those_of_the_table(tmp_path: Path) -> None:
    config = tiny_config()
    write_checkpoint(tmp_path, config)
    model = load_resident(ModelConfig.from_dict(config), Checkpoint.open(tmp_path), torch.float32)
    ids = torch.tensor([[3, 1], [0, 3]])
    assert torch.equal(model.model.embed(ids, torch.device("cpu")), model.model.word_embeddings.weight[ids])
