"""A run from prompts to a complete dataset, begun or gone on with."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from offload_engine.cli.terminal import note
from offload_engine.errors import OffloadError, UsageError
from tools.distillation.manifest import counts_of, read_manifest, refuse_other_settings, write_manifest
from tools.distillation.progress import Tally, Watch, showing
from tools.distillation.shards import WORK, Receipt, Shard, finished, is_whole

Answer = Callable[[Sequence[Shard]], Iterator[Receipt]]
"""Generates shards in a job's directory, in any order; their receipts as they are put in place."""


def make_dataset(
    directory: Path, settings: Mapping[str, Any], shards: Sequence[Shard], answer: Answer
) -> Mapping[str, Any]:
    """Bring the dataset in `directory` to completion; returns its counts.

    Shards that are whole are left as they are. Raises `UsageError` where `directory` holds a dataset of other
    settings, or another run is at work in it.
    """
    with _own(directory):
        manifest = read_manifest(directory)
        done: dict[int, Receipt] = {}
        if manifest is not None and (manifest["shards"] or any(directory.rglob("shard-*"))):
            refuse_other_settings(directory, manifest, settings)
            done = _finished(directory, manifest, shards)
        todo = [shard for shard in shards if shard.index not in done]
        if todo or manifest is None or not manifest["complete"]:
            (directory / WORK).mkdir(exist_ok=True)
            write_manifest(directory, settings, _in_order(done), complete=False)
            done |= _answer(directory, todo, done, answer)
            write_manifest(directory, settings, _in_order(done), complete=True)
        shutil.rmtree(directory / WORK, ignore_errors=True)
        return counts_of(_in_order(done))


def _answer(directory: Path, todo: Sequence[Shard], done: Mapping[int, Receipt], answer: Answer) -> dict[int, Receipt]:
    by_file = {f"{shard.name}.jsonl": shard.index for shard in todo}
    before = counts_of([receipt for receipt in done.values() if not _has_receipt(directory, receipt)])
    watch = Watch(directory, Tally(before["kept"], sum(before["dropped"].values())))
    total = sum(receipt.prompts for receipt in done.values()) + sum(len(shard.prompts) for shard in todo)
    try:
        with showing(watch.tally, total):
            made = {by_file[receipt.file]: receipt for receipt in answer(todo)}
    except KeyboardInterrupt:
        note(f"{watch.tally().done} of {total} prompts are done; run the same command again to go on")
        raise
    except OSError as error:
        raise OffloadError(f"{directory}: can't be written ({error.strerror or error}); run again to go on") from error
    return made


def _finished(directory: Path, manifest: Mapping[str, Any], shards: Sequence[Shard]) -> dict[int, Receipt]:
    """By shard, the receipts of those that are whole: in the manifest, or beside the journals."""
    listed = {receipt["file"]: Receipt(**receipt) for receipt in manifest["shards"]}
    done = {}
    for shard in shards:
        receipt = listed.get(f"{shard.name}.jsonl")
        receipt = receipt if receipt is not None and is_whole(directory, receipt) else finished(directory, shard)
        if receipt is not None:
            done[shard.index] = receipt
    return done


def _has_receipt(directory: Path, receipt: Receipt) -> bool:
    return (directory / WORK / receipt.file).with_suffix(".json").is_file()


def _in_order(done: Mapping[int, Receipt]) -> list[Receipt]:
    return [done[index] for index in sorted(done)]


@contextmanager
def _own(directory: Path) -> Iterator[None]:
    """Make `directory`, and keep other runs out of it; the system lets go of it when this process ends, however."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UsageError(f"{directory}: can't be made ({error.strerror}); choose another --out") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"{directory}: another run is at work in it; wait for it, or choose another --out") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(handle)
