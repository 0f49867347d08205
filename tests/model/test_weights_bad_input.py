"""Damaged and hostile checkpoints: one `CheckpointError` that names the file and the fault, and nothing worse."""

from __future__ import annotations

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from torch import Tensor

from offload_engine.errors import CheckpointError
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.safetensors_header import MAX_HEADER_BYTES, read_header
from offload_engine.model.weights import all_expert_spans, load_resident
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint, write_tensors

RAW = tiny_config(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1)
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
shared_directory = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Entries = dict[str, Any]


def header_bytes(entries: Any, data: bytes = b"") -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> Entries:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def complaint(directory: Path, content: bytes, file: str = FILE) -> str:
    """The one line with which opening a directory with this file fails."""
    (directory / file).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    message = str(caught.value)
    assert file in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def open_whole(directory: Path) -> None:
    """Everything the engine does with a checkpoint before it runs."""
    config = ModelConfig.from_dict(RAW)
    checkpoint = Checkpoint.open(directory)
    assert checkpoint.fingerprint
    all_expert_spans(config, checkpoint)
    load_resident(config, checkpoint, torch.float32)


HEADERS: list[tuple[str, bytes, list[str]]] = [
    ("empty file", b"", ["0 bytes long", "at least 8"]),
    ("half a length", b"\x10\0\0", ["3 bytes long"]),
    ("length alone", (10).to_bytes(8, "little"), ["header length 10", "at most 0"]),
    ("length beyond the file", (50).to_bytes(8, "little") + b"{}", ["header length 50", "at most 2"]),
    ("length of 2^64 - 1", b"\xff" * 8 + b"{}", [str(2**64 - 1), "at most 2"]),
    ("a pickle", b"PK\x03\x04" * 40, ["header length", "no safetensors file"]),
    ("empty header", header_bytes(b""), ["starts with b''"]),
    ("leading space", header_bytes(b" {}"), ["starts with b' '"]),
    ("a list", header_bytes(b"[]"), ["starts with b'['"]),
    ("not JSON", header_bytes(b"{'a': 1}"), ["not valid JSON"]),
    ("not UTF-8", header_bytes(b'{"\xff": 1}'), ["not valid JSON"]),
    ("two objects", header_bytes(b"{}{}"), ["not valid JSON"]),
    ("deep nesting", header_bytes(b'{"a":' * 100_000), ["not valid JSON"]),
    ("huge number", header_bytes(b'{"a":' + b"9" * 10_000 + b"}"), ["not valid JSON"]),
    ("same name twice", header_bytes(b'{"a":{},"a":{}}'), ["'a' appears twice"]),
    ("metadata no object", header_bytes({"__metadata__": [1]}), ["__metadata__ is [1]"]),
    ("metadata no strings", header_bytes({"__metadata__": {"a": 1}}), ["__metadata__ is {'a': 1}"]),
    ("entry no object", header_bytes({"a": 3}), ["'a'", "entry is 3"]),
    ("field missing", header_bytes({"a": {"dtype": "U8", "shape": [0]}}), ["'a'", "wanted dtype, shape"]),
    ("field too many", header_bytes({"a": {**entry(0, 0), "x": 1}}), ["'a'", "wanted dtype, shape"]),
    ("unknown dtype", header_bytes({"a": entry(0, 4, dtype="F4")}, b"1234"), ["dtype is 'F4'", "BF16"]),
    ("dtype no string", header_bytes({"a": {**entry(0, 4), "dtype": [1]}}, b"1234"), ["dtype is [1]"]),
    ("shape no list", header_bytes({"a": {**entry(0, 4), "shape": 4}}, b"1234"), ["shape is 4"]),
    ("negative size", header_bytes({"a": entry(0, 4, [-2, -2])}, b"1234"), ["shape is [-2, -2]"]),
    ("fractional size", header_bytes({"a": entry(0, 4, [4.0])}, b"1234"), ["shape is [4.0]"]),
    ("boolean size", header_bytes({"a": entry(0, 4, [4, True])}, b"1234"), ["shape is [4, True]"]),
    ("overflowing shape", header_bytes({"a": entry(0, 4, [2**40, 2**40])}, b"1234"), ["elements"]),
    ("overflow to zero", header_bytes({"a": entry(0, 0, [0, 2**60, 2**60])}), ["elements"]),
    ("endless shape", header_bytes({"a": entry(0, 4, [2**62] * 100_000)}, b"1234"), ["elements"]),
    ("one offset", header_bytes({"a": {**entry(0, 4), "data_offsets": [0]}}, b"1234"), ["data_offsets are [0]"]),
    ("offsets reversed", header_bytes({"a": {**entry(0, 4), "data_offsets": [4, 0]}}, b"1234"), ["begin <= end"]),
    ("offsets negative", header_bytes({"a": {**entry(0, 4), "data_offsets": [-4, 0]}}, b"1234"), ["[-4, 0]"]),
    ("offsets as strings", header_bytes({"a": {**entry(0, 4), "data_offsets": ["0", "4"]}}, b"1234"), ["['0', '4']"]),
    ("end beyond the file", header_bytes({"a": entry(0, 5)}, b"1234"), ["[0, 5]", "end <= 4"]),
    ("span too long", header_bytes({"a": entry(0, 4, [3])}, b"1234"), ["span 4 bytes", "wanted 3"]),
    ("span too short", header_bytes({"a": entry(0, 4, [2], "F32")}, b"1234"), ["span 4 bytes", "wanted 8"]),
    ("overlap", header_bytes({"a": entry(0, 3), "b": entry(2, 4)}, b"1234"), ["'b' overlaps", "byte 2", "wanted 3"]),
    ("same bytes", header_bytes({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), ["'b' overlaps", "byte 0", "wanted 4"]),
    ("gap", header_bytes({"a": entry(0, 1), "b": entry(2, 4)}, b"1234"), ["'b' leaves a gap", "byte 2", "wanted 1"]),
    ("late begin", header_bytes({"a": entry(1, 4)}, b"1234"), ["'a' leaves a gap", "byte 1", "wanted 0"]),
    ("bytes left over", header_bytes({"a": entry(0, 3)}, b"1234"), ["bytes long, wanted"]),
    ("no tensors but data", header_bytes({}, b"1234"), ["bytes long, wanted"]),
    ("line break in a name", header_bytes({"a\nb": 3}), ["'a\\nb'"]),
]


@pytest.mark.parametrize(("content", "words"), [row[1:] for row in HEADERS], ids=[row[0] for row in HEADERS])
def test_lying_headers(tmp_path: Path, content: bytes, words: list[str]) -> None:
    message = complaint(tmp_path, content)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"__metadata__": {"format": "pt"}},
        {"a": entry(0, 4), "b": entry(4, 4, [0, 3]), "c": entry(4, 4, [0])},
        {"b": entry(2, 4), "a": entry(0, 2), "s": entry(4, 5, [])},
    ],
)
@pytest.mark.parametrize("padding", ["", " ", " " * 9])
def test_unusual_headers_that_are_right(tmp_path: Path, entries: Entries, padding: str) -> None:
    size = max([0, *(value["data_offsets"][1] for name, value in entries.items() if name != "__metadata__")])
    (tmp_path / FILE).write_bytes(header_bytes(json.dumps(entries).encode() + padding.encode(), b"x" * size))
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == entries.keys() - {"__metadata__"}
    assert checkpoint.nbytes == size
    for name, info in checkpoint.tensors.items():
        assert checkpoint.read(name).shape == info.shape
    with safe_open(tmp_path / FILE, "pt") as reference:
        assert set(reference.keys()) == set(checkpoint.tensors)


def test_truncation_at_every_interesting_point(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, RAW)
    content = (tmp_path / FILE).read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    boundaries = [info.offset for info in read_header(tmp_path / FILE).tensors.values()]
    around = {place + by for place in [0, 8, header, len(content), *boundaries] for by in (-1, 0, 1)}
    for length in sorted(around | set(range(0, header, 97))):
        if 0 <= length < len(content):
            complaint(tmp_path, content[:length])


def test_a_long_header_is_not_read_on_its_own_word(tmp_path: Path) -> None:
    """A length counts only once the file is that long, and never above the format's bound."""
    for length in (MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 2**40):
        tracemalloc.start()
        complaint(tmp_path, length.to_bytes(8, "little") + b"{}")
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()
    with (tmp_path / FILE).open("wb") as file:  # a sparse file: long enough, still not believed
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(
        CheckpointError, match=f"header length {MAX_HEADER_BYTES + 1}, wanted at most {MAX_HEADER_BYTES}"
    ):
        Checkpoint.open(tmp_path)


def refusal(action: Callable[[Path], Any], directory: Path) -> str | None:
    """What `CheckpointError` says, if it is raised; anything else that is raised fails the test."""
    try:
        action(directory)
    except CheckpointError as error:
        return str(error)
    return None


def accepted_by_the_reference(file: Path) -> bool:
    try:
        with safe_open(file, "pt"):
            return True
    except SafetensorError:
        return False


@given(flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), min_size=1, max_size=3))
@shared_directory
def test_flipped_bits_in_a_header(tmp_path: Path, flips: list[tuple[float, int]]) -> None:
    if not (tmp_path / "whole").exists():
        write_checkpoint(tmp_path, RAW)
        (tmp_path / FILE).rename(tmp_path / "whole")
    content = bytearray((tmp_path / "whole").read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    for place, bit in flips:
        content[int(place * length)] ^= 1 << bit
    (tmp_path / FILE).write_bytes(content)
    message = refusal(Checkpoint.open, tmp_path)
    if message is None:
        assert accepted_by_the_reference(tmp_path / FILE)
        message = refusal(open_whole, tmp_path)
    assert message is None or str(tmp_path) in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "U8", "F64", "BOOL", "F7"]) | JSON,
            "shape": st.lists(st.integers(-1, 9) | st.integers(0, 2**70), max_size=4) | JSON,
            "data_offsets": st.lists(st.integers(-1, 600) | st.integers(0, 2**70), max_size=3) | JSON,
            "extra": JSON,
        },
    ),
    whole=st.none() | JSON,
)
@shared_directory
def test_any_json_in_an_entry(tmp_path: Path, fields: Entries, whole: Any) -> None:
    entries: Entries = {"first": entry(0, 8, [8]), "second": entry(8, 40, [2, 4], "F32"), "third": entry(40, 44)}
    entries["second"] = whole if whole is not None else {**entries["second"], **fields}
    (tmp_path / FILE).write_bytes(header_bytes(entries, b"\0" * 44))
    message = refusal(Checkpoint.open, tmp_path)
    if message is None:
        assert accepted_by_the_reference(tmp_path / FILE)
        checkpoint = Checkpoint.open(tmp_path)
        assert checkpoint.nbytes == 44
        assert checkpoint.read("second").nbytes == 32
    else:
        assert FILE in message
        assert "\n" not in message


def sharded(directory: Path) -> tuple[Path, dict[str, str]]:
    write_checkpoint(directory, RAW, shards=2)
    return directory / INDEX, json.loads((directory / INDEX).read_text())["weight_map"]


@pytest.mark.parametrize(
    "file",
    [
        "../model.safetensors",
        "..",
        "/etc/passwd",
        "/tmp/model.safetensors",
        "sub/model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "model.safetensors\0",
        "pytorch_model.bin",
        "",
        None,
        7,
        ["model.safetensors"],
    ],
)
def test_an_index_names_files_of_its_own_directory_only(tmp_path: Path, file: Any) -> None:
    index, weight_map = sharded(tmp_path)
    weight_map["lm_head.weight"] = file
    message = complaint(tmp_path, json.dumps({"weight_map": weight_map}).encode(), INDEX)
    assert "'lm_head.weight'" in message
    assert repr(file) in message
    assert "plain name" in message
    assert index.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "no weight_map"),
        (b"3", "no weight_map"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": []}', "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}', "'a' appears twice"),
    ],
)
def test_broken_indexes(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in complaint(tmp_path, content, INDEX)


def test_an_absurdly_long_index(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(MAX_HEADER_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"{MAX_HEADER_BYTES + 1} bytes long"):
        Checkpoint.open(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: not found; download"):
        Checkpoint.open(tmp_path)


def test_a_tensor_its_shard_lacks_is_named(tmp_path: Path) -> None:
    index, weight_map = sharded(tmp_path)
    weight_map["model.ghost.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(
        CheckpointError, match=r"model-00001-of-00002\.safetensors: tensor 'model\.ghost\.weight' is miss"
    ):
        Checkpoint.open(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: tensor .* data_offsets"):
        Checkpoint.open(tmp_path)


def nothing(directory: Path) -> None:
    directory.mkdir()


def pickled(directory: Path) -> None:
    directory.mkdir()
    (directory / "pytorch_model.bin").write_bytes(b"PK")


def a_file(directory: Path) -> None:
    directory.write_text("")


def a_directory_as_weights(directory: Path) -> None:
    (directory / FILE).mkdir(parents=True)


def a_pipe_as_weights(directory: Path) -> None:
    directory.mkdir()
    os.mkfifo(directory / FILE)


def a_broken_link(directory: Path) -> None:
    directory.mkdir()
    (directory / FILE).symlink_to(directory / "blob")


def a_circular_link(directory: Path) -> None:
    directory.mkdir()
    (directory / FILE).symlink_to(directory / FILE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda directory: None, "No such file or directory"),
        (a_file, "Not a directory"),
        (nothing, f"holds no weights, wanted {FILE} or {INDEX}"),
        (pickled, r"holds pytorch_model\.bin, wanted .*only safetensors are read, since nothing .* is executed"),
        (a_directory_as_weights, f"{FILE}: is no regular file"),
        (a_pipe_as_weights, f"{FILE}: is no regular file"),
        (a_broken_link, f"{FILE}: not found"),
        (a_circular_link, f"{FILE}: can't be read"),
    ],
)
@pytest.mark.timeout(20)
def test_directories_without_readable_weights(tmp_path: Path, make: Callable[[Path], None], words: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(CheckpointError, match=words) as caught:
        Checkpoint.open(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)
    assert caught.value.exit_code == 3


@given(
    name=st.sampled_from(sorted(random_tensors(RAW, dtype=torch.float32, layout="split", seed=0))),
    shape=st.lists(st.integers(0, 40), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]),
    absent=st.booleans(),
)
@shared_directory
def test_any_tensor_of_another_shape_or_dtype(
    tmp_path: Path, name: str, shape: list[int], dtype: torch.dtype, absent: bool
) -> None:
    tensors: dict[str, Tensor] = random_tensors(RAW, dtype=torch.float32, layout="split", seed=0)
    right = dtype == tensors[name].dtype and shape == list(tensors[name].shape)
    half = dtype == torch.bfloat16 and shape == list(tensors[name].shape) and ".experts." not in name
    del tensors[name]
    write_tensors(tmp_path, tensors if absent else {**tensors, name: torch.zeros(shape, dtype=dtype)})
    if (right or half) and not absent:
        open_whole(tmp_path)
    else:
        with pytest.raises(CheckpointError) as caught:
            open_whole(tmp_path)
        assert name in str(caught.value)
