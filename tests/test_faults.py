"""Disks that fail, files that change and memory that goes away under a running engine, in either layout.

In each case: the right answer or an error that says what happened, no thread left, every slot accounted for, and an
engine that answers again once the cause is gone.
"""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from offload_engine import disk_file, pages
from offload_engine.core import SamplingParams
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.engine import assembly, planning
from offload_engine.engine.engine import Engine
from offload_engine.errors import CheckpointError, EngineClosedError, MemoryBudgetError, TransferError
from offload_engine.experts import arena
from offload_engine.experts.storage.conversion import convert
from offload_engine.experts.storage.packed_header import PACKED_FILE
from offload_engine.kernels import library
from tests.checkpoints import tiny_config, write_checkpoint
from tests.interrupts import Interrupt

RAW = tiny_config(hidden_size=64, moe_intermediate_size=64, num_experts=32)
PROMPT = list(range(3, 40))
PARAMS = SamplingParams(max_new_tokens=24, block_length=8, steps=4)
SLOTS = 8 * 2**15
"""Bytes of few enough slots for every answer to read from the disk."""
Preadv = Callable[..., int]


@pytest.fixture(scope="module", params=["published", "packed"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("faults") / "source", RAW, dtype=torch.bfloat16)
    if request.param == "packed":
        return convert(directory, directory.parent / "int8", "int8", identity="one").directory
    return directory


@pytest.fixture
def directory(pristine: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    to = tmp_path / "model"
    to.mkdir()
    for path in pristine.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.fixture
def file(directory: Path) -> Path:
    """Where the experts are."""
    packed = directory / PACKED_FILE
    return packed if packed.exists() else directory / "model.safetensors"


@pytest.fixture(scope="module")
def wanted(pristine: Path) -> list[int]:
    """The answer of an engine that holds everything."""
    with Engine.from_pretrained(pristine, gpu_mem="3GB", dtype="bfloat16") as engine:
        return engine.generate(PROMPT, PARAMS).token_ids


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert [thread.name for thread in threading.enumerate() if thread not in before] == []


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(
        directory, **{"gpu_mem": "3GB", "dtype": "bfloat16", "expert_mem": SLOTS, "threads": 1, **options}
    )


def ids(engine: Engine) -> list[int]:
    done = engine.generate(PROMPT, PARAMS).token_ids
    engine._parts.experts.idle(timeout=20)
    return done


def every(nth: int, fault: Callable[[Preadv, tuple[Any, ...]], int]) -> Preadv:
    """`os.preadv`, but every so-manieth call is `fault`'s."""
    real, calls, lock = os.preadv, iter(range(10**9)), threading.Lock()

    def read(*arguments: Any) -> int:
        with lock:
            turn = next(calls)
        return fault(real, arguments) if turn % nth == nth - 1 else real(*arguments)

    return read


def fails(code: int) -> Callable[[Preadv, tuple[Any, ...]], int]:
    def fault(_real: Preadv, _arguments: tuple[Any, ...]) -> int:
        raise OSError(code, os.strerror(code))

    return fault


def halves(real: Preadv, arguments: tuple[Any, ...]) -> int:
    return real(*arguments) // 2


def crawls(real: Preadv, arguments: tuple[Any, ...]) -> int:
    time.sleep(0.1)
    return real(*arguments)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENODEV, errno.ESTALE, errno.ENXIO])
def test_a_disk_that_fails_ends_the_answer_and_one_that_recovers_serves_the_next(
    directory: Path, file: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    message = rf"^expert \d+ of layer \d: {file} can't be read \({os.strerror(code)}\)$"
    with open_engine(directory) as engine:
        for nth in (1, 7):
            with monkeypatch.context() as patched:
                patched.setattr(disk_file.os, "preadv", every(nth, fails(code)))
                with pytest.raises(TransferError, match=message):
                    ids(engine)
            engine._parts.experts.idle(timeout=20)
        assert ids(engine) == wanted


@pytest.mark.parametrize("fault", [halves, crawls])
def test_short_and_slow_reads_change_nothing(
    directory: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch, fault: Any
) -> None:
    with open_engine(directory) as engine:
        monkeypatch.setattr(disk_file.os, "preadv", every(9, fault))
        assert ids(engine) == wanted


def test_a_read_that_gives_nothing_names_expert_and_bytes(
    directory: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(directory) as engine:
        monkeypatch.setattr(disk_file.os, "preadv", every(5, lambda _real, _arguments: 0))
        with pytest.raises(TransferError, match=rf"expert \d+ of layer \d: {file} gave 0 bytes at offset \d+, wanted"):
            ids(engine)


def test_a_file_that_is_deleted_or_replaced_mid_run_is_read_as_it_was(
    directory: Path, file: Path, wanted: list[int]
) -> None:
    with open_engine(directory) as engine:
        assert ids(engine) == wanted
        other = file.with_name("other")
        other.write_bytes(bytes(file.stat().st_size))
        other.replace(file)
        assert ids(engine) == wanted
        file.unlink()
        assert ids(engine) == wanted
    with pytest.raises(CheckpointError, match=file.name if file.name == PACKED_FILE else "holds no weights"):
        open_engine(directory)


def test_a_file_cut_in_half_mid_answer_names_the_expert_and_restored_serves_again(
    directory: Path, file: Path, wanted: list[int]
) -> None:
    content, before = file.read_bytes(), file.stat()
    with open_engine(directory) as engine:
        stream = engine.stream(PROMPT, PARAMS)
        next(stream)
        os.truncate(file, len(content) // 2)
        message = rf"expert \d+ of layer \d: {file} has {len(content) // 2} bytes, but {len(content)} when opened"
        with pytest.raises(TransferError, match=message):
            list(stream)
        with pytest.raises(TransferError, match=message):
            ids(engine)
        with file.open("r+b") as again:
            again.write(content)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert ids(engine) == wanted


def test_another_header_mid_run_is_refused(directory: Path, file: Path) -> None:
    with open_engine(directory) as engine:
        ids(engine)
        overwrite(file, 60, b"\0")
        for _ in range(2):
            with pytest.raises(TransferError, match=rf"expert \d+ of layer \d: {file} has another header than when op"):
                ids(engine)
        engine._parts.experts.idle(timeout=20)


def test_weights_that_change_mid_run_are_never_computed_with(directory: Path, file: Path) -> None:
    """A packed store knows the slab by its checksum; a published file can't tell one expert from another."""
    said = "has checksum" if file.name == PACKED_FILE else "was written to since it was opened"
    with open_engine(directory) as engine:
        ids(engine)
        content = file.read_bytes()
        overwrite(file, len(content) // 3, bytes(one ^ 0x55 for one in content[len(content) // 3 :]))
        for _ in range(2):
            with pytest.raises(TransferError, match=rf"expert \d+ of layer \d: {file} {said}"):
                ids(engine)
        engine._parts.experts.idle(timeout=20)


def overwrite(file: Path, offset: int, new: bytes) -> None:
    """Write in place; the file's clock is moved on, as clocks of files are coarse."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(new)
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))


def test_close_from_another_thread_ends_the_answer_with_a_clear_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for delay in (0.0, 0.03, 0.3):
        engine = open_engine(directory)
        monkeypatch.setattr(disk_file.os, "preadv", every(3, crawls))
        closer = threading.Timer(delay, engine.close)
        closer.start()
        with pytest.raises(EngineClosedError, match="closed"):
            answer_for_ever(engine)
        closer.join(20)
        assert not closer.is_alive()
        engine._parts.experts.scheduler.cache.check()
        monkeypatch.undo()


def answer_for_ever(engine: Engine) -> None:
    while True:
        ids(engine)


def test_close_while_a_stream_is_half_read_does_not_wait_for_it(directory: Path) -> None:
    engine = open_engine(directory)
    stream = engine.stream(PROMPT, PARAMS)
    next(stream)
    closer = threading.Thread(target=engine.close)
    closer.start()
    closer.join(20)
    assert not closer.is_alive()
    with pytest.raises(EngineClosedError):
        next(stream)


def refused(*_arguments: Any, **_keywords: Any) -> Any:
    raise RuntimeError(
        "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: 4096 bytes. Error"
    )


def test_memory_refused_to_torch_mid_answer_is_a_budget_error_and_leaks_nothing(
    directory: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(directory) as engine:
        for owner, name in ((PrefixCache, "span"), (PrefixCache, "keep"), (engine._parts.model, "logits")):
            with monkeypatch.context() as patched:
                patched.setattr(owner, name, refused)
                with pytest.raises(
                    MemoryBudgetError, match=r"while an answer was computed \(4096 bytes refused\).*free"
                ):
                    ids(engine)
            engine._parts.experts.idle(timeout=20)
            assert ids(engine) == wanted


def test_memory_refused_to_the_kernel_is_a_budget_error(
    directory: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = library.status()
    if status.library is None:
        pytest.skip("the kernels are not built")
    with open_engine(directory) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(status.library, "_experts", lambda *_arguments: library.NO_MEMORY)
            with pytest.raises(MemoryBudgetError, match=r"workspace of \d+ experts.*free memory"):
                ids(engine)
        engine._parts.experts.idle(timeout=20)
        assert ids(engine) == wanted


def test_memory_refused_to_a_reader_names_the_expert(
    directory: Path, wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_engine(directory) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(disk_file.os, "preadv", every(3, fails(errno.ENOMEM)))
            with pytest.raises(
                MemoryBudgetError, match=r"expert \d+ of layer \d: the system refused memory to read it"
            ):
                ids(engine)
        engine._parts.experts.idle(timeout=20)
        assert ids(engine) == wanted


@pytest.mark.parametrize("owner", [PrefixCache, arena.SlotArena, assembly.CpuTransfers, assembly.OffloadedExperts])
def test_memory_refused_while_loading_is_a_budget_error_and_leaves_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, owner: type
) -> None:
    files = psutil.Process().num_fds()
    with monkeypatch.context() as patched:
        patched.setattr(owner, "__init__", refused)
        with pytest.raises(MemoryBudgetError, match="while the model was loaded"):
            open_engine(directory)
    assert psutil.Process().num_fds() == files


def test_a_thread_that_can_not_be_started_is_a_budget_error_and_leaves_no_other(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def second_refused(thread: threading.Thread) -> None:
        if thread.name == "expert-reader-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_refused)
    with pytest.raises(MemoryBudgetError, match="can't start new thread"):
        open_engine(directory)


def test_memory_that_goes_between_plan_and_allocation_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "available_memory", lambda: 10**10)
    monkeypatch.setattr(assembly, "available_memory", lambda: 10**5)
    with pytest.raises(MemoryBudgetError, match=r"^100 KB of memory are left.*expert slots.*lower --gpu-mem by \d"):
        open_engine(directory)


def test_slots_that_the_system_takes_back_its_word_on_are_a_budget_error(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    populate, calls = pages._populate, iter(range(10**6))
    monkeypatch.setattr(pages, "_populate", lambda memory: populate(memory) if next(calls) == 0 else False)
    with (
        open_engine(directory) as engine,
        pytest.raises(MemoryBudgetError, match=r"refused \d+ of the \d+ bytes for \d+ expert slots; ask for a smaller"),
    ):
        ids(engine)


@pytest.mark.slow
def test_an_interrupt_anywhere_in_a_call_leaves_the_engine_free_and_exact(directory: Path) -> None:
    rooms = ("offload_engine/engine/engine.py", "offload_engine/decode/", "contextlib.py", "offload_engine/metrics.py")
    params, places = SamplingParams(max_new_tokens=8, block_length=8, steps=2), set()
    with open_engine(directory) as engine:
        wanted = engine.generate(PROMPT[:8], params).token_ids
        at, interrupt = 0, Interrupt(lambda path: any(room in path for room in rooms))
        while interrupt.at is None or interrupt.passed > interrupt.at:
            interrupt = Interrupt(interrupt.wanted, at)
            with suppress(KeyboardInterrupt), interrupt.armed():
                engine.generate(PROMPT[:8], params)
            places.add(interrupt.place)
            gc.collect()
            assert engine.generate(PROMPT[:8], params).token_ids == wanted
            at += 5 if at < 60 else at // 2
    assert len(places) > 10
