"""What a contender measures of itself, in this process, on a tiny checkpoint."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from offload_engine.bench import bandwidth, contender, probe
from offload_engine.bench.contender import carry_out, main, step_work
from offload_engine.bench.overlap import Interval
from offload_engine.bench.probe import StallStats, open_engine, probing
from offload_engine.bench.spec import Kind, Measured, Report, Task, Workload, write_document
from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.experts.storage.conversion import convert
from tests.checkpoints import tiny_config, write_checkpoint

WORKLOAD = Workload(prompt_tokens=12, block_length=8, steps=4, warm_up=1, blocks=2)
SLAB = 12288
EXPERTS = 2 * 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("bench") / "model", tiny_config())


def task(checkpoint: Path, kind: Kind, **config: Any) -> Task:
    options = {"model": str(checkpoint), "gpu_mem": "4GB", "max_context": 256, "routing": "original"}
    return Task(name=f"{kind}/x", kind=kind, config=options | config, workload=WORKLOAD)


def measure(checkpoint: Path, kind: Kind, **config: Any) -> Measured:
    measured = carry_out(task(checkpoint, kind, **config), time.perf_counter()).measured
    assert measured is not None
    return measured


def test_what_the_engine_reports_adds_up(checkpoint: Path) -> None:
    found = measure(checkpoint, "engine", expert_mem=6 * SLAB)
    assert len(found.step_seconds) == 2 * 4
    assert found.tokens == 2 * 8
    assert found.stats is not None
    assert (
        found.requests
        == found.stats["expert_requests"]
        == sum(found.stats[kind] for kind in ("hits", "late", "misses"))
    )
    assert found.slots is not None
    assert found.slots < EXPERTS
    assert found.loads is not None
    assert found.belady_misses is not None
    assert 0 < found.belady_misses <= found.loads
    assert found.bytes_moved == found.loads * found.expert_bytes
    assert found.missed_bytes is not None
    assert found.early_bytes is not None
    assert found.hidden_bytes is not None
    assert 0 <= found.early_bytes <= found.missed_bytes
    assert 0 <= found.hidden_bytes <= found.missed_bytes
    assert found.missed_bytes >= found.stats["misses"] * found.expert_bytes
    assert sum(found.seconds.values()) <= sum(found.step_seconds) <= found.window_seconds
    assert all(found.seconds[name] > 0 for name in ("attention", "dense", "experts", "head"))
    assert found.startup_seconds > 0
    assert not found.cut_short


def test_who_computes_the_same_answers_the_same(checkpoint: Path) -> None:
    answers = {kind: measure(checkpoint, kind).answer for kind in ("engine", "mmap", "mmap-random", "unlimited")}
    assert len(set(answers.values())) == 1
    assert measure(checkpoint, "engine", routing="dmoe", top_p=0.2, min_experts=4).answer != answers["engine"]


def test_an_unlimited_budget_moves_nothing_once_it_is_warm(checkpoint: Path) -> None:
    found = measure(checkpoint, "unlimited", expert_mem=None)
    assert (found.loads, found.belady_misses) == (0, None)
    assert found.slots == EXPERTS


def test_memory_mapped_weights_run_without_slots_of_ours(checkpoint: Path) -> None:
    found = measure(checkpoint, "mmap")
    assert found.loads is found.slots is found.stats is None
    assert found.seconds["experts"] > 0
    assert found.seconds["stall"] == 0


@pytest.mark.parametrize(("kind", "choice"), [("torch", "off"), ("torch-random", "off"), ("mmap", "auto")])
def test_who_stands_for_torch_runs_without_our_kernels(checkpoint: Path, tmp_path: Path, monkeypatch, kind, choice):
    monkeypatch.setenv("OFFLOAD_ENGINE_KERNEL", "auto")
    seen = []
    monkeypatch.setattr(contender, "carry_out", lambda *_: seen.append(os.environ["OFFLOAD_ENGINE_KERNEL"]) or Report())
    write_document(tmp_path / "task.json", task(checkpoint, kind))
    contender.main(tmp_path / "task.json", tmp_path / "report.json")
    assert seen == [choice]


def test_torch_alone_answers_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OFFLOAD_ENGINE_KERNEL", "off")
    found = measure(checkpoint, "torch")
    assert found.seconds["experts"] > 0
    assert found.loads is None


def test_patience_cuts_an_answer_short(checkpoint: Path) -> None:
    slow = task(checkpoint, "engine").model_copy(update={"patience": 1.5, "workload": Workload(blocks=2000)})
    slow = slow.model_copy(update={"config": slow.config | {"max_context": 1000}})
    found = carry_out(slow, time.perf_counter()).measured
    assert found is not None
    assert found.cut_short or found.tokens < 2000 * 32


def test_accelerate_answers_with_the_same_experts(checkpoint: Path) -> None:
    pytest.importorskip("accelerate")
    assert measure(checkpoint, "accelerate", dtype="float32").seconds["experts"] > 0


def test_bandwidths_are_measured_on_the_models_own_experts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "DRAM_BYTES", 2**20)
    monkeypatch.setattr(bandwidth, "GEMM_SIZE", 64)
    found = carry_out(task(checkpoint, "bandwidth"), time.perf_counter()).bandwidth
    assert found is not None
    assert sorted(found.disk) == [1, 2, 4]
    assert min(*found.disk.values(), found.dram, found.gemm) > 0


def test_bandwidths_of_a_converted_model(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "DRAM_BYTES", 2**20)
    monkeypatch.setattr(bandwidth, "GEMM_SIZE", 64)
    packed = convert(checkpoint, tmp_path / "packed", identity="one").directory
    found = carry_out(task(packed, "bandwidth"), time.perf_counter()).bandwidth
    assert found is not None
    assert min(found.disk.values()) > 0


def test_the_machine_is_told_how_fast_fresh_memory_comes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched: list[int] = []
    monkeypatch.setattr(bandwidth, "DRAM_BYTES", 2**20)
    monkeypatch.setattr(bandwidth, "GEMM_SIZE", 64)
    monkeypatch.setattr(contender, "touch_memory", lambda nbytes: touched.append(nbytes) or 7e8)
    write_document(tmp_path / "task.json", task(checkpoint, "bandwidth").model_copy(update={"touched": 123}))
    main(tmp_path / "task.json", tmp_path / "report.json")
    found = Report.model_validate_json((tmp_path / "report.json").read_bytes()).bandwidth
    assert touched == [123]
    assert found is not None
    assert found.fresh == 7e8


def test_an_error_is_reported_and_named(checkpoint: Path, tmp_path: Path) -> None:
    write_document(tmp_path / "task.json", task(checkpoint, "engine", gpu_mem=1000))
    main(tmp_path / "task.json", tmp_path / "report.json")
    report = Report.model_validate_json((tmp_path / "report.json").read_bytes())
    assert report.measured is None
    assert report.error is not None
    assert "gpu_mem is 1.00 KB" in report.error


def test_probing_leaves_the_engine_as_it_was(checkpoint: Path) -> None:
    with open_engine(EngineConfig(model=str(checkpoint), gpu_mem="4GB", max_context=256)) as engine:
        params = SamplingParams(max_new_tokens=8, block_length=8, steps=4)
        before = _reached_into(engine)
        with probing(engine, offloaded=True) as seen:
            engine.generate([1, 2, 3], params)
        assert _reached_into(engine) == before
        counted, runs = dict(seen.seconds), len(seen.runs)
        engine.generate([1, 2, 3], params)
        assert (dict(seen.seconds), len(seen.runs)) == (counted, runs)


def _reached_into(engine: Engine) -> list[Any]:
    transfers = engine._parts.experts.transfers
    hooks = [len(module._forward_hooks) for module in engine._parts.model.modules()]
    places = [engine._decoder.experts, transfers.launch, transfers.copy, transfers._on_complete]
    return [*places, probe.ExpertOutputs.combine, probe.BlockDiffusionDecoder._propose, hooks]


def test_stalls_are_kept_with_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = StallStats()
    monkeypatch.setattr(probe.time, "perf_counter", lambda: 10.0)
    stats.stall_seconds += 2.0
    stats.stall_seconds += 0.0
    assert stats.stalls == [Interval(8.0, 10.0)]
    before = stats.snapshot()
    stats.stall_seconds += 1.0
    assert stats.since(before).stall_seconds == 1.0
    assert stats.as_dict()["stall_seconds"] == 3.0


def test_the_work_of_a_step_by_hand(checkpoint: Path) -> None:
    """One dense and two MoE layers of hidden size 32; see `tiny_config`."""
    attention = 32 * (4 + 2 * 2) * 8 + 32 * 32 + 2 * 8
    dense, router, shared, norms = 3 * 32 * 48, 16 * 32, 3 * 32 * 16, 2 * 32
    body = 3 * (attention + norms) + dense + 2 * (router + shared) + 32
    head, expert = 96 * 32, 3 * 32 * 16
    with open_engine(EngineConfig(model=str(checkpoint), gpu_mem="4GB", max_context=256)) as engine:
        nbytes, flops = step_work(engine, WORKLOAD, unique=5.0)
        stored = contender.expert_bytes(engine)
        assert nbytes == pytest.approx(4 * (body + head) + 2 * 5 * stored)  # a small model computes in float32
    masked = 8 * 5 / 8
    assert flops == pytest.approx(2 * (8 * (body + 2 * 4 * expert) + masked * head))
