"""What a conversion writes, what it says of it, and what it leaves behind when it fails: nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from offload_engine.errors import CheckpointError, OffloadError, TransferError, UsageError
from offload_engine.experts.storage import conversion, packed_writer
from offload_engine.experts.storage.conversion import Kind, convert
from offload_engine.experts.storage.opening import open_store
from offload_engine.experts.storage.packed_header import PACKED_FILE, SOURCE_KEY
from offload_engine.experts.storage.rounding import RoundingErrors
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.model import resident_files
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.moe import ExpertWeights
from offload_engine.model.partial_directory import MARKER
from offload_engine.model.quantized import ExpertFormat
from offload_engine.model.weights import load_resident, unexpected_tensors
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint, write_tensors
from tests.contracts.store_contract import EVERY_KEY, RAW, read, same, stored
from tests.page_cache import cached_bytes, evictable

CONFIG = ModelConfig.from_dict(RAW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["split", "merged"])
def test_stored_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, layout: Any) -> None:
    source = write_checkpoint(tmp_path / "source", RAW, dtype=dtype, layout=layout, shards=2)
    done = convert(source, tmp_path / "out", identity="one")
    assert done.errors.exact
    assert done.original == done.format == ExpertFormat(dtype)
    checkpoint, tensors = Checkpoint.open(done.directory), random_tensors(RAW, dtype=dtype, layout="split", seed=0)
    store = open_store(CONFIG, checkpoint)
    assert all(same(read(store, key), stored(tensors, key)) for key in EVERY_KEY)
    resident = [name for name in tensors if ".mlp.experts." not in name]
    assert sorted(checkpoint.tensors) == sorted(resident)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in resident)
    assert unexpected_tensors(CONFIG, checkpoint) == []
    load_resident(CONFIG, checkpoint, dtype)
    sizes = (done.expert_bytes, done.resident_bytes, done.slab)
    assert sizes == ((done.directory / PACKED_FILE).stat().st_size, checkpoint.nbytes, store.slab_bytes)


@pytest.mark.parametrize(("dtype", "exact"), [(torch.bfloat16, True), (torch.float32, False)])
def test_bf16_is_lossless_for_bf16_and_says_so_otherwise(tmp_path: Path, dtype: torch.dtype, exact: bool) -> None:
    source = write_checkpoint(tmp_path / "source", RAW, dtype=dtype)
    done = convert(source, tmp_path / "out", "bf16", identity="one")
    assert (done.errors.exact, done.format) == (exact, ExpertFormat(torch.bfloat16))
    if not exact:
        assert all(0.0005 < error.relative < 2**-8 for error in done.errors.kinds.values())


@pytest.mark.parametrize(("kind", "low", "high"), [("int8", 0.002, 0.01), ("int4", 0.05, 0.1)])
def test_what_rounding_costs_is_what_it_is_said_to_cost(tmp_path: Path, kind: Kind, low: float, high: float) -> None:
    source = write_checkpoint(tmp_path / "source", RAW, dtype=torch.bfloat16)
    done = convert(source, tmp_path / "out", kind, identity="one")
    tensors = random_tensors(RAW, dtype=torch.bfloat16, layout="split", seed=0)
    store = open_store(CONFIG, Checkpoint.open(done.directory))
    assert store.format.dtype == torch.bfloat16
    for place, error in enumerate(done.errors.kinds.values()):
        pairs = {key: (read(store, key)[place], stored(tensors, key)[place].float()) for key in EVERY_KEY}
        gaps = {key: found.dequantize(torch.float32) - wanted for key, (found, wanted) in pairs.items()}  # type: ignore[union-attr]
        relative = {key: float(gaps[key].norm() / pairs[key][1].norm()) for key in EVERY_KEY}
        whole = torch.stack(list(gaps.values())).norm() / torch.stack([one for _, one in pairs.values()]).norm()
        assert error.relative == pytest.approx(float(whole), rel=1e-4)
        assert low < error.relative < high
        assert error.worst_key == max(relative, key=relative.__getitem__)
        assert error.worst == pytest.approx(max(relative.values()), rel=1e-4)
        assert error.largest == pytest.approx(max(float(gap.abs().max()) for gap in gaps.values()), rel=1e-6)


def test_errors_of_zeros() -> None:
    errors, blank = RoundingErrors(), ExpertWeights(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(4, 2))
    errors.add(EVERY_KEY[0], blank, blank)
    assert errors.exact
    assert [(one.relative, one.worst_key) for one in errors.kinds.values()] == [(0.0, None)] * 3


def test_the_group_is_as_asked_or_the_largest_that_fits(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", RAW)
    for wanted, found in ((64, 16), (16, 16), (9, 8), (2, 2)):
        done = convert(source, tmp_path / f"{wanted}", "int4", group=wanted, identity="one")
        assert done.format == ExpertFormat(torch.float32, 4, found)
    with pytest.raises(UsageError, match="--group-size is 1, wanted at least 2"):
        convert(source, tmp_path / "out", "int4", group=1, identity="one")
    odd = write_checkpoint(tmp_path / "odd", tiny_config(moe_intermediate_size=17))
    with pytest.raises(UsageError, match="32 and 17 columns have no int4 format; use --experts int8"):
        convert(odd, tmp_path / "out", "int4", identity="one")
    assert convert(odd, tmp_path / "out", "int8", identity="one").format.bits == 8


def test_files_beside_the_weights_go_along_but_no_code_and_no_other_weights(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", RAW, shards=2)
    kept = ["tokenizer.json", "chat_template.jinja", "README.md"]
    for name in (*kept, ".secret.json", "modeling.py", "pytorch_model.bin", "old.safetensors"):
        (source / name).write_text(f"this is {name}")
    out = convert(source, tmp_path / "out", identity="one").directory
    assert {path.name for path in out.iterdir()} == {"config.json", PACKED_FILE, "model.safetensors", *kept}
    assert all((out / name).read_text() == f"this is {name}" for name in kept)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_many_resident_tensors_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident_files, "SHARD_BYTES", 10_000)
    source = write_checkpoint(tmp_path / "source", RAW)
    checkpoint = Checkpoint.open(convert(source, tmp_path / "out", identity="one").directory)
    assert len(checkpoint.file_sizes) > 2
    assert all(metadata[SOURCE_KEY] == "one" for metadata in checkpoint.metadata.values())
    tensors = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    assert all(torch.equal(checkpoint.read(name), tensors[name]) for name in checkpoint.tensors)
    open_store(CONFIG, checkpoint).close()
    load_resident(CONFIG, checkpoint, torch.float32)


def test_a_conversion_leaves_nothing_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_writer, "SYNC_BYTES", 100_000)
    source = write_checkpoint(tmp_path / "source", tiny_config(hidden_size=128, moe_intermediate_size=64))
    out = convert(source, tmp_path / "out", identity="one").directory
    before = {path: cached_bytes(path) for path in out.iterdir()}
    if not evictable(out / PACKED_FILE):
        pytest.skip("this file system keeps its files in memory")
    assert set(before.values()) == {0}


def test_packed_is_a_source_too_unless_it_is_rounded(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", RAW, dtype=torch.bfloat16)
    packed = convert(source, tmp_path / "packed", identity="one").directory
    for kind in ("int8", "int4"):
        one = convert(source, tmp_path / f"{kind}-one", kind, identity="one").directory  # type: ignore[arg-type]
        two = convert(packed, tmp_path / f"{kind}-two", kind, identity="one").directory  # type: ignore[arg-type]
        assert (one / PACKED_FILE).read_bytes() == (two / PACKED_FILE).read_bytes()
        with pytest.raises(UsageError, match=rf"its experts are {kind}.* already; .* convert the original instead"):
            convert(two, tmp_path / "again", "int8", identity="one")


def refused(tmp_path: Path, source: Path, kind: Kind, error: type[OffloadError], message: str) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=message):
        convert(source, out, kind, identity="one")
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_what_cannot_be_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", RAW)
    dense = write_checkpoint(tmp_path / "dense", tiny_config(first_k_dense_replace=3))
    refused(tmp_path, dense, "stored", CheckpointError, "no MoE layer, so there is nothing to convert")
    tensors = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    tensors["model.layers.2.mlp.experts.7.up_proj.weight"][3, 5] = float("nan")
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    write_tensors(broken, tensors)
    for kind in ("int8", "int4"):
        message = "expert 7 of layer 2: holds a weight that is not finite, so it can't be quantised"
        refused(tmp_path, broken, kind, CheckpointError, message)  # type: ignore[arg-type]
    assert convert(broken, tmp_path / "kept", identity="one").errors.exact
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_200_000))
        message = r"--out .*out: needs 1\.\d+ MB of disk, but 1\.20 MB are free"
        refused(tmp_path, source, "stored", OffloadError, message)


def test_an_existing_directory_is_refused(tmp_path: Path) -> None:
    source, out = write_checkpoint(tmp_path / "source", RAW), tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match=r"--out .*out: exists already"):
        convert(source, out, identity="one")
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"):
        convert(source, out, identity="one")


def test_a_source_of_the_name_that_is_written_first_is_kept(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "out.partial", RAW)
    with pytest.raises(UsageError, match=r"is written as .*out\.partial first"):
        convert(source, tmp_path / "out", identity="one")
    assert (source / "config.json").exists()
    assert not (tmp_path / "out").exists()


def test_disks_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_checkpoint(tmp_path / "source", RAW)

    def full(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        refused(tmp_path, source, "stored", OffloadError, r"--out .*: can't be written \(No space left on device\)")
    with monkeypatch.context() as patched:
        patched.setattr(conversion, "write_tensors", full)
        refused(tmp_path, source, "stored", OffloadError, "No space left")

    def told_by_the_library(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr(resident_files, "save_file", told_by_the_library)
        refused(tmp_path, source, "stored", OffloadError, r"--out .*: can't be written \(.*No space left")

    def unreadable(*_: Any) -> int:
        raise TransferError("expert 0 of layer 1: the disk is gone")

    monkeypatch.setattr(SafetensorsStore, "read", unreadable)
    refused(tmp_path, source, "stored", TransferError, "expert 0 of layer 1")


def test_progress_reaches_the_end_and_what_was_left_behind_goes(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", RAW)
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "config.json").write_text(json.dumps(RAW))
    (left / MARKER).touch()
    told: list[tuple[str, int, int]] = []
    done = convert(source, tmp_path / "out", identity="one", progress=lambda *one: told.append(one))
    total = done.resident_bytes + done.expert_bytes
    assert {(what, whole) for what, _, whole in told} == {("weights", total)}
    counts = [count for _, count, _ in told]
    assert counts == sorted(counts)
    assert counts[-1] == total
    assert not left.exists()
