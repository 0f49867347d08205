"""Reading experts out of a checkpoint as it is: the right bytes whatever the layout, dtype, address and file system."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from offload_engine.core import ExpertKey, ForwardInfo, Phase, RoutingDecision
from offload_engine.errors import CheckpointError, TransferError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.storage.layout import SLOT_ALIGNMENT
from offload_engine.experts.storage.store import SafetensorsStore, load_all
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ResidentExperts
from offload_engine.model.quantized import ExpertFormat
from tests.checkpoints import GOLDEN, needs_golden, random_tensors, tiny_config, write_checkpoint, write_tensors
from tests.contracts.store_contract import KEY, RAW, StoreContract, read, same, slab_for, stored

FILE = "model.safetensors"


def open_store(directory: Path, raw: dict[str, Any] = RAW, *, direct: bool = True) -> SafetensorsStore:
    return SafetensorsStore(ModelConfig.from_dict(raw), Checkpoint.open(directory), direct=direct)


def every_key(store: SafetensorsStore) -> list[ExpertKey]:
    return list(store.keys())


class TestSafetensorsStore(StoreContract):
    FILE = FILE

    def write(self, directory: Path) -> Path:
        return write_checkpoint(directory, RAW)

    def open(self, directory: Path, *, direct: bool = True) -> SafetensorsStore:
        return open_store(directory, direct=direct)

    def test_a_file_that_was_written_to_is_refused(self, directory: Path) -> None:
        """Nothing in it tells which of its experts are still what they were."""
        store = self.open(directory)
        read(store, KEY)
        os.utime(directory / self.FILE, ns=(1, 10**18))
        for _ in range(2):
            with pytest.raises(
                TransferError, match=rf"expert 7 of layer 2: .*{FILE} was written to since it was opened"
            ):
                read(store, KEY)


class TestMergedLayout(TestSafetensorsStore):
    def write(self, directory: Path) -> Path:
        return write_checkpoint(directory, RAW, layout="merged")


def lengthen_header(file: Path, by: int) -> None:
    """Pad the header with spaces, as the format allows: all the tensors move, to odd addresses if need be."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    file.write_bytes((length + by).to_bytes(8, "little") + content[8 : 8 + length] + b" " * by + content[8 + length :])


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("layout", ["split", "merged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_expert_arrives_as_stored(
    tmp_path: Path, direct: bool, layout: Any, dtype: torch.dtype, shards: int
) -> None:
    write_checkpoint(tmp_path, RAW, dtype=dtype, layout=layout, shards=shards)
    tensors = random_tensors(RAW, dtype=dtype, layout="split", seed=0)
    store = open_store(tmp_path, direct=direct)
    assert store.format == ExpertFormat(dtype)
    assert list(store.keys()) == [ExpertKey(layer, expert) for layer in (1, 2) for expert in range(16)]
    for key in every_key(store):
        assert same(read(store, key), stored(tensors, key))
    store.close()


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("by", [1, 2, 3, 5, 4091])
@pytest.mark.parametrize("layout", ["split", "merged"])
def test_odd_addresses(tmp_path: Path, direct: bool, by: int, layout: Any) -> None:
    write_checkpoint(tmp_path, RAW, layout=layout)
    lengthen_header(tmp_path / FILE, by)
    store = open_store(tmp_path, direct=direct)
    tensors = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    for key in every_key(store):
        assert same(read(store, key), stored(tensors, key))


@needs_golden
def test_golden_experts() -> None:
    config, checkpoint = ModelConfig.from_file(GOLDEN / "config.json"), Checkpoint.open(GOLDEN)
    store = SafetensorsStore(config, checkpoint)
    assert len(store.keys()) == 3 * 64
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors if ".experts." in name}
    assert all(same(read(store, key), stored(tensors, key)) for key in every_key(store))


def test_only_a_files_last_window_may_come_short(tmp_path: Path) -> None:
    """The window of whatever lies last in the file runs past its end; what is needed of it is there."""
    tensors = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    prefix = "model.layers.2.mlp.experts.7."
    last = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    write_tensors(tmp_path, {name: tensor for name, tensor in tensors.items() if name not in last})
    (tmp_path / FILE).rename(tmp_path / "rest.safetensors")
    write_tensors(tmp_path, last)
    (tmp_path / FILE).rename(tmp_path / "last.safetensors")
    weight_map = {name: "last.safetensors" if name in last else "rest.safetensors" for name in tensors}
    (tmp_path / "model.safetensors.index.json").write_text(str({"weight_map": weight_map}).replace("'", '"'))
    store = open_store(tmp_path)
    size = (tmp_path / "last.safetensors").stat().st_size
    assert size % SLOT_ALIGNMENT != 0
    assert store.read(KEY, slab_for(store)) == size < store.read_bytes(KEY)
    assert same(read(store, KEY), stored(tensors, KEY))


def open_descriptors() -> int:
    return psutil.Process().num_fds()


def test_a_file_that_vanished_before_the_store_opens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RAW, shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    before = open_descriptors()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: not found"):
        SafetensorsStore(ModelConfig.from_dict(RAW), checkpoint)
    assert open_descriptors() == before


def test_all_experts_share_one_dtype(tmp_path: Path) -> None:
    tensors = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    for which in ("gate", "up", "down"):
        name = f"model.layers.1.mlp.experts.5.{which}_proj.weight"
        tensors[name] = tensors[name].half()
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"expert 5 of layer 1.*wanted one dtype"):
        open_store(tmp_path)


def test_a_model_without_routed_experts_has_an_empty_store(tmp_path: Path) -> None:
    raw = tiny_config(first_k_dense_replace=3)
    store = open_store(write_checkpoint(tmp_path, raw), raw)
    assert len(store.keys()) == 0
    assert store.slab_bytes == SLOT_ALIGNMENT


def test_load_all_feeds_resident_experts(tmp_path: Path) -> None:
    """The oracle's weights are the stored ones, aligned as in a slot, and outlive the store."""
    store = open_store(write_checkpoint(tmp_path, RAW))
    tensors = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    weights = load_all(store, store.keys())
    slot = SlotArena(3, store.slab_bytes)
    for key in every_key(store):
        assert same(weights(*key), stored(tensors, key))
        for one, other in zip(weights(*key), slot.weights(2, store.layout(key)), strict=True):
            assert one.data_ptr() % SLOT_ALIGNMENT == other.data_ptr() % SLOT_ALIGNMENT
    store.close()
    hidden = torch.randn(5, 32)
    decision = RoutingDecision(torch.tensor([[3, 1]] * 5), torch.full((5, 2), 0.5))
    found = ResidentExperts(weights)
    plain = ResidentExperts(lambda layer, expert: stored(tensors, ExpertKey(layer, expert)))
    for executor in (found, plain):
        executor.begin(ForwardInfo(Phase.DENOISE))
    torch.testing.assert_close(found.run(1, hidden, decision), plain.run(1, hidden, decision))
