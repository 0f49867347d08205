"""What the model calls where experts run on a device: work on what is there is enqueued before the host knows of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload_engine.core import Phase, RoutingDecision
from offload_engine.errors import InternalError
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.cpu_experts import NO_ERRAND, Errand, HostExperts
from offload_engine.experts.device.exchange import Exchange
from offload_engine.experts.device.record import Record
from offload_engine.experts.device.resizing import change_slots
from offload_engine.experts.device.table import ABSENT, UNUSED, Row, SlotTable
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.grouped import SlotExperts, SlotOutputs
from offload_engine.experts.hot_set import HotSet
from offload_engine.experts.scheduling.predictor import ExpertPredictor
from offload_engine.experts.scheduling.scheduler import Command, Compute, ExpertScheduler, Load
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.base import Stream, TransferTicket
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.metrics import EngineStats
from offload_engine.model.moe import ExpertOutputs, ExpertWork, LayerOutputs


@dataclass(slots=True)
class Ahead:
    """The layer whose work is enqueued while the host does not know what it wants."""

    layer: int
    decision: RoutingDecision
    outputs: LayerOutputs | None
    """Until the layer is run: they take more memory than all the rest."""
    computed: Row | None
    """int32 [E]: by expert, the slot that it was in for the work enqueued, or `ABSENT`; None: nothing was."""
    known: RoutingDecision | None = None
    """The decision, read back."""


class DeviceExperts(OffloadedExperts):
    """`OffloadedExperts` whose host waits, once in a layer, for a record of a few kilobytes, and for nothing else.

    A layer's run enqueues, in this order: its activations' way to the CPU, where that shares in the work; its row of
    the slot table, if that changed; the look-up of what its tokens want, and the record of both for the host; the
    product of all wanted experts that are there. Then the host waits for the record and, while the device works, keeps
    its books and has the missing ones fetched, each of which is computed as it comes. Nothing of the layer is evicted
    before the host knows what it wants (`ExpertScheduler.lend`).

    Where the grouped kernels do not run, nothing is looked up: the host reads the decision back, and has torch compute.

    By the kernels, outputs equal those of a run in which every expert is resident, bit for bit; by torch, those of
    `ResidentExperts`. The two agree within rounding, and so does what `cpu` computes.
    """

    def __init__(
        self,
        store: ExpertStore,
        arena: DeviceArena,
        transfers: CudaTransfers,
        scheduler: ExpertScheduler,
        predictor: ExpertPredictor,
        stats: EngineStats,
        prefetch_depth: int = 1,
        hot: HotSet | None = None,
    ) -> None:
        """As `OffloadedExperts`. Raises `MemoryBudgetError` when there is no memory for the table and the records."""
        self.slots = SlotExperts(store, arena)
        self.table = SlotTable(transfers.driver, self.slots.counts, arena.slots)
        self.exchange = Exchange(transfers.driver)
        self.memory = arena
        self.copies = transfers
        self._landed = transfers.landed
        self._ahead: Ahead | None = None
        self.cpu: HostExperts | None = None
        """Computes some of the missing experts while others are copied; set before the first forward, if at all."""
        super().__init__(store, arena, transfers, scheduler, predictor, stats, prefetch_depth, hot)

    def run(self, layer: int, hidden: Tensor, decision: RoutingDecision) -> Tensor:
        """See `ExpertExecutor`."""
        self._half_done = True
        try:
            known = self._run_ahead(layer, hidden, decision)
        except BaseException as error:
            self._abandon(error)
            raise
        return super().run(layer, hidden, known)

    def read_back(self, decision: RoutingDecision) -> RoutingDecision:
        """`decision`, its experts and scores on the host if it is the one that ran last, or wherever they are."""
        ahead = self._ahead
        return ahead.known if ahead is not None and ahead.decision is decision and ahead.known else decision

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        """See `ExpertExecutor`: by torch, expert by expert."""
        self._ahead = None
        return super().sweep(layer, hidden, decision, rows)

    def resize(self, slots: int, room: int | None = None) -> None:
        """See `OffloadedExperts`. Where slots before and after don't fit in `room` together, or the device hasn't the
        memory for both, experts that stay come again from where they came, in the background.

        Raises `MemoryBudgetError` where the device refuses the memory; there are as many slots as before then.
        """
        self._quieten()
        with self._changed:
            self._ahead = None
            self.slots.close()  # it looks at the memory anew when it is next asked
            self._half_done = True
            changed = change_slots(slots, room, self.memory, self.copies, self.scheduler, self.table)
            self._half_done = False
            self._carry_out(self.scheduler.warm(changed.displaced))
        if changed.refusal is not None:
            raise changed.refusal

    def close(self) -> None:
        """See `OffloadedExperts`."""
        if self.cpu is not None:
            self.cpu.close()
        super().close()
        self.slots.close()
        self.exchange.close()

    def _run_ahead(self, layer: int, hidden: Tensor, decision: RoutingDecision) -> RoutingDecision:
        """Enqueue what can be, and wait for what `layer` wants."""
        cpu = self._shares()
        if cpu is not None:  # ahead of the product, for which they would have to wait
            cpu.bring(layer, hidden)
        outputs = self.slots.outputs(layer, hidden, decision)
        record = Record(decision, 0 if outputs is None else self.slots.counts[layer])
        self.exchange.begin(record.nbytes)
        if outputs is None:
            self.exchange.bring(record.nbytes, record.pieces, [])
            known = record.read(self.exchange.take(record.nbytes)).decision
            torchs = ExpertOutputs(hidden, decision, known.experts)
            self._ahead = Ahead(layer, decision, torchs, None, known)
            return known
        with self._changed:  # a slot in the row must not be given away before the work that reads it is enqueued
            self.scheduler.lend(layer)
            self._ahead = Ahead(layer, decision, outputs, self._launch_present(layer, outputs, record))
        known, found = record.read(self.exchange.take(record.nbytes))
        self._ahead.known = known
        _compare(self._ahead, found)
        return known

    def _launch_present(self, layer: int, outputs: SlotOutputs, record: Record) -> Row:
        """Enqueue look-up, record and the product of what is there; where each expert was then."""
        row = self.table.settle(layer, self._landed).copy()
        if self.table.is_stale(layer):
            self.exchange.send(row.tobytes(), self.table.on_device(layer))
            self.table.sent(layer)
        on_device = self.table.on_device(layer)
        self.exchange.bring(
            record.nbytes, lambda: record.pieces(outputs.look_up(on_device.view(torch.int32))), [on_device]
        )
        slots = row[row != ABSENT].tolist()
        if slots:
            self.transfers.launch(Stream.COMPUTE, outputs.compute_found, reads=slots)
        return row

    def _shares(self) -> HostExperts | None:
        """What computes experts of this forward on the CPU; of one that only scores nothing does, for what that says
        must not depend on what happens to be resident.
        """
        return self.cpu if self._info.phase in (Phase.DENOISE, Phase.COMMIT) else None

    def _errand(self, layer: int, experts: Sequence[int], hidden: Tensor, decision: RoutingDecision) -> Errand:
        cpu, scheduler = self._shares(), self.scheduler
        if cpu is None:
            return NO_ERRAND
        cpu.rates.observe(*self.copies.timed())
        self.stats.copy_seconds, self.stats.cpu_expert_seconds = cpu.rates.now.copy, cpu.rates.now.expert
        return cpu.take(layer, scheduler.absent(layer, experts), hidden, decision, scheduler.copies_ahead)

    def _outputs(self, layer: int, hidden: Tensor, decision: RoutingDecision) -> LayerOutputs:
        if self._ahead is None or self._ahead.outputs is None:
            return super()._outputs(layer, hidden, decision)
        outputs, self._ahead.outputs = self._ahead.outputs, None
        return outputs

    def _launch(self, computes: Sequence[Compute], work: Callable[[Sequence[ExpertWork]], None]) -> None:
        row = None if self._ahead is None else self._ahead.computed
        if row is None:
            super()._launch(computes, work)
            return
        found = [one for one in computes if row[one.key.expert] != ABSENT]
        for one in found:
            if row[one.key.expert] != one.slot:
                raise InternalError(
                    f"{one.key} was computed from slot {int(row[one.key.expert])}, but is in {one.slot}"
                )
        if found:
            with self._changed:
                self._carry_out(self.scheduler.computed(*(one.key for one in found)))
        if len(found) < len(computes):
            super()._launch([one for one in computes if row[one.key.expert] == ABSENT], work)

    def _abandon(self, error: BaseException) -> None:
        if self.cpu is not None:
            self.cpu.withdraw()
        super()._abandon(error)

    def _start_over(self) -> None:
        if self.cpu is not None:
            self.cpu.withdraw()
        with self._changed:
            self._ahead = None
            self.table.reset()
            super()._start_over()

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Load):
                self.table.clear(command.slot)
        super()._carry_out(commands)

    def _on_complete(self, ticket: TransferTicket) -> None:
        with self._changed:
            if ticket.error is None:
                self.table.fill(ticket.key, ticket.slot)
            super()._on_complete(ticket)


def _compare(ahead: Ahead, found: Tensor | None) -> None:
    """Raise `InternalError` unless the device `found` every expert where the host had it."""
    if found is None or ahead.computed is None:
        return
    seen = found.numpy()
    wrong = ((seen != UNUSED) & (seen != ahead.computed)).nonzero()[0].tolist()
    if wrong:
        raise InternalError(
            f"expert {wrong[0]} of layer {ahead.layer} is in slot {int(ahead.computed[wrong[0]])}, "
            f"but the slot table on the device said {int(seen[wrong[0]])} ({ABSENT}: none)"
        )
