"""Watching routing decisions without touching them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.errors import TraceError, TraceWriteError
from offload_engine.experts.executor import ranked_experts
from offload_engine.model.moe import ExpertExecutor, Preview
from offload_engine.trace import TraceHeader, TraceWriter

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


class TraceRecorder:
    """A watcher that writes decisions to a trace.

    A trace that can't be written must not cost the answer: what goes wrong is kept, and raised by `close`.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Raises `TraceError` when `path` can't be a trace of this run."""
        self._writer: TraceWriter | None = None
        self._error: TraceError | None = None
        try:
            self._writer = TraceWriter(path, header)
        except TraceWriteError as error:  # the disk is full already
            self._error = error

    def __call__(self, info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        """See `Watcher`. Forwards that only score are left out."""
        if self._writer is not None and info.phase is not Phase.SCORE:
            self._keep_error(partial(self._writer.record, info, layer, *ranked_experts(decision)))

    def end_sequence(self) -> None:
        """What follows belongs to the next prompt."""
        if self._writer is not None:
            self._keep_error(self._writer.flush)
            self._writer.sequence += 1

    def close(self) -> None:
        """Write what is pending. Raises the `TraceError` that the recording met, if any."""
        if self._writer is not None:
            self._keep_error(self._writer.close)
        if self._error is not None:
            raise self._error

    def _keep_error(self, write: Callable[[], None]) -> None:
        try:
            write()
        except TraceError as error:
            self._error = error
