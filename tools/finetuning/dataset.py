"""Prompts with their answers, as token ids: the dataset that self-distillation writes, read and checked.

A dataset is a directory of `shard-*.jsonl` files and a `manifest.json`. A line is an object with `prompt_ids` and
`answer_ids`, lists of token ids, the answer's eos included; other keys are left alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from offload_engine.errors import UsageError
from tools.training.diffusion import Example

MANIFEST, SHARDS = "manifest.json", "shard-*.jsonl"
FIELDS = ("prompt_ids", "answer_ids")


class Overlong(StrEnum):
    """What becomes of a sample longer than the training length."""

    CUT = "cut"
    DROP = "drop"
    ERROR = "error"


@dataclass(frozen=True)
class Shape:
    """What a sample becomes: a sequence of fixed length in a vocabulary."""

    length: int
    """L: tokens of a sequence, a multiple of the block length."""
    vocab_size: int
    pad: int
    """The eos, which fills what a sample leaves of L."""
    mask: int
    pad_multiple: int | None = None
    """Pad a sample to a multiple of this, not to L; every block behind holds nothing but pads."""


@dataclass
class Dataset:
    """Samples, cut to the training length, as one run of ids."""

    shape: Shape
    ids: array[int] = field(default_factory=lambda: array("i"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    """Where each sample ends in `ids`."""
    prompts: array[int] = field(default_factory=lambda: array("i"))
    """Each sample's prompt length."""
    cut: int = 0
    """Samples that were longer than L and lost their end."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """The `name` and `fingerprint` of the model that answered, as far as the manifest has them."""
    dropped: int = 0
    """Samples left out: longer than L, where that is asked for, or with a prompt that leaves no room for an answer."""

    def __len__(self) -> int:
        return len(self.ends)

    def example(self, index: int) -> Example:
        """One sample as a training sequence [L], shorter with `pad_multiple`: padded with the eos, maskable behind its
        prompt.
        """
        start, end = self.ends[index - 1] if index else 0, self.ends[index]
        multiple = self.shape.pad_multiple
        length = -(-(end - start) // multiple) * multiple if multiple else self.shape.length
        tokens = np.full(length, self.shape.pad, dtype=np.int64)
        tokens[: end - start] = self.ids[start:end]
        return Example(tokens, np.arange(length) >= self.prompts[index])

    def add(self, prompt: list[int], answer: list[int], overlong: Overlong, where: str) -> None:
        """Take in one sample; `where` names it."""
        total, length = len(prompt) + len(answer), self.shape.length
        if total > length and overlong == Overlong.ERROR:
            raise UsageError(
                f"{where}: {total} tokens ({len(prompt)} of them the prompt's), wanted at most --length {length}; "
                "train with a larger --length, or with --overlong cut or drop"
            )
        if len(prompt) >= length or (total > length and overlong == Overlong.DROP):
            self.dropped += 1
            return
        self.cut += total > length
        self.ids.extend((prompt + answer)[:length])
        self.ends.append(len(self.ids))
        self.prompts.append(len(prompt))


def load_dataset(folder: Path, shape: Shape, overlong: Overlong = Overlong.CUT, limit: int | None = None) -> Dataset:
    """The first `limit` samples of a dataset, by shard name and line.

    Raises `UsageError` naming file and line for whatever isn't a sample, and for a dataset that isn't finished.
    """
    manifest = _manifest(folder)
    shards = _shards(folder, manifest)
    model = manifest.get("model")
    dataset = Dataset(shape, model=model if isinstance(model, dict) else {})
    for where, line in _lines(shards):
        if limit is not None and len(dataset) >= limit:
            break
        dataset.add(*_sample(line, where, shape), overlong, where)
    if not len(dataset):
        raise UsageError(
            f"{folder}: holds no sample to train on ({dataset.dropped} dropped as longer than --length {shape.length})"
        )
    return dataset


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished dataset."""
    manifest = folder / MANIFEST
    try:
        read = json.loads(manifest.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{manifest}: not found; --data wants a directory with {MANIFEST} and {SHARDS}, as "
            "`python -m tools.self_distil` writes it"
        ) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{manifest}: not readable as JSON ({error})") from None
    if not isinstance(read, dict) or read.get("complete") is not True:
        found = read.get("complete") if isinstance(read, dict) else read
        raise UsageError(
            f"{manifest}: complete is {found!r}, wanted true: the dataset isn't finished; run the same "
            "`python -m tools.self_distil` command again, which goes on where it stopped"
        )
    return read


def _shards(folder: Path, manifest: Mapping[str, Any]) -> list[Path]:
    """The shards that the manifest lists, each as it was when it was listed; without a list, those that are there."""
    there = sorted(folder.glob(SHARDS))
    if not there and not manifest.get("shards"):
        raise UsageError(f"{folder}: holds no {SHARDS}")
    listed = []
    for entry in manifest.get("shards", []):
        shard = folder / entry["file"]
        if shard not in there:
            raise UsageError(f"{shard}: not found, though {MANIFEST} lists it; copy the dataset again, or make it anew")
        wanted = entry.get("sha256")
        if wanted is not None and (found := _sha256(shard)) != wanted:
            raise UsageError(
                f"{shard}: has SHA-256 {found[:16]}…, but {MANIFEST} lists it with {wanted[:16]}…; copy the dataset "
                "again, or have `python -m tools.self_distil` make this shard again"
            )
        listed.append(shard)
    return listed or there


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> UsageError:
    return UsageError(f"{path}: can't be read ({os.strerror(error.errno or 0)})")


def _lines(shards: list[Path]) -> Iterator[tuple[str, bytes]]:
    """(file:line, line) of every line that isn't blank."""
    for shard in shards:
        try:
            with shard.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield f"{shard}:{number}", line
        except OSError as error:
            raise _unreadable(shard, error) from None


def _sample(line: bytes, where: str, shape: Shape) -> tuple[list[int], list[int]]:
    """A line's prompt and answer ids."""
    try:
        record: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict):
        raise UsageError(f"{where}: holds {type(record).__name__}, wanted an object with {' and '.join(FIELDS)}")
    prompt, answer = (_ids(record, key, where, shape) for key in FIELDS)
    if not answer:
        raise UsageError(f"{where}: answer_ids is empty, wanted at least the eos")
    if shape.mask in answer:
        raise UsageError(f"{where}: field 'answer_ids' holds the mask id {shape.mask}, which is no answer")
    return prompt, answer


def _ids(record: dict[str, Any], key: str, where: str, shape: Shape) -> list[int]:
    if key not in record:
        raise UsageError(f"{where}: field {key!r} is missing, found {', '.join(map(repr, record)) or 'none'}")
    ids = record[key]
    if not isinstance(ids, list) or not all(type(value) is int for value in ids):
        raise UsageError(f"{where}: field {key!r} isn't a list of integers")
    for value in ids:
        if not 0 <= value < shape.vocab_size:
            raise UsageError(
                f"{where}: field {key!r} holds id {value}, wanted 0 to {shape.vocab_size - 1}; was the dataset made "
                "with another model?"
            )
    return ids
