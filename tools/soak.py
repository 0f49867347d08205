"""Runs an engine for many blocks at the smallest legal budget while the disk misbehaves, and checks every answer.

    python -m tools.soak --blocks 1000
    python -m tools.soak --model DIR --blocks 1000 --fault-rate 0.01 --routing original
    python -m tools.soak --convert int8 --blocks 1000 --file-faults 0.1

Reads of experts fail (EIO), come back short, or take long, at random; the file they are in is damaged or cut short in
the middle of an answer, and mended after it. Each answer must be that of an engine that holds everything, or an error
that names what happened; memory must not grow, and no thread may be left. Either layout of a checkpoint will do.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import click
import psutil
import torch

from offload_engine import disk_file
from offload_engine.cli.errors import ReportingCommand
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import BUILT_IN
from offload_engine.engine.engine import Engine
from offload_engine.errors import MemoryBudgetError, OffloadError, TransferError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.experts.storage.conversion import Kind, convert
from offload_engine.experts.storage.packed_header import PACKED_FILE
from offload_engine.memory import MIN_SLOTS

BLOCK = 32
KINDS = ("eio", "short", "slow")
SLOW_SECONDS = 0.05
DAMAGE = 4096
"""Bytes of a file that are damaged at a time."""
WARM_SHARE = 0.2
"""Of the blocks, after which memory must not grow any more."""


@dataclass
class Report:
    """What a soak came to."""

    blocks: int = 0
    exact: int = 0
    """Answers equal to the oracle's."""
    wrong: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Typed errors by class; anything else ends the soak."""
    injected: dict[str, int] = field(default_factory=dict)
    budget: int = 0
    slots: int = 0
    rss_warm: int = 0
    """Bytes resident once `WARM_SHARE` of the blocks were done."""
    rss_end: int = 0
    threads_left: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def growth(self) -> int:
        """Bytes by which the process grew after it was warm."""
        return self.rss_end - self.rss_warm

    @property
    def passed(self) -> bool:
        """Whether nothing was wrong, leaked or left."""
        return not self.wrong and not self.threads_left and self.growth <= 8 * 2**20


class FaultyFile:
    """A file of experts that is damaged, or cut in half, and mended again. Seeded.

    A published file is only cut: an engine reads no more of one that was written to, as it has no checksums.
    """

    def __init__(self, path: Path, rate: float, seed: int) -> None:
        """`rate`: the share of answers that meet a fault."""
        self.path, self.rate = path, rate
        self.kinds = ("damage", "cut") if path.name == PACKED_FILE else ("cut",)
        self.injected: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._size = path.stat().st_size
        self._whole = shutil.copyfile(path, path.with_name(f"{path.name}.whole"))

    @contextmanager
    def answering(self) -> Iterator[Callable[[], None]]:
        """Around one answer; yields what brings the fault about, if there is to be one. Mends the file at the end."""
        fault = self._random.choice(self.kinds) if self._random.random() < self.rate else None
        place = self._random.randrange(self._size // 2, self._size - DAMAGE)
        before = self.path.stat().st_mtime_ns
        done = []

        def strike() -> None:
            if fault is None or done:
                return
            done.append(fault)
            self.injected[fault] += 1
            if fault == "cut":
                os.truncate(self.path, self._size // 2)
                return
            with self.path.open("r+b") as file:
                file.seek(place)
                kept = file.read(DAMAGE)
                file.seek(place)
                file.write(bytes(byte ^ 0x55 for byte in kept))
            os.utime(self.path, ns=(0, before + 10**9))

        try:
            yield strike
        finally:
            if done:
                self._mend()
                os.utime(self.path, ns=(0, before))

    def _mend(self) -> None:
        """In place, as another file of that name would not be the one that is open."""
        with self._whole.open("rb") as whole, self.path.open("r+b") as file:
            shutil.copyfileobj(whole, file)


class FaultyReads:
    """Stands in for `os.preadv`: seeded faults at a rate per read; `on` switches them."""

    def __init__(self, rate: float, seed: int) -> None:
        self.rate = rate
        self.on = False
        self.injected: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._preadv = os.preadv

    def __call__(self, descriptor: int, buffers: Sequence[Any], offset: int, flags: int = 0) -> int:
        """See `os.preadv`."""
        with self._lock:
            kind = self._random.choice(KINDS) if self.on and self._random.random() < self.rate else None
            if kind:
                self.injected[kind] += 1
        if kind == "eio":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if kind == "slow":
            time.sleep(SLOW_SECONDS)
        count = self._preadv(descriptor, buffers, offset, flags)
        return count // 2 if kind == "short" else count

    @contextmanager
    def injected_into_stores(self) -> Iterator[None]:
        """Replace the call in the module that reads experts."""
        with mock.patch.object(disk_file.os, "preadv", self):
            yield


def smallest_budget(**engine: Any) -> int:
    """Bytes of the smallest budget the plan accepts, as its refusal names it."""
    try:
        Engine.from_pretrained(**engine, gpu_mem=engine["expert_mem"]).close()
    except MemoryBudgetError as error:
        named = re.search(r"\((\d+) bytes\)", str(error))
        if named:
            return int(named[1])
        raise
    raise AssertionError("a budget for the expert slots alone was accepted")


def prompts(count: int, vocab: int, seed: int) -> list[list[int]]:
    """Random token ids, 1 to 3 blocks of them; the ids at the vocabulary's end are special and left out."""
    drawn = random.Random(seed)
    return [[drawn.randrange(max(1, vocab - 8)) for _ in range(drawn.randrange(1, 3 * BLOCK))] for _ in range(count)]


def soak(blocks: int, fault_rate: float, seed: int, file_faults: float = 0.0, **engine: Any) -> Report:
    """Generate until `blocks` blocks are done or cut off by a fault. With `file_faults`, a share of the answers, the
    checkpoint `model` itself is damaged, and mended again.
    """
    params = SamplingParams(max_new_tokens=4 * BLOCK, steps=4, threshold=1.0)
    with Engine.from_pretrained(**engine) as whole:
        asked = prompts(8, whole.model_config.vocab_size, seed)
        least = MIN_SLOTS * whole.plan.slab_bytes
        expected = [whole.generate(prompt, params).token_ids for prompt in asked]
    started, before = time.perf_counter(), {thread.ident for thread in threading.enumerate()}
    engine |= {"expert_mem": least}  # the budget's margin alone would hold a small model's experts
    faults, report = FaultyReads(fault_rate, seed), Report(budget=smallest_budget(**engine))
    file = FaultyFile(experts_file(engine["model"]), file_faults, seed) if file_faults else None
    with faults.injected_into_stores(), Engine.from_pretrained(**engine, gpu_mem=report.budget) as small:
        report.slots, turn = small.plan.slots, 0
        while report.blocks < blocks:
            prompt, right = asked[turn % len(asked)], expected[turn % len(asked)]
            faults.on, turn, done = True, turn + 1, small.stats.blocks
            try:
                with file.answering() if file else nullcontext(lambda: None) as strike:
                    answer = followed(small, prompt, params, strike)
                report.exact += answer == right
                report.wrong += answer != right
            except TransferError as error:
                report.errors[_kind(error)] = report.errors.get(_kind(error), 0) + 1
                report.blocks += 1  # the one that was cut off
            finally:
                faults.on = False
            report.blocks += small.stats.blocks - done
            if not report.rss_warm and report.blocks >= WARM_SHARE * blocks:
                report.rss_warm = psutil.Process().memory_info().rss
        report.rss_end = psutil.Process().memory_info().rss
    report.injected = dict(faults.injected + (file.injected if file else Counter()))
    report.threads_left = [one.name for one in threading.enumerate() if one.ident not in before]
    report.seconds = time.perf_counter() - started
    return report


def followed(engine: Engine, prompt: list[int], params: SamplingParams, strike: Callable[[], None]) -> list[int]:
    """The ids of an answer, in whose second step the fault strikes."""
    found: list[int] = []
    for number, event in enumerate(engine.stream(prompt, params)):
        if number == 1:
            strike()
        if event.completion is not None:
            found = event.completion.token_ids
    return found


def experts_file(model: str | Path | None) -> Path:
    """Where a checkpoint's experts are, or the largest file of several."""
    directory = BUILT_IN if model is None else Path(model)
    packed = directory / PACKED_FILE
    return packed if packed.exists() else max(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size)


@contextmanager
def checkpoint(model: str | None, kind: Kind | None, copied: bool) -> Iterator[str | None]:
    """The checkpoint to soak: `model`, converted if `kind` says to what; a copy where it is to be damaged."""
    source = BUILT_IN if model is None else Path(model)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        if kind is not None:
            yield str(convert(source, Path(folder) / kind, kind, identity=fingerprint(source)).directory)
        elif copied:
            yield str(shutil.copytree(source, Path(folder) / "copy"))
        else:
            yield model


def _kind(error: OffloadError) -> str:
    if not re.match(r"expert \d+ of layer \d+", str(error)):
        raise AssertionError(f"an error that names no expert: {error}") from error
    return type(error).__name__


@click.command(cls=ReportingCommand, help=(__doc__ or "").replace("    python", "\b\n    python", 1))
@click.option("--model", metavar="DIR", help="Checkpoint.  [default: the built-in model]")
@click.option("--blocks", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--fault-rate", type=click.FloatRange(0, 1), default=0.002, show_default=True, help="Per read.")
@click.option(
    "--file-faults",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the answers during which the experts' file is damaged or cut short; a copy of the checkpoint is "
    "made for it.",
)
@click.option("--convert", "kind", type=click.Choice(get_args(Kind)), help="Soak a conversion of the checkpoint.")
@click.option("--routing", help="Instead of the checkpoint's own.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of prompts and faults.")
def main(
    model: str | None,
    blocks: int,
    fault_rate: float,
    file_faults: float,
    kind: Kind | None,
    routing: str | None,
    seed: int,
) -> int:
    """See the module."""
    torch.set_num_threads(1)
    with checkpoint(model, kind, file_faults > 0) as soaked:
        engine = {"model": soaked, "max_context": 8 * BLOCK, "routing": routing, "threads": 1}
        report = soak(blocks, fault_rate, seed, file_faults, **engine)
    print(json.dumps(asdict(report) | {"growth": report.growth, "passed": report.passed}))
    if not report.passed:
        print("the soak failed: wrong answers, growth or threads left; see above", file=sys.stderr)
    return 0 if report.passed else 1


if __name__ == "__main__":
    main()
