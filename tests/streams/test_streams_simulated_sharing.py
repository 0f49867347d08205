"""Misses shared with the CPU, as the engine does it on a simulated device and as the simulator predicts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from offload_engine import SamplingParams
from offload_engine.engine import placement
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.cpu_rates import LearnedRates
from offload_engine.experts.scheduling.eviction import make_eviction
from offload_engine.experts.scheduling.predictor import NoPredictor
from offload_engine.experts.scheduling.scheduler import LAUNCH_EXPERTS, ExpertScheduler
from offload_engine.experts.scheduling.sharing import Rates, ShareMode
from offload_engine.simulate.channel import Channel, Direct
from offload_engine.simulate.forwards import forwards, sized
from offload_engine.simulate.replay import Costs, Replay, ReplayResult
from offload_engine.simulate.sharing import Sharing
from offload_engine.trace import read_trace
from tests.streams.simulator import SimulatedDevice
from tests.streams.test_streams_whole_engine import on_gpu

RATES = Rates(copy=1.0, expert=0.5, token=0.1, trip=0.5, row=0.01)
"""An expert of five tokens takes the CPU as long as a copy."""
SLOTS, TOP_K = 48, 8
PARAMS = SamplingParams(max_new_tokens=32, threshold=0.9999)
WITHIN = 0.05
"""Relative; and a few of what hardly happens."""


def fill_host_tier(transfers: Any) -> None:
    """With everything, as the simulator takes it to be."""
    for key in transfers.store.keys():  # noqa: SIM118 (a store is no mapping)
        held = transfers.host.hold(key)
        transfers.store.read(key, held.slab.data)
        transfers.host.release(key, held, filled=True)


def simulated(trace: Path, mode: ShareMode) -> ReplayResult:
    header, records = read_trace(trace)
    runs = sized(list(forwards(records, header.block_length)), header.block_length)
    scheduler = ExpertScheduler(ExpertCache(SLOTS, make_eviction("lru")))
    transfers, sharing = Direct(Channel(RATES.copy), from_host=True), Sharing(mode, TOP_K, lambda _forward: RATES)
    costs = Costs(transfer_seconds=RATES.copy)
    replay = Replay(scheduler, NoPredictor(), header.layers, costs, 1, transfers, LAUNCH_EXPERTS, None, sharing)
    return replay.run(runs)


@pytest.mark.parametrize("mode", ["auto", 0.5])
@pytest.mark.parametrize("routing", ["original", "dmoe"])
def test_the_simulator_shares_as_many_misses_as_the_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, routing: str, mode: ShareMode
) -> None:
    """The trace tells no tokens per expert, so that the simulator has to estimate what decides."""
    monkeypatch.setattr(placement, "measure_rates", lambda *_arguments: RATES)
    for rates_stay in ("learn", "observe"):
        monkeypatch.setattr(LearnedRates, rates_stay, lambda *_arguments: None)
    device, options = SimulatedDevice(), {"eviction": "lru", "predictor": "none", "routing": routing}
    with on_gpu(monkeypatch, device, expert_mem="1MB", cpu_experts=mode, **options) as engine:
        engine.resize(expert_mem=SLOTS * engine.plan.slab_bytes)
        fill_host_tier(engine._parts.experts.transfers)
        engine.record_trace(tmp_path / "trace.jsonl")
        for number in range(3, 7):
            engine.generate(f"Anna has {number} apples and buys {9 * number} more. How many are there?", PARAMS)
        engine.close_trace()
        stats = engine.stats
    device.check()
    found = simulated(tmp_path / "trace.jsonl", mode).counters
    assert stats.computed_on_cpu > 100
    for name, measured, predicted in (
        ("computed on the CPU", stats.computed_on_cpu, found.elsewhere),
        ("hits", stats.hits, found.hits),
        ("misses", stats.misses, found.misses),
    ):
        assert predicted == pytest.approx(measured, rel=WITHIN, abs=5), name
