"""Another number of slots on a device, whose memory is one piece and can't change its size: it is replaced.

Where the old piece and the new one find room together, experts that stay are copied on the device. Where they don't,
the old piece is given back first, and those experts have to come again from host memory or disk. Either way the host
first waits for everything that reads or writes a slot, and the old piece goes back to the system at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.errors import MemoryBudgetError
from offload_engine.experts.arena import DeviceArena
from offload_engine.experts.device.table import SlotTable
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.experts.transfer.cuda import CudaTransfers


class Changed(NamedTuple):
    """What came of it."""

    displaced: Sequence[ExpertKey]
    """Experts that may stay, and are gone: to be brought again."""
    refusal: MemoryBudgetError | None
    """Why there are as many slots as before; None: there are as many as asked for."""


def change_slots(
    slots: int,
    room: int | None,
    arena: DeviceArena,
    transfers: CudaTransfers,
    scheduler: ExpertScheduler,
    table: SlotTable,
) -> Changed:
    """Have `slots` slots, at least one, while nothing is under way and nobody holds a view of any.

    `room`: bytes that old and new slots may take together; None: what the device has. Raises `MemoryBudgetError` where
    the device refuses the memory of the new slots, and then that of the old ones too: there are none left then.
    After this or an interrupt, the books hold no expert.
    """
    driver, before, nbytes = transfers.driver, arena.slots, slots * arena.slab_bytes
    another = None
    try:
        if room is None or arena.nbytes + nbytes <= room:
            another = _allocated(transfers, nbytes)
        sources = {target: source for source, target in scheduler.resize(slots)}
        stay = scheduler.cache.resident_keys()
        if another is None:
            return Changed(stay, _replaced(slots, arena, transfers, scheduler, table))
        targets = {key: scheduler.cache.slot(key) for key in stay}
        moves = {sources.get(slot, slot): slot for slot in targets.values() if slot is not None}
        _carried(moves, another, arena, transfers, table)
        return Changed((), None)
    except BaseException:
        if another is not None and (not arena.has_memory or arena.whole() is not another):
            transfers.settle()
            driver.free(another)
        _start_over(before, arena, transfers, scheduler, table)
        raise


def _allocated(transfers: CudaTransfers, nbytes: int) -> Tensor | None:
    """None where the device has no room for it beside what there is."""
    try:
        return transfers.driver.allocate(nbytes)
    except MemoryBudgetError:
        return None


def _carried(
    moves: dict[int, int], another: Tensor, arena: DeviceArena, transfers: CudaTransfers, table: SlotTable
) -> None:
    """Replace the memory of `arena` by `another`, to which what is in slots is copied first, as `moves` says."""
    slab = arena.slab_bytes
    transfers.carry(list(moves), [another[slot * slab : (slot + 1) * slab] for slot in moves.values()])
    transfers.settle()
    old = arena.replace(another)
    table.rename(arena.slots, moves)
    if old is not None:
        transfers.driver.free(old)


def _replaced(
    slots: int, arena: DeviceArena, transfers: CudaTransfers, scheduler: ExpertScheduler, table: SlotTable
) -> MemoryBudgetError | None:
    """Give up the memory of `arena`, and what is in it, for that of so many slots; why it has as many as before."""
    before, refusal = arena.slots, None
    transfers.settle()
    old = arena.give_up()
    if old is not None:
        transfers.driver.free(old)
    try:
        arena.replace(transfers.driver.allocate(slots * arena.slab_bytes))
    except MemoryBudgetError as error:
        refusal = error
    _start_over(before, arena, transfers, scheduler, table)
    return refusal


def _start_over(
    slots: int, arena: DeviceArena, transfers: CudaTransfers, scheduler: ExpertScheduler, table: SlotTable
) -> None:
    """Have books that hold no expert, for the slots that there are, or if there are none, for `slots` new ones."""
    if not arena.has_memory:
        try:
            arena.replace(transfers.driver.allocate(slots * arena.slab_bytes))
        except MemoryBudgetError as error:
            raise MemoryBudgetError(
                f"{error}; its {slots} slots were given back for these, and now can't be had again either: close this "
                "engine and make another"
            ) from None
    scheduler.reset({})
    if scheduler.cache.slots != arena.slots:
        scheduler.resize(arena.slots)
    table.rename(arena.slots, {})
