"""Datasets of answers: what becomes of samples, and one clear line for whatever isn't one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from offload_engine.errors import UsageError
from tools.finetuning.dataset import Overlong, Shape, load_dataset

SHAPE = Shape(length=8, vocab_size=96, pad=94, mask=95)
GOOD = {"prompt_ids": [1, 2, 3], "answer_ids": [4, 94]}


def write(folder: Path, *shards: list[Any], **manifest: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"complete": True, **manifest}))
    for number, records in enumerate(shards):
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        (folder / f"shard-{number:05d}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def test_samples_come_in_order_of_shards_and_lines_padded_with_the_eos(tmp_path: Path) -> None:
    others = [{"prompt_ids": [], "answer_ids": [94], "id": 7}, {"prompt_ids": [9], "answer_ids": [8, 94]}]
    data = load_dataset(write(tmp_path, [GOOD], [], others), SHAPE)
    assert [data.example(index).tokens.tolist() for index in range(len(data))] == [
        [1, 2, 3, 4, 94, 94, 94, 94],
        [94] * 8,
        [9, 8, 94, 94, 94, 94, 94, 94],
    ]
    assert [data.example(index).maskable.argmax() for index in range(3)] == [3, 0, 1]
    assert data.example(0).maskable.tolist() == [False] * 3 + [True] * 5
    assert len(load_dataset(tmp_path, SHAPE, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt_ids": [1', "not JSON"),
        ("[1, 2]", "holds list, wanted an object with prompt_ids and answer_ids"),
        ({"prompt_ids": [1]}, "field 'answer_ids' is missing, found 'prompt_ids'"),
        ({}, "field 'prompt_ids' is missing, found none"),
        ({"prompt_ids": "1", "answer_ids": [94]}, "field 'prompt_ids' isn't a list of integers"),
        ({"prompt_ids": [True], "answer_ids": [94]}, "field 'prompt_ids' isn't a list of integers"),
        ({"prompt_ids": [1], "answer_ids": [96]}, "field 'answer_ids' holds id 96, wanted 0 to 95"),
        ({"prompt_ids": [-1], "answer_ids": [94]}, "field 'prompt_ids' holds id -1, wanted 0 to 95"),
        ({"prompt_ids": [1], "answer_ids": [95, 94]}, "field 'answer_ids' holds the mask id 95"),
        ({"prompt_ids": [1], "answer_ids": []}, "answer_ids is empty"),
    ],
)
def test_a_line_that_is_no_sample_is_named_by_file_and_line(tmp_path: Path, line: Any, complaint: str) -> None:
    write(tmp_path, [GOOD], [GOOD, "", line, GOOD])
    with pytest.raises(UsageError) as error:
        load_dataset(tmp_path, SHAPE)
    assert str(error.value).startswith(f"{tmp_path / 'shard-00001.jsonl'}:3: {complaint}")
    assert "\n" not in str(error.value)


def test_samples_beyond_the_length_are_cut_dropped_or_refused(tmp_path: Path) -> None:
    long = {"prompt_ids": [1, 2], "answer_ids": [3] * 7}
    no_room = {"prompt_ids": [1] * 8, "answer_ids": [94]}
    write(tmp_path, [GOOD, long, no_room])
    cut = load_dataset(tmp_path, SHAPE)
    assert (len(cut), cut.cut, cut.dropped) == (2, 1, 1)
    assert cut.example(1).tokens.tolist() == [1, 2, 3, 3, 3, 3, 3, 3]
    dropped = load_dataset(tmp_path, SHAPE, Overlong.DROP)
    assert (len(dropped), dropped.cut, dropped.dropped) == (1, 0, 2)
    with pytest.raises(UsageError, match=r"shard-00000.jsonl:2: 9 tokens .*at most --length 8; train with a larger"):
        load_dataset(tmp_path, SHAPE, Overlong.ERROR)
    write(tmp_path, [no_room])
    with pytest.raises(UsageError, match=r"holds no sample to train on \(1 dropped"):
        load_dataset(tmp_path, SHAPE)


@pytest.mark.parametrize(
    ("manifest", "complaint"),
    [
        ('{"complete": false}', "complete is False, wanted true: the dataset isn't finished; run the same"),
        ('{"samples": 3}', "complete is None, wanted true"),
        ('[{"complete": true}]', "wanted true"),
        ('{"complete"', "not readable as JSON"),
        (None, "not found; --data wants a directory with manifest.json"),
    ],
)
def test_an_unfinished_dataset_is_refused_with_the_way_out(
    tmp_path: Path, manifest: str | None, complaint: str
) -> None:
    write(tmp_path, [GOOD])
    if manifest is None:
        (tmp_path / "manifest.json").unlink()
    else:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UsageError, match=r"manifest\.json: ") as error:
        load_dataset(tmp_path, SHAPE)
    assert complaint in str(error.value)


def test_shards_are_those_of_the_manifest(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], [GOOD], shards=[{"file": "shard-00001.jsonl"}])
    assert len(load_dataset(tmp_path, SHAPE)) == 1
    write(tmp_path, shards=[{"file": "shard-00001.jsonl"}, {"file": "shard-00002.jsonl"}])
    with pytest.raises(UsageError, match=r"shard-00002.jsonl: not found, though manifest.json lists it"):
        load_dataset(tmp_path, SHAPE)
    for shard in tmp_path.glob("shard-*"):
        shard.unlink()
    write(tmp_path)
    with pytest.raises(UsageError, match=r"holds no shard-\*.jsonl"):
        load_dataset(tmp_path, SHAPE)


def test_a_shard_that_is_not_the_one_listed_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [GOOD], [GOOD, GOOD])
    shards = [
        {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(tmp_path.glob("shard-*"))
    ]
    (tmp_path / "manifest.json").write_text(json.dumps({"complete": True, "shards": shards}))
    assert len(load_dataset(tmp_path, SHAPE)) == 3
    (tmp_path / "shard-00001.jsonl").write_text(json.dumps(GOOD) + "\n")  # a line is gone
    with pytest.raises(UsageError, match=r"shard-00001.jsonl: has SHA-256 .*but manifest.json lists it with .*; copy"):
        load_dataset(tmp_path, SHAPE)
