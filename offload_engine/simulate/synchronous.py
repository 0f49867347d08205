"""The scheme that most offloading has: an LRU of experts, and everything waits while a missing one is copied."""

from __future__ import annotations

from collections.abc import Sequence

from offload_engine.core import ExpertKey
from offload_engine.experts.scheduling.cache import ExpertCache, SlotState
from offload_engine.simulate.forwards import ForwardRun
from offload_engine.simulate.replay import CostModel, Moment


def on_demand(
    trace: Sequence[ForwardRun],
    cache: ExpertCache,
    costs: CostModel,
    copy_seconds: float,
    host: ExpertCache | None = None,
    disk_seconds: float = 0.0,
) -> list[Moment]:
    """Replay `trace` so; a moment per forward. Experts are taken one by one, by falling score.

    `host`, where there is one, holds less than every expert: what it lacks is first read in `disk_seconds`.
    """
    now = stalled = 0.0
    loads = requests = hits = 0
    moments = []
    for forward in trace:
        now += costs.begin(forward)
        for run in forward.layers:
            now += costs.before(forward, run)
            for key, score in zip(run.keys, run.scores, strict=True):
                requests += 1
                if _bring(cache, key):
                    hits += 1
                else:
                    waited = copy_seconds if host is None or _bring(host, key) else copy_seconds + disk_seconds
                    now, stalled, loads = now + waited, stalled + waited, loads + 1
                cache.use(key, score)
                now += costs.experts(forward, run, 1)
            now += costs.after(forward, run)
        now += costs.end(forward)
        moments.append(Moment(forward, now, stalled, loads * copy_seconds, loads, requests, hits))
    return moments


def _bring(cache: ExpertCache, key: ExpertKey) -> bool:
    """Have `key` in the cache; whether it was there already."""
    if cache.state(key) is SlotState.RESIDENT:
        return True
    cache.reserve(key, prefetch=False)
    cache.loaded(key)
    return False
