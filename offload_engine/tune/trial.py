"""One trial: a trace under one setting of the cache's options, on the virtual clock. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from offload_engine.experts.cache import ExpertCache
from offload_engine.experts.eviction import make_eviction
from offload_engine.experts.predictor import make_predictor
from offload_engine.experts.scheduler import ExpertScheduler
from offload_engine.simulate.replay import Costs, Replay, forwards
from offload_engine.trace import TraceRecord
from offload_engine.tune.routing import after_warm_up, steps_of


@dataclass(frozen=True, slots=True)
class Knobs:
    """Options that change how experts move, and never an answer; fields of `EngineConfig`, by the same names."""

    eviction: str = "next-use"
    predictor: str = "combined"
    prefetch_depth: int = 2
    transfers_in_flight: int = 2


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the steady part of a trace took, simulated."""

    step_seconds: float
    hit_rate: float
    """Share of the experts wanted that were resident when their layer had routed."""
    stall_share: float
    """Share of the time in which compute waited for a transfer."""
    loads_per_step: float


class _Sums(NamedTuple):
    seconds: float
    stalls: float
    loads: int
    hits: int
    requests: int


def play(records: Sequence[TraceRecord], layers: Sequence[int], knobs: Knobs, slots: int, costs: Costs) -> Outcome:
    """Replay `records` from an empty cache of `slots`; what comes before the steady part warms it up and is not
    counted. `layers`: the MoE layers in the order they run.
    """
    scheduler = ExpertScheduler(ExpertCache(slots, make_eviction(knobs.eviction)), knobs.transfers_in_flight)
    predictor = make_predictor(knobs.predictor if knobs.prefetch_depth else "none")
    replay = Replay(scheduler, predictor, layers, costs, max(knobs.prefetch_depth, 1))
    cut = after_warm_up(records)
    sums = []
    for part in (records[:cut], records[cut:]):
        result = replay.run(list(forwards(part)))
        counters = result.counters
        requests = counters.hits + counters.late + counters.misses
        sums.append(_Sums(result.seconds, result.stall_seconds, result.loads, counters.hits, requests))
    seconds, stalls, loads, hits, requests = (late - early for early, late in zip(*sums, strict=True))
    return Outcome(
        step_seconds=seconds / max(steps_of(records[cut:]), 1),
        hit_rate=hits / max(requests, 1),
        stall_share=stalls / seconds if seconds else 0.0,
        loads_per_step=loads / max(steps_of(records[cut:]), 1),
    )
