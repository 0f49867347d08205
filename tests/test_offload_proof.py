"""Proof that it offloads: models larger than their memory, each in a process of its own, held against its plan."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_engine.bench.cgroup import CgroupUnavailableError, run_limited
from offload_engine.engine.engine import Engine
from offload_engine.metrics import measure_peak, reset_peak
from tests import offload_run
from tests.checkpoints import tiny_config, write_checkpoint
from tests.offload_run import Report
from tools.make_checkpoint import DTYPES, PRESETS, config_of, make_checkpoint

LIMIT = 1_200_000_000
"""Bytes for a checkpoint of 2.1 GB, page cache included."""
BUDGET = 1_100_000_000
"""What is left of `LIMIT` for the page cache of headers and for the kernel's own tables is a twelfth."""
EVERYTHING = "3.5GB"
ROUTINGS = ["original", "dmoe"]
# Longer than a piece of prefill, so that the workspace planned for all of them is used.
PROMPT = 900
PARAMS: dict[str, Any] = {"max_new_tokens": 50, "steps": 4, "temperature": 1.0, "top_p": 0.9, "seed": 1}


def written(preset: str, folder: Path) -> Iterator[Path]:
    """A checkpoint, gone afterwards: pytest keeps its folders, and this is too large to keep."""
    directory = folder / preset
    config = config_of(PRESETS[preset], DTYPES["bf16"])
    make_checkpoint(directory, config, seed=0, shard_bytes=10**9, tokenizer=None)
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from written("llada2-micro", tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from written("llada2-2gb", tmp_path_factory.mktemp("large"))


def options(directory: Path, routing: str, gpu_mem: int | str) -> dict[str, Any]:
    return {
        "model": str(directory),
        "routing": routing,
        "gpu_mem": gpu_mem,
        "max_context": 1024,
        "threads": 1,
        "hot_set": "off",
    }


def check_slots_and_bytes(report: Report) -> None:
    stats, watched = report.stats, report.watched
    assert watched.most_taken <= report.plan["slots"]
    assert watched.places <= report.plan["slots"]
    assert stats["loads"] == watched.loads
    again = stats["loads"] - stats["misses"] - stats["prefetches_issued"]
    assert 0 <= again <= 0.01 * stats["loads"], "what a sweep fetches ahead may have to make room before its turn"
    assert stats["bytes_read"] == watched.bytes_read == watched.bytes_asked
    assert stats["hits"] + stats["late"] + stats["misses"] == stats["expert_requests"]
    assert stats["bytes_moved"] <= stats["bytes_read"] <= 1.05 * stats["bytes_moved"]
    if report.direct and report.disk_bytes is not None:  # the rest are pages of libraries, mapped when first needed
        assert stats["bytes_read"] <= report.disk_bytes <= stats["bytes_read"] + 64 * 2**20


def check_peak(report: Report) -> None:
    assert report.plan["total"] <= report.plan["budget"]
    assert 0.90 <= report.peak / report.plan["total"] <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_fraction_of_the_experts_gives_the_same_answer_within_the_plan(micro: Path, routing: str) -> None:
    whole = offload_run.run(options(micro, routing, EVERYTHING), PROMPT, **PARAMS)
    assert whole.plan["slots"] == whole.plan["all_experts"] == 1280
    assert whole.watched.places < 1280, "what is never wanted is never read"
    fixed = whole.plan["total"] - whole.plan["expert_slots"]
    tight = offload_run.run(options(micro, routing, fixed + 150 * whole.plan["slab_bytes"]), PROMPT, **PARAMS)
    assert tight.token_ids == whole.token_ids
    assert tight.plan["slots"] < 200
    assert tight.stats["evictions"] > 0
    assert tight.stats["bytes_read"] > 1.05 * whole.stats["bytes_read"]
    for report in (whole, tight):
        check_slots_and_bytes(report)
        check_peak(report)


@pytest.mark.slow
def test_a_long_prompt_in_a_batch_stays_within_the_plan(micro: Path) -> None:
    wide = options(micro, "original", EVERYTHING) | {"max_context": 2048, "batch_size": 2}
    whole = offload_run.run(wide, 1950, **PARAMS)
    fixed = whole.plan["total"] - whole.plan["expert_slots"]
    tight = offload_run.run(wide | {"gpu_mem": fixed + 150 * whole.plan["slab_bytes"]}, 1950, **PARAMS)
    assert tight.token_ids == whole.token_ids
    assert whole.plan["sequences"] == 2
    for report in (whole, tight):
        check_slots_and_bytes(report)
        assert report.peak <= report.plan["total"], "the second sequence's cache is never touched"


@pytest.mark.slow
@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_2_gb_checkpoint_answers_within_1200_mb_of_memory(large: Path, routing: str) -> None:
    command = offload_run.command(options(large, routing, BUDGET), PROMPT, **PARAMS)
    try:
        limited = run_limited(command, LIMIT, capture=True, cwd=offload_run.ROOT, timeout=300)
    except CgroupUnavailableError as error:
        pytest.skip(str(error))
    assert limited.oom_kills == 0
    assert limited.returncode == 0
    assert limited.limit <= LIMIT
    assert limited.peak is None or limited.peak <= LIMIT
    report = Report.parse(limited.output)
    assert report.plan["all_experts"] * report.plan["slab_bytes"] > 1.6 * LIMIT
    check_slots_and_bytes(report)
    check_peak(report)
    whole = offload_run.run(options(large, routing, EVERYTHING), PROMPT, **PARAMS)
    assert whole.plan["slots"] == whole.plan["all_experts"]
    assert report.token_ids == whole.token_ids


def test_what_the_process_held_before_is_not_in_an_engines_peak(tmp_path: Path) -> None:
    if not reset_peak():
        pytest.skip("this system keeps the peak of a process's memory for good")
    ballast = bytearray(500_000_000)
    before = measure_peak()
    del ballast
    with Engine.from_pretrained(write_checkpoint(tmp_path, tiny_config()), gpu_mem="3GB") as engine:
        done = engine.generate([1, 2, 3])
    assert done.stats.measured_peak_bytes < before - 200_000_000
    assert done.stats.measured_peak_bytes <= done.stats.planned_peak_bytes
