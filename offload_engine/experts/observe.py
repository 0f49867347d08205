"""Watching routing decisions without touching them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.errors import TraceError, TraceWriteError
from offload_engine.experts.device.executor import DeviceExperts
from offload_engine.experts.ranked import standing
from offload_engine.experts.scheduling.predictor import GENERATING
from offload_engine.model.moe import Beside, Decide, ExpertExecutor, Preview, nothing
from offload_engine.routing.base import by_block
from offload_engine.trace import TraceHeader, TraceWriter

Watcher = Callable[[ForwardInfo, int, RoutingDecision], None]
"""Told of every decision: the forward, the layer, what it decided. A forward over several blocks is told of block by
block, as if each had a forward of its own.
"""


class ObservedExperts:
    """An `ExpertExecutor` that has another one run, and tells watchers of each decision: before it runs; or where that
    would mean to wait for a device, when it is known, before the forward's last layer has run; or, in a forward over
    blocks of an answer, of all together before `last_layer` runs, which costs less than one by one.
    """

    def __init__(self, experts: ExpertExecutor, watchers: Sequence[Watcher], last_layer: int | None = None) -> None:
        self.experts = experts
        self.watchers = list(watchers)
        self.last_layer = last_layer
        self._info = ForwardInfo(Phase.SCORE)
        self._untold: list[tuple[int, RoutingDecision]] = []

    def begin(self, info: ForwardInfo) -> None:
        """See `ExpertExecutor`."""
        self._tell_all()  # of a forward that broke off
        self.experts.begin(info)  # which may yet tell of the forward before
        self._info = info

    def prepare(self, layer: int, preview: Preview) -> None:
        """See `ExpertExecutor`."""
        self.experts.prepare(layer, preview)

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:
        """See `ExpertExecutor`."""
        return self.experts.route(layer, hidden, decide)

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision, beside: Beside = nothing) -> Tensor:
        """See `ExpertExecutor`."""
        if isinstance(self.experts, DeviceExperts):
            told = partial(self._tell, layer) if self.watchers else None
            return self.experts.run(layer, hidden, decision, beside, told)
        self._untold.append((layer, decision))
        if self.last_layer in (None, layer) or self._info.phase not in GENERATING:
            self._tell_all()
        return self.experts.run(layer, hidden, decision, beside)

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        """See `ExpertExecutor`."""
        self._untold.append((layer, decision))
        self._tell_all()
        return self.experts.sweep(layer, hidden, decision, rows)

    def _tell_all(self) -> None:
        untold, self._untold = self._untold, []
        for layer, decision in untold:
            self._tell(layer, decision)

    def _tell(self, layer: int, decision: RoutingDecision) -> None:
        if self.watchers:
            for info, part in by_block(self._info, decision):
                for watch in self.watchers:
                    watch(info, layer, part)


class TraceRecorder:
    """A watcher that writes decisions to a trace.

    A trace that can't be written must not cost the answer: what goes wrong is kept, and raised by `close`.
    """

    def __init__(self, path: Path, header: TraceHeader) -> None:
        """Raises `TraceError` when `path` can't be a trace of this run."""
        self._writer: TraceWriter | None = None
        self._error: TraceError | None = None
        self._sequences: dict[int, int] = {}
        """The prompt that each lane is at, by its number in the trace."""
        self._next = 0
        try:
            self._writer = TraceWriter(path, header)
            self._next = self._writer.sequence
        except TraceWriteError as error:  # the disk is full already
            self._error = error

    def __call__(self, info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        """See `Watcher`. Forwards that only score are left out."""
        if self._writer is not None and info.phase is not Phase.SCORE:
            lane = info.blocks[0].lane if info.blocks else 0
            if lane not in self._sequences:
                self._sequences[lane] = self._next
                self._next += 1
            self._writer.sequence = self._sequences[lane]
            (experts, scores), _learned, outlook = standing(decision, info)
            self._keep_error(partial(self._writer.record, info, layer, experts, scores, outlook.runners_up))

    def end_sequence(self, lane: int | None = None) -> None:
        """What follows in this lane (None: in any) belongs to another prompt."""
        if self._writer is not None:
            self._keep_error(self._writer.flush)
        for ended in list(self._sequences) if lane is None else [lane]:
            self._sequences.pop(ended, None)

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
