"""The packed store: experts as they were put in, one read each, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offload_engine.errors import CheckpointError, TransferError
from offload_engine.experts.storage.conversion import Kind, convert
from offload_engine.experts.storage.layout import MATRIX_ALIGNMENT, SLOT_ALIGNMENT, packed_layout
from offload_engine.experts.storage.opening import open_store
from offload_engine.experts.storage.packed import PackedStore, Verify
from offload_engine.experts.storage.packed_header import PACKED_FILE, read_packed_header
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.quantized import ExpertFormat, Matrix, quantize_int4, quantize_int8
from tests.checkpoints import tiny_config, write_checkpoint
from tests.contracts.store_contract import EVERY_KEY, KEY, RAW, StoreContract, read, same, slab_for

CONFIG = ModelConfig.from_dict(RAW)


def write_packed(directory: Path, kind: Kind = "stored", *, identity: str = "one", seed: int = 0) -> Path:
    source = write_checkpoint(directory.with_name(f"{directory.name}-source"), RAW, seed=seed)
    return convert(source, directory, kind, identity=identity).directory


def open_packed(directory: Path, *, direct: bool = True, verify: Verify = "first") -> PackedStore:
    return PackedStore(CONFIG, Checkpoint.open(directory), direct=direct, verify=verify)


class TestPackedStore(StoreContract):
    FILE = PACKED_FILE
    KIND: Kind = "stored"
    FORMAT = ExpertFormat(torch.float32)

    def write(self, directory: Path) -> Path:
        return write_packed(directory, self.KIND)

    def open(self, directory: Path, *, direct: bool = True) -> PackedStore:
        return open_packed(directory, direct=direct)

    def test_the_format_is_known(self, directory: Path) -> None:
        assert self.open(directory).format == self.FORMAT

    def test_a_file_that_was_only_touched_stays_readable(self, directory: Path, wanted: Any) -> None:
        store = self.open(directory)
        os.utime(directory / self.FILE, ns=(1, 10**18))
        assert same(read(store, KEY), wanted(KEY)), "its checksums tell that nothing has changed"

    def test_one_read_fills_a_slot(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        store, reads = self.open(directory), []
        real = os.preadv
        monkeypatch.setattr(os, "preadv", lambda *asked: reads.append(asked[2]) or real(*asked))
        for key in EVERY_KEY:
            assert store.read(key, slab_for(store)) == store.slab_bytes
        assert len(reads) == len(EVERY_KEY)
        assert all(offset % SLOT_ALIGNMENT == 0 for offset in reads)


class TestInt8(TestPackedStore):
    KIND = "int8"
    FORMAT = ExpertFormat(torch.float32, 8)

    def expected(self, matrix: Tensor) -> Matrix:
        return quantize_int8(matrix)


class TestInt4(TestPackedStore):
    KIND = "int4"
    FORMAT = ExpertFormat(torch.float32, 4, 16)  # 16 columns are all that down has

    def expected(self, matrix: Tensor) -> Matrix:
        return quantize_int4(matrix, 16)


@given(
    st.sampled_from([(None, 0), (8, 0), (4, 2), (4, 16)]), st.integers(1, 9).map(lambda n: 16 * n), st.integers(1, 5)
)
@settings(max_examples=40)
def test_parts_of_a_slab_are_aligned_and_apart(form: Any, hidden: int, width: int) -> None:
    bits, group = form
    layout, payload = packed_layout(ExpertFormat(torch.bfloat16, bits, group), hidden, 16 * width)
    spans = []
    for place in (layout.gate, layout.up, layout.down):
        count = place.rows * place.columns
        spans.append((place.offset, count * {None: 2, 8: 1}.get(bits, 1) // (2 if bits == 4 else 1)))
        if place.scales is not None:
            spans.append((place.scales, place.rows * 4 if bits == 8 else count // group * 2))
    assert all(offset % MATRIX_ALIGNMENT == 0 for offset, _ in spans)
    ends = [offset + nbytes for offset, nbytes in spans]
    for end, (offset, _) in zip(ends, spans[1:], strict=False):
        assert 0 <= offset - end < MATRIX_ALIGNMENT
    assert ends[-1] == payload <= layout.nbytes < payload + SLOT_ALIGNMENT


def test_the_file_is_as_docs_say(tmp_path: Path) -> None:
    """Read with nothing but docs/packed-format.md."""
    content = (write_packed(tmp_path / "int4", "int4", identity="abc") / PACKED_FILE).read_bytes()
    magic, version, checksum, length, size, text_bytes, count = struct.unpack_from("<8sIIQQQQ", content)
    assert (magic, version, size, count) == (b"DMOEPACK", 1, len(content), 32)
    assert checksum == zlib.crc32(content[16:length])
    assert json.loads(content[48 : 48 + text_bytes]) == {
        "experts": "int4",
        "dtype": "float32",
        "group_size": 16,
        "hidden_size": 32,
        "moe_intermediate_size": 16,
        "source": "abc",
    }
    store = open_packed(tmp_path / "int4")
    for place, (layer, expert, offset, payload, crc, zero) in enumerate(
        struct.iter_unpack("<IIQQII", content[48 + text_bytes :][: 32 * count])
    ):
        assert (layer, expert, zero) == (1 + place // 16, place % 16, 0)
        assert offset == length + place * store.slab_bytes
        assert zlib.crc32(content[offset : offset + payload]) == crc
    assert not any(content[48 + text_bytes + 32 * count : length])
    rows, columns, group = 16, 32, 16
    values = torch.frombuffer(bytearray(content[length : length + rows * columns // 2]), dtype=torch.uint8)
    scales_at = length + rows * columns // 2
    scales = torch.frombuffer(bytearray(content[scales_at : scales_at + rows * 2 * 2]), dtype=torch.bfloat16)
    gate = read(store, EVERY_KEY[0]).gate.dequantize(torch.float32)  # type: ignore[union-attr]
    for row, column in ((0, 0), (3, 9), (15, 31)):
        which, inside = divmod(column, group)
        byte = int(values[row * columns // 2 + which * group // 2 + inside % (group // 2)])
        nibble = byte & 15 if inside < group // 2 else byte >> 4
        assert gate[row, column] == (nibble - 8) * scales[row * 2 + which].float()


def damage(file: Path, place: int, by: int = 1) -> None:
    with file.open("r+b") as stream:
        stream.seek(place)
        one = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([one ^ by]))


def test_a_wrong_checksum_names_the_expert(tmp_path: Path) -> None:
    directory = write_packed(tmp_path / "model")
    place = read_packed_header(directory / PACKED_FILE).slabs[KEY]
    damage(directory / PACKED_FILE, place.offset + place.payload - 1)
    for verify in ("first", "always"):
        store = open_packed(directory, verify=verify)  # type: ignore[arg-type]
        for _ in range(2):
            with pytest.raises(
                TransferError, match=rf"expert 7 of layer 2: .*{PACKED_FILE} has checksum 0x.* wanted 0x"
            ):
                store.read(KEY, slab_for(store))
        others = [key for key in EVERY_KEY if key != KEY]
        assert all(store.read(key, slab_for(store)) for key in others)
    store = open_packed(directory, verify="never")
    store.read(KEY, slab_for(store))


@pytest.mark.parametrize(("verify", "seen"), [("first", True), ("always", True), ("never", False)])
def test_a_slab_that_is_written_to_while_open_is_checked_again(tmp_path: Path, verify: Any, seen: bool) -> None:
    directory = write_packed(tmp_path / "model")
    store = open_packed(directory, verify=verify)
    store.read(KEY, slab_for(store))
    damage(directory / PACKED_FILE, read_packed_header(directory / PACKED_FILE).slabs[KEY].offset)
    os.utime(directory / PACKED_FILE, ns=(time.time_ns(), time.time_ns() + 10**9))  # clocks of files are coarse
    if seen:
        with pytest.raises(TransferError, match=r"expert 7 of layer 2: .* has checksum"):
            store.read(KEY, slab_for(store))
    else:
        store.read(KEY, slab_for(store))


def test_first_checks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    real = zlib.crc32
    directory = write_packed(tmp_path / "model")
    stores = {verify: open_packed(directory, verify=verify) for verify in ("first", "always", "never")}  # type: ignore[arg-type]
    monkeypatch.setattr(zlib, "crc32", lambda data: checked.append(len(data)) or real(data))
    for verify, times in (("first", 1), ("always", 3), ("never", 0)):
        checked.clear()
        for _ in range(3):
            stores[verify].read(KEY, slab_for(stores[verify]))
        assert checked == [stores[verify].payload_bytes(KEY)] * times


def test_a_write_that_another_reader_notices_is_not_taken_for_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_packed(write_packed(tmp_path / "model"))
    file = store._file
    assert file is not None
    real, checked = file.read, []

    def read(*arguments: Any) -> int:
        count = real(*arguments)
        file.generation += 1
        monkeypatch.setattr(file, "read", real)
        return count

    monkeypatch.setattr(file, "read", read)
    monkeypatch.setattr(store, "_check", lambda key, *_: checked.append(key))
    for _ in range(3):
        store.read(KEY, slab_for(store))
    assert checked == [KEY, KEY]


@settings(max_examples=60)
@given(data=st.data())
def test_no_damage_to_the_header_goes_unseen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = shared(tmp_path_factory)
    file = directory / PACKED_FILE
    length = read_packed_header(file).header_bytes
    place, by = data.draw(st.integers(0, length - 1)), data.draw(st.integers(1, 255))
    damage(file, place, by)
    try:
        with pytest.raises(CheckpointError, match=PACKED_FILE):
            open_packed(directory)
    finally:
        damage(file, place, by)
    open_packed(directory).close()


SHARED: list[Path] = []


def shared(factory: pytest.TempPathFactory) -> Path:
    if not SHARED:
        SHARED.append(write_packed(factory.mktemp("packed") / "model"))
    return SHARED[0]


def rewrite(file: Path, change: Callable[[bytearray], None]) -> None:
    """Change the header and mend its checksum, as a writer with a defect would."""
    content = bytearray(file.read_bytes())
    change(content)
    length = int.from_bytes(content[16:24], "little")
    if 0 < length <= len(content):
        content[12:16] = zlib.crc32(content[16:length]).to_bytes(4, "little")
    file.write_bytes(content)


def put(place: int, form: str, *values: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(form, content, place, *values)


def table(content: bytes) -> int:
    return 48 + int.from_bytes(content[32:40], "little")


def in_table(place: int, form: str, *values: int) -> Callable[[bytearray], None]:
    return lambda content: struct.pack_into(form, content, table(content) + place, *values)


def in_text(old: bytes, new: bytes) -> Callable[[bytearray], None]:
    assert len(old) == len(new)

    def change(content: bytearray) -> None:
        assert content.count(old) == 1
        content[:] = content.replace(old, new)

    return change


def cut(content: bytearray) -> None:
    del content[-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(0, "<8s", b"SAFETENS"), r"starts with b'SAFETENS', wanted b'DMOEPACK'"),  # type: ignore[arg-type]
        (put(8, "<I", 2), r"format version 2, wanted 1; convert again with this version"),
        (put(16, "<Q", 0), r"header length 0, wanted a multiple of 4096"),
        (put(16, "<Q", 2**40), rf"header length {2**40}, wanted"),
        (put(32, "<Q", 2**40), r"32 slabs don't fit a header of 4096 bytes"),
        (put(40, "<Q", 2**20), r"1048576 slabs don't fit"),
        (put(40, "<Q", 31), r"expert 15 of layer 2 is missing, wanted by config.json"),
        (cut, r"\d+ bytes long, wanted \d+; it is cut short"),
        (in_table(4, "<I", 1), r"expert 1 of layer 1 is listed twice"),
        (in_table(4, "<I", 16), r"expert 0 of layer 1 is missing"),
        (in_table(8, "<Q", 4097), r"expert 0 of layer 1: slab at byte 4097, wanted a multiple of 4096"),
        (in_table(8, "<Q", 0), r"expert 0 of layer 1: slab at byte 0"),
        (in_table(8, "<Q", 2**40), r"expert 0 of layer 1: slab at byte"),
        (in_table(8, "<Q", 12288), r"slab at byte 12288, wanted"),
        (in_table(16, "<Q", 100), r"expert 0 of layer 1: slab of 100 bytes, wanted 6144"),
        (in_text(b'"hidden_size":32', b'"hidden_size":16'), r"slab of 6144 bytes, wanted"),
        (in_text(b'"experts":"float32"', b'"experts":"float64"'), r"description in the header, experts: "),
        (in_text(b'"dtype":"float32"', b'"dtype":"float16"'), r"experts is 'float32', wanted 'float16' as dtype"),
        (in_text(b'"group_size":0', b'"group_size":4'), r"group_size is 4, wanted 0"),
        (in_text(b'{"experts"', b'["experts"'), r"description in the header, all of it: Invalid JSON"),
        (in_text(b'"source"', b'"soured"'), r"description in the header, source: Field required"),
    ],
)
def test_what_a_header_may_not_say(tmp_path: Path, change: Any, message: str) -> None:
    directory = write_packed(tmp_path / "model")
    rewrite(directory / PACKED_FILE, change)
    with pytest.raises(CheckpointError, match=rf"{PACKED_FILE}: .*{message}|{PACKED_FILE}: {message}"):
        open_packed(directory)


@pytest.mark.parametrize("size", [0, 7, 47, 48, 4000, 4096, 10_000])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    directory = write_packed(tmp_path / "model")
    os.truncate(directory / PACKED_FILE, size)
    with pytest.raises(CheckpointError, match=PACKED_FILE):
        open_packed(directory)


def test_a_damaged_group_size_is_refused(tmp_path: Path) -> None:
    directory = write_packed(tmp_path / "model", "int4")
    rewrite(directory / PACKED_FILE, in_text(b'"group_size":16', b'"group_size":12'))
    with pytest.raises(CheckpointError, match="group_size is 12, wanted a power of two above 1 that divides 32 and 16"):
        open_packed(directory)


def test_a_store_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    one, other = write_packed(tmp_path / "one"), write_packed(tmp_path / "other", identity="two", seed=1)
    (other / PACKED_FILE).rename(one / PACKED_FILE)
    with pytest.raises(
        CheckpointError, match=r"made of checkpoint two, but model.safetensors beside it was made of checkpoint one"
    ):
        open_store(CONFIG, Checkpoint.open(one))
    published = write_checkpoint(tmp_path / "published", RAW)
    (one / PACKED_FILE).rename(published / PACKED_FILE)
    with pytest.raises(CheckpointError, match=r"beside it is not part of a converted checkpoint; convert again"):
        open_store(CONFIG, Checkpoint.open(published))


def test_a_store_of_another_architecture_is_refused(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_packed(tmp_path / "model"))
    for change, message in (
        ({"moe_intermediate_size": 32}, "experts of width 16 in a model of 32, wanted 32 in 32"),
        ({"num_experts": 32}, "expert 16 of layer 1 is missing, wanted by config.json"),
        ({"num_experts": 8}, "expert 8 of layer 1 is not wanted by config.json"),
        ({"num_hidden_layers": 4}, "expert 0 of layer 3 is missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            PackedStore(ModelConfig.from_dict(tiny_config(**change)), checkpoint)


def test_either_layout_is_opened(tmp_path: Path) -> None:
    directory = write_packed(tmp_path / "model")
    store = open_store(CONFIG, Checkpoint.open(directory), verify="always")
    assert isinstance(store, PackedStore)
    assert store.verify == "always"
    assert isinstance(open_store(CONFIG, Checkpoint.open(tmp_path / "model-source")), SafetensorsStore)
    (directory / PACKED_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"{PACKED_FILE}: not found, but this is a converted checkpoint"):
        open_store(CONFIG, Checkpoint.open(directory))
