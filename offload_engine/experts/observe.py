"""Watching routing decisions without touching them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.model.moe import ExpertExecutor, Preview

Watcher = Callable[[ForwardInfo, int, RoutingDecision], None]
"""Told of every decision: the forward, the layer, what it decided."""


class ObservedExperts:
    """An `ExpertExecutor` that tells watchers of each decision, then lets another executor run it."""

    def __init__(self, experts: ExpertExecutor, watchers: Sequence[Watcher]) -> None:
        self.experts = experts
        self.watchers = list(watchers)
        self._info = ForwardInfo(Phase.SCORE)

    def begin(self, info: ForwardInfo) -> None:
        """See `ExpertExecutor`."""
        self._info = info
        self.experts.begin(info)

    def prepare(self, layer: int, preview: Preview) -> None:
        """See `ExpertExecutor`."""
        self.experts.prepare(layer, preview)

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision) -> Tensor:
        """See `ExpertExecutor`."""
        for watch in self.watchers:
            watch(self._info, layer, decision)
        return self.experts.run(layer, hidden, decision)
