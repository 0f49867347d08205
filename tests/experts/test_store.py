"""Reading experts out of a checkpoint as it is: the right bytes whatever the layout, dtype, address and file system."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from offload_engine.core import ExpertKey, ForwardInfo, Phase, RoutingDecision
from offload_engine.errors import CheckpointError, TransferError
from offload_engine.experts.arena import SlotArena
from offload_engine.experts.layout import SLOT_ALIGNMENT
from offload_engine.experts.store import SafetensorsStore, load_all
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ExpertWeights, ResidentExperts
from offload_engine.model.quantized import ExpertFormat
from tests.checkpoints import GOLDEN, needs_golden, random_tensors, tiny_config, write_checkpoint, write_tensors
from tests.page_cache import cached_bytes, evictable

RAW = tiny_config()
KEY = ExpertKey(2, 7)
FILE = "model.safetensors"


def open_store(directory: Path, raw: dict[str, Any] = RAW, *, direct: bool = True) -> SafetensorsStore:
    return SafetensorsStore(ModelConfig.from_dict(raw), Checkpoint.open(directory), direct=direct)


def every_key(store: SafetensorsStore) -> list[ExpertKey]:
    return list(store.keys())


def slab_for(store: SafetensorsStore) -> memoryview:
    buffer = SlotArena(1, store.slab_bytes).buffer(0)
    buffer[:] = b"\xee" * len(buffer)
    return buffer


def read(store: SafetensorsStore, key: ExpertKey) -> ExpertWeights:
    slab = slab_for(store)
    store.read(key, slab)
    return store.layout(key).weights(torch.frombuffer(slab, dtype=torch.uint8))


def stored(tensors: dict[str, Tensor], key: ExpertKey) -> ExpertWeights:
    prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}."
    return ExpertWeights(*(tensors[f"{prefix}{which}_proj.weight"] for which in ("gate", "up", "down")))


def same(found: ExpertWeights, wanted: ExpertWeights) -> bool:
    return all(one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


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


@pytest.mark.parametrize("layout", ["split", "merged"])
@pytest.mark.parametrize("direct", [True, False])
def test_sizes_tell_what_happens(tmp_path: Path, direct: bool, layout: Any) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW, layout=layout), direct=direct)
    assert store.slab_bytes % SLOT_ALIGNMENT == 0
    assert store.slab_bytes == max(store.layout(key).nbytes for key in every_key(store))
    last = max(store.keys(), key=lambda key: store.layout(key).nbytes)
    for key in every_key(store):
        assert store.payload_bytes(key) == 3 * 16 * 32 * 4
        count = store.read(key, slab_for(store))
        assert store.payload_bytes(key) <= count <= store.read_bytes(key)
    assert store.read_bytes(last) <= store.slab_bytes


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


def test_direct_io_is_used_where_there_is_any(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RAW)
    try:
        os.close(os.open(tmp_path / FILE, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no direct I/O")
    assert open_store(tmp_path).direct
    assert not open_store(tmp_path, direct=False).direct


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


@pytest.mark.parametrize("refuse", [refuse_direct_opens, refuse_direct_reads])
def test_a_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Any) -> None:
    write_checkpoint(tmp_path, RAW)
    refuse(monkeypatch)
    store = open_store(tmp_path)
    assert not store.direct
    assert same(read(store, KEY), stored(random_tensors(RAW, dtype=torch.float32, layout="split", seed=0), KEY))


@pytest.mark.parametrize("direct", [True, False])
def test_reads_leave_the_page_cache_alone(tmp_path: Path, direct: bool) -> None:
    raw = tiny_config(hidden_size=256, moe_intermediate_size=64)
    write_checkpoint(tmp_path, raw)
    store = open_store(tmp_path, raw, direct=direct)
    if direct and not store.direct:
        pytest.skip("this file system has no direct I/O")
    if not evictable(tmp_path / FILE):
        pytest.skip("this file system keeps its files in memory")
    for key in every_key(store):
        store.read(key, slab_for(store))
    assert cached_bytes(tmp_path / FILE) == 0


@pytest.mark.parametrize("direct", [True, False])
def test_reads_in_pieces_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    """A kernel may give less than it was asked for."""
    store = open_store(write_checkpoint(tmp_path, RAW), direct=direct)
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
    assert same(read(store, KEY), stored(random_tensors(RAW, dtype=torch.float32, layout="split", seed=0), KEY))
    assert pieces >= store.payload_bytes(KEY) // SLOT_ALIGNMENT


@pytest.mark.parametrize("direct", [True, False])
def test_a_short_read_names_expert_file_and_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW), direct=direct)
    first: list[int] = []

    def ending(_descriptor: int, _buffers: Any, offset: int) -> int:
        first.append(offset)
        return max(0, first[0] + 1000 - offset)

    monkeypatch.setattr(os, "preadv", ending)
    with pytest.raises(
        TransferError, match=rf"expert 7 of layer 2: .*{FILE} gave 1000 bytes at offset \d+, wanted \d+"
    ):
        store.read(KEY, slab_for(store))


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0"])
def test_a_file_that_changes_size_is_refused(tmp_path: Path, change: Any) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW))
    file = tmp_path / FILE
    content = file.read_bytes()
    file.write_bytes(change(content))
    wanted = rf"expert 7 of layer 2: .*{FILE} has {len(change(content))} bytes, but {len(content)} when opened"
    with pytest.raises(TransferError, match=wanted):
        store.read(KEY, slab_for(store))


def test_a_file_deleted_while_open_stays_readable(tmp_path: Path) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW))
    before = read(store, KEY)
    (tmp_path / FILE).unlink()
    assert same(read(store, KEY), before)


def open_descriptors() -> int:
    return psutil.Process().num_fds()


def test_a_file_that_vanished_before_the_store_opens(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RAW, shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    before = open_descriptors()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: can't be opened"):
        SafetensorsStore(ModelConfig.from_dict(RAW), checkpoint)
    assert open_descriptors() == before


def test_an_io_error_names_expert_and_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW))

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(TransferError, match=rf"expert 7 of layer 2: .*{FILE} can't be read \(Input/output error\)"):
        store.read(KEY, slab_for(store))


def test_unknown_experts_and_small_slabs_are_refused(tmp_path: Path) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW))
    with pytest.raises(TransferError, match="expert 0 of layer 0: no such expert"):
        store.layout(ExpertKey(0, 0))
    with pytest.raises(
        TransferError, match=rf"expert 7 of layer 2: slab of 4096 bytes, wanted {store.read_bytes(KEY)}"
    ):
        store.read(KEY, slab_for(store)[:SLOT_ALIGNMENT])


def test_close_is_idempotent_and_reads_after_it_say_so(tmp_path: Path) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW))
    store.close()
    store.close()
    with pytest.raises(TransferError, match=r"expert 7 of layer 2: .* after the store was closed"):
        store.read(KEY, slab_for(store))


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


@pytest.mark.parametrize("direct", [True, False])
def test_threads_read_at_once(tmp_path: Path, direct: bool) -> None:
    store = open_store(write_checkpoint(tmp_path, RAW, shards=2), direct=direct)
    tensors = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    arena = SlotArena(8, store.slab_bytes)
    together = threading.Barrier(8, timeout=30)

    def work(slot: int) -> bool:
        together.wait()
        keys = list(store.keys())
        for key in keys[slot:] + keys[:slot]:
            store.read(key, arena.buffer(slot))
            if not same(arena.weights(slot, store.layout(key)), stored(tensors, key)):
                return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


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
