"""What the model calls where experts run on a device: the host waits for what is missing, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.cpu_experts import NO_ERRAND, Errand, HostExperts
from offload_engine.experts.device.accounts import Account, Accounts, Told
from offload_engine.experts.device.exchange import Exchange
from offload_engine.experts.device.previews import Previews
from offload_engine.experts.device.record import Missing, Record
from offload_engine.experts.device.resizing import change_slots
from offload_engine.experts.device.table import ABSENT, Row, SlotTable
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.grouped import SlotExperts, SlotOutputs
from offload_engine.experts.hot_set import HotSet
from offload_engine.experts.scheduling.predictor import ExpertPredictor
from offload_engine.experts.scheduling.scheduler import Command, ExpertScheduler, Load
from offload_engine.experts.storage.store import ExpertStore
from offload_engine.experts.transfer.base import Stream, TransferTicket
from offload_engine.experts.transfer.cuda import CudaTransfers
from offload_engine.kernels import cuda_selection
from offload_engine.metrics import EngineStats
from offload_engine.model.moe import Beside, Decide, ExpertOutputs, LayerOutputs, Preview, nothing

PLACES: Final = 4
"""Layers that may have been enqueued without the books having heard of them."""
PREVIEWED: Final = 2
"""Layers whose previews may be on their way, those that come too late among them."""


class DeviceExperts(OffloadedExperts):
    """`OffloadedExperts` whose host waits, once in a layer, to hear what is missing, and for nothing else.

    A layer enqueues, in this order: its row of the slot table, if that changed; its routing, with the look-up of what
    its tokens want, by one kernel where that is there (`kernels.cuda_selection`), otherwise by torch, the look-up after
    the routing; its activations' way to the CPU, where that shares in the work; the record of the look-up for the host;
    the product of all wanted experts that are there. Then the host waits for the record's front: how many of them are
    missing, and which, in the order in which to fetch them.

    - With none missing it goes on to the next layer at once. The rest of the record, of which scheduler, predictor and
      hot set have to hear, is read when it has come: between other work, when a copy is asked for, which makes victims,
      at the latest `PLACES` layers on and at the end of the forward. Until then nothing of the layer is evicted
      (`ExpertScheduler.lend`), so that no victim is taken from a block's coreset.
    - With some missing their copies are asked for at once. Then the books hear of everything, and what is missing is
      computed as it comes. Victims of the copies that begin at once are taken from other layers.
    - A layer whose experts are all in its row can miss nothing, and is not waited for at all. Any other has to be: if
      something is missing the next layer's input is not what is enqueued, and all that was launched on it, keys and
      values among it, would have to be taken back and done again.

    Previews, on which some predictors live, are enqueued ahead of a layer's attention and ranked on the device; their
    layers are predicted once they have come: at the latest when all of the layer is enqueued and the host turns to wait
    for what is missing, which comes after them. For them alone nobody waits. (Routing by torch, without the kernel,
    looks at its ties by itself, and so waits.)

    A layer is asked about before it is run again, and the last one at once, so that no answer leaves the engine before
    every look-up was held against the books.

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
        self.accounts = Accounts([Exchange(transfers.driver) for _ in range(PLACES)])
        previewing = [Exchange(transfers.driver) for _ in range(PREVIEWED)]
        self.previews = Previews(previewing, self.slots.counts, transfers.driver.device)
        self.memory = arena
        self.copies = transfers
        self._landed = transfers.landed
        self._finished = torch.zeros(1, dtype=torch.int32, device=transfers.driver.device)
        self._offered: Account | None = None
        """Of the layer that is routing, its row of the slot table being shown."""
        self._row_sent = False
        """Whether that row was on its way when the layer began to route."""
        self._torchs: LayerOutputs | None = None
        """Of the layer that torch is about to compute: they take more memory than all the rest."""
        self.cpu: HostExperts | None = None
        """Computes some of the missing experts while others are copied; set before the first forward, if at all."""
        super().__init__(store, arena, transfers, scheduler, predictor, stats, prefetch_depth, hot)

    def begin(self, info: ForwardInfo) -> None:
        """See `ExpertExecutor`."""
        if self._half_done:
            self._start_over()
        self.previews.drop()
        self._catch_up(wait=True)
        super().begin(info)

    def prepare(self, layer: int, preview: Preview) -> None:
        """See `ExpertExecutor`."""
        self._catch_up()
        super().prepare(layer, preview)

    def route(self, layer: int, hidden: Tensor, decide: Decide) -> RoutingDecision:
        """See `ExpertExecutor`. Until the layer has run, its books count as half done."""
        if cuda_selection.library_for(hidden.device) is None or not self.slots.serves(hidden):
            return decide()
        self._half_done = True
        try:
            self._listen(layer)
            self._offered = self._show(layer)
            if self._row_sent:  # torch may compute on another stream than ours
                self.transfers.synchronize()
            table = cuda_selection.SlotTable.over(self.table.on_device(layer).view(torch.int32), self._finished)
            with cuda_selection.looking_up(table):
                return decide()
        except BaseException as error:
            self._abandon(error)
            raise

    def run(
        self,
        layer: int,
        hidden: Tensor,
        decision: RoutingDecision,
        beside: Beside = nothing,
        told: Told | None = None,
    ) -> Tensor:
        """See `ExpertExecutor`. `told` is called when the books hear of the layer, in the order of the layers, before
        the last one has run: with the decision, its experts and scores on the host.
        """
        outputs = self.slots.outputs(layer, hidden, decision)
        self._half_done = True
        try:
            if outputs is None:
                known = self._read_all(layer, hidden, decision, told)
            else:
                self._run_ahead(layer, hidden, decision, outputs, beside, told)
                self._half_done = False
        except BaseException as error:
            self._abandon(error)
            raise
        if outputs is None:
            return super().run(layer, hidden, known, beside)
        self.transfers.synchronize()
        out = outputs.combine()
        if layer == self._last_layer:
            self._catch_up(wait=True)
        return out

    def sweep(self, layer: int, hidden: Tensor, decision: RoutingDecision, rows: int) -> Tensor:
        """See `ExpertExecutor`: by torch, expert by expert."""
        self._catch_up(wait=True)
        self._carefully(lambda: self._listen(layer))
        return super().sweep(layer, hidden, decision, rows)

    def idle(self, timeout: float = 60.0) -> None:
        """See `OffloadedExperts`. The books have heard of every layer then."""
        if not self._half_done:
            self._catch_up(wait=True)
        super().idle(timeout)

    def resize(self, slots: int, room: int | None = None) -> None:
        """See `OffloadedExperts`. Where slots before and after don't fit in `room` together, or the device hasn't the
        memory for both, experts that stay come again from where they came, in the background.

        Raises `MemoryBudgetError` where the device refuses the memory; there are as many slots as before then.
        """
        self._quieten()
        with self._changed:
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
        self.accounts.close()
        self.previews.close()

    def _read_all(self, layer: int, hidden: Tensor, decision: RoutingDecision, told: Told | None) -> RoutingDecision:
        """Wait for the decision, and have torch compute by it."""
        self._settle_all()
        account, record = self.accounts.begin(layer), Record(decision)
        account.bring(record, record.pieces)
        self._listen(layer, wait=True)
        known = account.decision()
        self.accounts.end()
        if told is not None:
            told(known)
        self._torchs = ExpertOutputs(hidden, decision, known.experts)
        return known

    def _run_ahead(
        self,
        layer: int,
        hidden: Tensor,
        decision: RoutingDecision,
        outputs: SlotOutputs,
        beside: Beside,
        told: Told | None,
    ) -> None:
        """Enqueue what can be, wait for what is missing, and have that fetched and computed."""
        cpu = self._shares()
        if cpu is not None:  # ahead of the product, for which they would have to wait
            cpu.bring(layer, hidden)
        account, self._offered = self._offered, None
        if account is None:
            account = self._show(layer)
        account.told = told
        self._launch_present(account, decision, outputs)
        self._settle_landed(before=account)  # while the device works
        self._listen(layer, wait=account.record.front > 0)
        if account.record.front:
            missing = account.missing()
            if missing.experts:
                self._fetch(account, missing, hidden, outputs, beside)

    def _show(self, layer: int) -> Account:
        """See that the device has the layer's row, and that no slot in it is given away."""
        self._make_room(layer)
        with self._changed:
            row = self.table.settle(layer, self._landed).copy()
            account = self.accounts.begin(layer, row)
            self.scheduler.lend(layer)
            self._row_sent = self.table.is_stale(layer)
            if self._row_sent:
                account.exchange.send(row.tobytes(), self.table.on_device(layer))
                self.table.sent(layer)
        return account

    def _launch_present(self, account: Account, decision: RoutingDecision, outputs: SlotOutputs) -> None:
        """Enqueue look-up, unless that is done, record and the product of what is there."""
        row = account.row
        record = Record(decision, len(row), waited_for=self._may_miss(row))
        on_device, lookup = self.table.on_device(account.layer), decision.lookup

        def pieces() -> Sequence[Tensor]:
            if lookup is None:
                return record.pieces(outputs.look_up(on_device.view(torch.int32)))
            outputs.show(lookup.slots)
            return record.pieces(lookup.slots)

        account.bring(record, pieces, [on_device])
        slots = row[row != ABSENT].tolist()
        if slots:
            self.transfers.launch(Stream.COMPUTE, outputs.compute_found, reads=slots)

    def _may_miss(self, row: Row) -> bool:
        return bool((row == ABSENT).any())

    def _fetch(self, account: Account, missing: Missing, hidden: Tensor, outputs: SlotOutputs, beside: Beside) -> None:
        """Have what is missing fetched, or computed elsewhere; tell the books meanwhile; compute it."""
        self._settle_landed(before=account)  # all of them, for the compute stream is in order: victims are chosen now
        errand = NO_ERRAND
        if self._shares() is not None:
            errand = self._errand(account.layer, missing.experts, hidden, account.decision())
        with self._changed:
            moved = self.scheduler.counters.moved
            self._carry_out(self.scheduler.ask(account.layer, *missing, errand.experts))
            account.moved = self.scheduler.counters.moved - moved
        beside()  # ahead of what the compute stream has to wait for
        self._settle_all()
        self._finish(len(missing.experts), errand, outputs, nothing)

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
        outputs, self._torchs = self._torchs, None
        return super()._outputs(layer, hidden, decision) if outputs is None else outputs

    def _offer(self, layer: int, coming: Sequence[int], preview: Preview) -> bool:
        return not self.previews.ask(layer, coming, preview)

    def _listen(self, layer: int, *, wait: bool = False) -> None:
        """If previews have come, predict by them, for `layer` has not routed as far as the host knows. It may `wait`
        for them where it is about to wait for what is enqueued behind them.
        """
        heard = self.previews.heard(wait=wait)
        if heard is None:
            return
        asked, rankings = heard
        for ahead, ranking in rankings:
            self.predictor.offer(ahead, *ranking)
        predicted = self._guess(asked, [ahead for ahead, _ranking in rankings if ahead >= layer])
        with self._changed:
            self._carry_out(self.scheduler.predict(predicted))

    def _catch_up(self, *, wait: bool = False) -> None:
        """Tell the books of the layers whose records have come; of all, if it is to `wait` for them."""
        if self.accounts.open:
            self._carefully(self._settle_all if wait else self._settle_landed)

    def _carefully(self, work: Callable[[], None]) -> None:
        """Do what changes the books, between layers."""
        self._half_done = True
        try:
            work()
            self._half_done = False
        except BaseException as error:
            self._abandon(error)
            raise

    def _make_room(self, layer: int) -> None:
        """Another account can be opened then, and none of `layer` is open."""
        while self.accounts.full or any(account.layer == layer for account in self.accounts.open):
            self._settle()

    def _settle_all(self) -> None:
        while self.accounts.open:
            self._settle()

    def _settle_landed(self, before: Account | None = None) -> None:
        while self.accounts.open and self.accounts.open[0] is not before and self.accounts.open[0].landed():
            self._settle()

    def _settle(self) -> None:
        """Tell the books of the oldest layer that they have not heard of, waiting for its record."""
        account = self.accounts.open[0]
        known = account.decision()
        (experts, scores), _learned, outlook = self._heard(account.layer, known)
        with self._changed:
            moved = self.scheduler.counters.moved
            self._carry_out(self.scheduler.settle(account.layer, experts, scores, outlook, account.found()))
            account.moved += self.scheduler.counters.moved - moved
            self.stats.expert_requests += len(experts)
            self._note_moved(account.moved, len(experts))
            self._count()
        self.accounts.end()
        if account.told is not None:
            account.told(known)

    def _abandon(self, error: BaseException) -> None:
        if self.cpu is not None:
            self.cpu.withdraw()
        self.accounts.forget()
        super()._abandon(error)

    def _start_over(self) -> None:
        if self.cpu is not None:
            self.cpu.withdraw()
        with self._changed:
            self.accounts.forget()
            self._offered = None
            self.previews.drop()
            self.table.rename(self.arena.slots, {})
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
