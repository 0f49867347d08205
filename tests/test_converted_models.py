"""Engines on converted checkpoints: the same answers from fewer bytes, and errors that name the expert."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import BUILT_IN
from offload_engine.engine.engine import Engine
from offload_engine.errors import CheckpointError, TransferError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.experts.storage.conversion import Kind, convert
from offload_engine.experts.storage.layout import packed_layout
from offload_engine.experts.storage.packed_header import PACKED_FILE, read_packed_header
from offload_engine.memory import Setup, plan_memory
from offload_engine.model.quantized import ExpertFormat
from tests.checkpoints import tiny_config, write_checkpoint
from tests.mini_config import mini

RAW = tiny_config(hidden_size=64, moe_intermediate_size=64, num_experts=32)
PROMPT = list(range(3, 40))
PARAMS = SamplingParams(max_new_tokens=24, block_length=8, steps=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("converted") / "source", RAW, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def converted(source: Path) -> dict[str, Path]:
    kinds: list[Kind] = ["stored", "int8", "int4"]
    return {kind: convert(source, source.parent / kind, kind, identity=fingerprint(source)).directory for kind in kinds}


def open_engine(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, **{"gpu_mem": "3GB", "dtype": "bfloat16", **options})


def answer(directory: Path, **options: Any) -> tuple[list[int], torch.Tensor]:
    with open_engine(directory, **options) as engine:
        return engine.generate(PROMPT, PARAMS).token_ids, engine.logits(PROMPT)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_lossless_conversion_changes_no_bit(source: Path, converted: dict[str, Path], dtype: str) -> None:
    ids, logits = answer(source, dtype=dtype)
    for options in ({}, {"expert_mem": 5 * 2**15, "verify": "always"}):
        found, values = answer(converted["stored"], dtype=dtype, **options)
        assert found == ids
        assert torch.equal(values, logits)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_slots_never_show_in_an_answer(converted: dict[str, Path], kind: str, dtype: str) -> None:
    whole = answer(converted[kind], dtype=dtype)
    for options in ({"expert_mem": 50_000}, {"expert_mem": 100_000, "routing": "original", "eviction": "lru"}):
        found = answer(converted[kind], dtype=dtype, **options)
        assert found[0] == whole[0]
        assert torch.equal(found[1], whole[1])


def test_rounded_experts_are_near_the_original(source: Path, converted: dict[str, Path]) -> None:
    with open_engine(source, dtype="float32") as engine:
        wanted = engine.logits(PROMPT)
    gaps = {}
    for kind in ("int8", "int4"):
        with open_engine(converted[kind], dtype="float32") as engine:
            gaps[kind] = float((engine.logits(PROMPT) - wanted).norm() / wanted.norm())
    assert 0 < gaps["int8"] < 0.05
    assert gaps["int8"] < gaps["int4"] < 0.5


def test_as_many_bytes_hold_nearly_four_times_the_experts_in_4_bits(converted: dict[str, Path]) -> None:
    slots = {}
    for kind, directory in converted.items():
        with open_engine(directory, expert_mem=400_000) as engine:
            slots[kind] = engine.plan.slots
    assert slots == {"stored": 16, "int8": 24, "int4": 48}  # whole pages weigh on slabs as small as these
    many = []
    for form in (ExpertFormat(torch.bfloat16), ExpertFormat(torch.bfloat16, 4, 32)):
        slab, _payload = packed_layout(form, mini().hidden_size, mini().moe_intermediate_size)
        setup = Setup(device="cpu", stored_itemsize=form.itemsize, slab_bytes=slab.nbytes)
        many.append(plan_memory(mini(), setup, 8 * 10**9).slots)
    assert many[1] / many[0] == pytest.approx(16 / (4 + 16 / 32), rel=0.02)  # a 16-bit scale for 32 of 4


def test_the_plan_of_a_run_takes_its_slots_from_the_file(converted: dict[str, Path]) -> None:
    for kind, directory in converted.items():
        with open_engine(directory) as engine:
            assert engine.plan.slab_bytes == read_packed_header(directory / PACKED_FILE).layout.nbytes, kind


def test_the_built_in_model_answers_as_before_from_a_conversion(tmp_path: Path) -> None:
    question = "A box holds 12 pencils. How many pencils are in 7 boxes?"
    with Engine.from_pretrained(gpu_mem="3GB") as engine:
        wanted = engine.generate(question).text
    out = convert(BUILT_IN, tmp_path / "tiny", identity="built-in").directory
    with Engine.from_pretrained(out, gpu_mem="3GB", expert_mem="500KB") as engine:
        assert engine.generate(question).text == wanted
        assert engine.stats.bytes_read >= engine.stats.bytes_moved > 0


def copied(directory: Path, to: Path) -> Path:
    to.mkdir()
    for path in directory.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_a_damaged_slab_ends_the_answer_and_not_the_engine(converted: dict[str, Path], tmp_path: Path) -> None:
    directory = copied(converted["int8"], tmp_path / "damaged")
    slabs = read_packed_header(directory / PACKED_FILE).slabs
    with (directory / PACKED_FILE).open("r+b") as file:
        for slab in slabs.values():
            file.seek(slab.offset + 5)
            file.write(b"\x55\xaa")
    threads = threading.active_count()
    with open_engine(directory) as engine:
        for _ in range(2):
            with pytest.raises(TransferError, match=rf"expert \d+ of layer 1: .*{PACKED_FILE} has checksum"):
                engine.generate(PROMPT, PARAMS)
        engine._parts.experts.idle()
    assert threading.active_count() == threads
    with open_engine(directory, verify="never") as engine:
        engine.generate(PROMPT, PARAMS)


def test_a_disk_that_recovers_gives_the_right_answer(
    converted: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = answer(converted["int4"])
    with open_engine(converted["int4"], expert_mem=100_000) as engine:
        real, calls = os.preadv, iter(range(10**9))

        def failing(*arguments: Any) -> int:
            if next(calls) % 7 == 3:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments)

        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", failing)
            with pytest.raises(TransferError, match=rf"expert \d+ of layer \d: .*{PACKED_FILE} can't be read"):
                engine.generate(PROMPT, PARAMS)
        assert engine.generate(PROMPT, PARAMS).token_ids == wanted


@pytest.mark.parametrize("change", [lambda file: os.truncate(file, 40_000), lambda file: file.write_bytes(b"\0" * 9)])
def test_a_store_that_shrinks_mid_run_is_an_error(converted: dict[str, Path], tmp_path: Path, change: Any) -> None:
    directory = copied(converted["stored"], tmp_path / "shrinking")
    with open_engine(directory, expert_mem=100_000) as engine:
        change(directory / PACKED_FILE)
        with pytest.raises(TransferError, match=rf"expert \d+ of layer 1: .*{PACKED_FILE} has \d+ bytes, but \d+ when"):
            engine.generate(PROMPT, PARAMS)
    with pytest.raises(CheckpointError, match=PACKED_FILE):
        open_engine(directory)


def test_fingerprints_tell_conversions_apart(source: Path, converted: dict[str, Path]) -> None:
    assert len({fingerprint(directory) for directory in (source, *converted.values())}) == 4
