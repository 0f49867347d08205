"""What /v1/stats and /metrics tell of the engine and its queue."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from offload_engine.engine.batching import Batcher
from offload_engine.engine.engine import Engine
from offload_engine.metrics import GAUGES
from offload_engine.routing import POLICIES, described

PREFIX = "offload_engine"
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Bounds of the histograms' buckets."""


def statistics(engine: Engine, batcher: Batcher) -> dict[str, Any]:
    """Everything there is to know of the engine just now, ready for JSON."""
    return {
        "requests": {"active": batcher.active, "waiting": batcher.waiting, "places": engine.plan.sequences},
        "routing": {**described(engine.policy), "choices": list(POLICIES)},
        "stats": engine.stats.snapshot().as_dict(),
        "plan": engine.plan.as_dict(),
        "slots": engine.occupancy()._asdict(),
        "experts": {
            "layers": engine.activity.layers,
            "experts": engine.model_config.num_experts,
            "held": engine.activity.rows(),
        },
    }


class Telemetry:
    """Prometheus' view of one server, in a registry of its own."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, batcher))
        self.requests = Counter(
            f"{PREFIX}_http_requests",
            "Requests answered, by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            f"{PREFIX}_http_request_seconds",
            "Time to the end of a response, by route.",
            ["route"],
            registry=self.registry,
            buckets=SECONDS,
        )
        self.first = Histogram(
            f"{PREFIX}_first_step_seconds",
            "Time to a request's first denoising step.",
            registry=self.registry,
            buckets=SECONDS,
        )


class _EngineCollector(Collector):
    """Reads the engine's own counters when asked: nothing is counted twice."""

    def __init__(self, engine: Engine, batcher: Batcher) -> None:
        self._engine = engine
        self._batcher = batcher

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        stats = self._engine.stats.snapshot()
        for item in fields(stats):
            value = getattr(stats, item.name)
            if isinstance(value, dict):
                continue
            if item.name in GAUGES:
                yield GaugeMetricFamily(f"{PREFIX}_{item.name}", _words(item.name), value=value)
            else:
                yield CounterMetricFamily(f"{PREFIX}_{item.name}", _words(item.name), value=value)
        forwards = CounterMetricFamily(f"{PREFIX}_forwards", "Forwards run, by phase.", labels=["phase"])
        for phase, count in stats.forwards.items():
            forwards.add_metric([str(phase)], count)
        yield forwards
        yield from _gauges("slots_by_state", "state", self._engine.occupancy()._asdict().items())
        requests = (("active", self._batcher.active), ("waiting", self._batcher.waiting))
        yield from _gauges("requests_by_state", "state", requests)


def _gauges(name: str, label: str, values: Iterable[tuple[str, float]]) -> Iterator[Metric]:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", _words(name), labels=[label])
    for key, value in values:
        family.add_metric([key], value)
    yield family


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize() + "."
