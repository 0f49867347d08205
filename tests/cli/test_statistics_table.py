"""The rows that `--stats` prints, where only some runs have them."""

from __future__ import annotations

from offload_engine.cli.report import _rows
from offload_engine.metrics import EngineStats


def test_what_the_cpu_computes_beside_a_gpu_is_told_with_the_times_that_decide() -> None:
    stats = EngineStats(misses=30, computed_on_cpu=10, copy_seconds=0.0005, cpu_expert_seconds=0.00018)
    assert stats.cpu_share == stats.as_dict()["cpu_share"] == 0.25
    told = dict(_rows(stats))["on the CPU"]
    assert told == "25.0% of what was missing; lately a copy took 0.500 ms, an expert 0.180 ms"
    later = EngineStats(misses=40, computed_on_cpu=30, copy_seconds=0.002).since(stats)
    assert (later.cpu_share, later.copy_seconds) == (20 / 30, 0.002)


def test_without_a_cpu_that_shares_there_is_no_such_row() -> None:
    assert "on the CPU" not in dict(_rows(EngineStats(misses=30)))
    assert EngineStats().cpu_share is None
