"""Shards of a dataset: fixed ranges of prompts, each answered through a journal and then put in place in one step.

    work/shard-00003.<attempt>.part   journal: a line per prompt as it is answered, by one attempt at the shard
    shard-00003.jsonl                 the shard: the kept answers in order of their prompts
    work/shard-00003.json             its receipt: what became of its prompts, and the shard's SHA-256

An attempt goes on from the whole lines of all journals that earlier ones left, so that a kill costs the answer under
way and nothing else. Two attempts at once (a worker that was given up, but lives on) don't hurt each other: each writes
a journal of its own, and both put the same shard in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.distillation.prompts import Prompt

Record = dict[str, Any]
"""A kept answer as the dataset has it, or `{"id": …, "dropped": reason}`."""

WORK = "work"
"""Folder of journals, receipts and files half-written; gone once the dataset is complete."""
DROPPED_PREFIX = b'{"dropped": '
"""How the journal's line of a dropped prompt begins."""


@dataclass(frozen=True, slots=True)
class Shard:
    """A range of prompts that is answered as a unit."""

    index: int
    prompts: tuple[Prompt, ...]

    @property
    def name(self) -> str:
        """What its files are called, without a suffix."""
        return f"shard-{self.index:05d}"


@dataclass(frozen=True, slots=True)
class Receipt:
    """What became of a shard's prompts."""

    file: str
    prompts: int
    kept: int
    dropped: dict[str, int]
    """How many were dropped, by reason."""
    sha256: str
    """Of the shard's file."""


def cut(prompts: Sequence[Prompt], size: int) -> list[Shard]:
    """`prompts` in shards of `size`, the last one shorter."""
    return [Shard(i, tuple(prompts[at : at + size])) for i, at in enumerate(range(0, len(prompts), size))]


def generate_shard(
    directory: Path, shard: Shard, answer: Callable[[Prompt], Record], journal: Path | None = None
) -> Receipt:
    """Answer what is not yet answered of `shard`, put the shard in place, and say what became of it.

    `journal`: this attempt's, from `begin_attempt`; without it the attempt begins here.
    """
    work = directory / WORK
    journal = journal or begin_attempt(directory, shard)
    records = {record["id"]: record for path in _journals(work, shard) for record in _whole_records(path)}
    with journal.open("ab") as file:
        for prompt in shard.prompts:
            if prompt.id not in records:
                records[prompt.id] = answer(prompt)
                file.write(line_of(records[prompt.id]))
                file.flush()
    receipt = _commit(directory, shard, [records[prompt.id] for prompt in shard.prompts])
    for path in _journals(work, shard):
        path.unlink(missing_ok=True)
    return receipt


def begin_attempt(directory: Path, shard: Shard) -> Path:
    """The journal, empty, of an attempt at `shard` that begins now."""
    journal = directory / WORK / f"{shard.name}.{uuid.uuid4().hex[:12]}.part"
    journal.parent.mkdir(exist_ok=True)
    journal.touch(exist_ok=False)
    return journal


def fruitless_attempts(directory: Path, shard: Shard) -> int:
    """How many attempts at an unfinished `shard` have begun since a line was last added to it, and added none."""
    last, begun = 0.0, []
    for path in _journals(directory / WORK, shard):
        with suppress(FileNotFoundError):
            found = path.stat()
            if found.st_size:
                last = max(last, found.st_mtime)
            else:
                begun.append(found.st_mtime)
    return sum(time >= last for time in begun)


def forget_fruitless_attempts(directory: Path, shard: Shard) -> None:
    """Have `fruitless_attempts` start from none again."""
    for path in _journals(directory / WORK, shard):
        with suppress(FileNotFoundError):
            if not path.stat().st_size:
                path.unlink()


def finished(directory: Path, shard: Shard) -> Receipt | None:
    """The receipt of a shard that is whole and in place; None for one that has to be generated."""
    try:
        receipt = Receipt(**json.loads((directory / WORK / f"{shard.name}.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
    return receipt if is_whole(directory, receipt) else None


def is_whole(directory: Path, receipt: Receipt) -> bool:
    """Whether the shard's file is the one that the receipt was made out for."""
    try:
        return hashlib.sha256((directory / receipt.file).read_bytes()).hexdigest() == receipt.sha256
    except OSError:
        return False


def write_aside(directory: Path, name: str, content: bytes) -> None:
    """Put `content` at `directory / name` in one step that outlasts a power cut: a reader sees the old file or the new
    one. It is written in the working folder, which takes what a kill leaves of it along when it goes.
    """
    path, aside = directory / name, directory / WORK / f"aside.{uuid.uuid4().hex[:12]}"
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def line_of(record: Record) -> bytes:
    """A record as a line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _journals(work: Path, shard: Shard) -> list[Path]:
    return sorted(work.glob(f"{shard.name}.*.part"))


def _whole_records(path: Path) -> Iterator[Record]:
    """The records of a journal up to its first torn line: what a kill or a power cut left half-written goes."""
    content = b""
    with suppress(FileNotFoundError):  # another attempt has just finished the shard
        content = path.read_bytes()
    for line in content.split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            return
        yield record


def _commit(directory: Path, shard: Shard, records: Sequence[Record]) -> Receipt:
    kept = [record for record in records if "dropped" not in record]
    content = b"".join(map(line_of, kept))
    receipt = Receipt(
        file=f"{shard.name}.jsonl",
        prompts=len(records),
        kept=len(kept),
        dropped=dict(sorted(Counter(record["dropped"] for record in records if "dropped" in record).items())),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    write_aside(directory, receipt.file, content)
    write_aside(directory, f"{WORK}/{shard.name}.json", json.dumps(asdict(receipt)).encode())
    return receipt
