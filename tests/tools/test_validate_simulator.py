from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from offload_engine.bench.contender import carry_out
from offload_engine.bench.spec import Bandwidth, Kind, Measured, Report, Run, Task, Workload
from offload_engine.simulate.forwards import forwards
from offload_engine.trace import read_trace
from tests.checkpoints import tiny_config, write_checkpoint
from tools.validate_simulator import main as validate
from tools.validate_simulator import measured_of, read_bench

WORKLOAD = Workload(prompt_tokens=12, block_length=8, steps=4, warm_up=1, blocks=2)
SLAB = 12288
BANDWIDTH = Bandwidth(slab_bytes=SLAB, disk={1: 2e9, 2: 3e9}, direct=True, dram=1e10, gemm=1e11)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("validate") / "model", tiny_config())


def measure(checkpoint: Path, kind: Kind, routing: str, **config: Any) -> Measured:
    options = {"model": str(checkpoint), "gpu_mem": "4GB", "max_context": 256, "routing": routing, "hot_set": "off"}
    task = Task(name=f"{kind}/{routing}", kind=kind, config=options | config, workload=WORKLOAD)
    measured = carry_out(task, time.perf_counter()).measured
    assert measured is not None
    return measured


@pytest.fixture(scope="module")
def runs(checkpoint: Path) -> list[Run]:
    found = {
        "engine/original": measure(checkpoint, "engine", "original", expert_mem=6 * SLAB),
        "engine/dmoe@4GB": measure(checkpoint, "engine", "dmoe", expert_mem=8 * SLAB),
        "unlimited/original": measure(checkpoint, "unlimited", "original"),
    }
    made = [Run(task=name, round=1, report=Report(measured=one), seconds=1.0) for name, one in found.items()]
    other = made[0].model_copy(update={"task": "engine/original+int8"})
    return [*made, other, Run(task="bandwidth", round=1, report=Report(bandwidth=BANDWIDTH), seconds=1.0)]


def bench_file(folder: Path, runs: list[Run]) -> Path:
    path = folder / "bench.json"
    path.write_text(json.dumps({"workload": WORKLOAD.model_dump(), "runs": [run.model_dump() for run in runs]}))
    return path


def validated(*arguments: Any) -> Result:
    return CliRunner().invoke(validate, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def arguments(checkpoint: Path, runs: list[Run], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Of a comparison whose traces are recorded by the first call."""
    folder = tmp_path_factory.mktemp("compared")
    bench = bench_file(folder, runs)
    return [bench, "--model", checkpoint, "--traces", folder / "traces", "--record-budget", "4GB"]


@pytest.fixture(scope="module")
def compared(arguments: list[Any]) -> dict[str, Any]:
    done = validated(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return {pair["name"]: pair for pair in json.loads(done.stdout)}


def test_what_was_measured_stands_beside_what_is_simulated(compared: dict[str, Any], runs: list[Run]) -> None:
    assert list(compared) == ["engine/original", "engine/dmoe@4GB", "unlimited/original"], "other formats are left out"
    for run in runs[:3]:
        measured, pair = run.report.measured, compared[run.task]
        assert measured is not None
        assert pair["simulated"]["steps"] == len(measured.step_seconds) == pair["real"]["steps"]
        assert pair["real"]["slots"] == measured.slots
        assert pair["errors"]["step"] == pytest.approx(
            pair["simulated"]["step_median"] / pair["real"]["step_median"] - 1
        )
        assert pair["holds"] == all(abs(error) <= 0.15 for error in pair["errors"].values())
    warm = compared["unlimited/original"]
    assert (warm["simulated"]["hit_rate"], warm["simulated"]["loads"], warm["real"]["hit_rate"]) == (1.0, 0.0, 1.0)


def test_the_table_and_the_exit_code(compared: dict[str, Any], arguments: list[Any]) -> None:
    done = validated(*arguments, "--check")
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines()]
    assert rows == ["contender", "---", *compared]
    assert done.exit_code == (0 if all(pair["holds"] for pair in compared.values()) else 1)


@pytest.mark.usefixtures("compared")
def test_a_recorded_trace_asks_for_what_the_engine_asked_for(arguments: list[Any], runs: list[Run]) -> None:
    _header, records = read_trace(arguments[4] / "original.jsonl")
    trace = list(forwards(records))
    first = next(number for number, one in enumerate(trace) if any(step.block == 2 for step in one.passes))
    measured = runs[0].report.measured
    assert measured is not None
    assert sum(len(layer.experts) for one in trace[first:] for layer in one.layers) == measured.requests


@pytest.mark.usefixtures("compared")
def test_a_trace_of_another_workload_is_refused(arguments: list[Any], tmp_path: Path) -> None:
    header, *records = (arguments[4] / "original.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in records if '"block":3' not in line]
    assert len(kept) < len(records)
    (tmp_path / "original.jsonl").write_text(header + "".join(kept))
    refused = validated(*arguments[:4], tmp_path, *arguments[5:])
    assert refused.exit_code == 1
    assert "original.jsonl: a trace of 2 blocks, but the benchmark decoded 3; remove it" in refused.output


def test_rounds_are_pooled() -> None:
    values: dict[str, Any] = {
        "window_seconds": 4.0,
        "tokens": 8,
        "disk_bytes": 0,
        "peak_bytes": 1,
        "answer": "same",
        "startup_seconds": 0.0,
        "slots": 7,
    }
    rounds = [
        Measured(
            step_seconds=[1.0, 2.0], seconds={"stall": 0.6}, loads=3, stats={"expert_requests": 10, "hits": 4}, **values
        ),
        Measured(
            step_seconds=[3.0], seconds={"stall": 0.6}, loads=3, stats={"expert_requests": 10, "hits": 8}, **values
        ),
    ]
    found = measured_of(rounds)
    assert (found.steps, found.step, found.step_median, found.slots) == (3, 2.0, 2.0, 7)
    assert (found.hit_rate, found.stall, found.loads) == (0.6, pytest.approx(0.2), 2.0)


def test_what_is_no_benchmark_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text('{"runs": []}')
    done = validated(path, "--model", "x", "--traces", tmp_path)
    assert done.exit_code == 1
    assert done.output == f"Error: {path}: no bench.json of dmoe bench ('workload')\n"


def test_a_benchmark_without_our_engine_is_refused(runs: list[Run], tmp_path: Path) -> None:
    path = bench_file(tmp_path, runs[-1:])
    assert read_bench(path)[0] == WORKLOAD
    done = validated(path, "--model", "x", "--traces", tmp_path)
    assert done.exit_code == 1
    assert "has no run of engine/" in done.output
