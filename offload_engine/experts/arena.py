"""The memory of the expert cache: slots of one size, allocated once, on the host or on a device."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from offload_engine.errors import EngineClosedError, InternalError, MemoryBudgetError, UsageError
from offload_engine.experts.storage.layout import SLOT_ALIGNMENT, SlabExpert, SlabLayout
from offload_engine.model.moe import ExpertWeights
from offload_engine.pages import Toucher, huge_pages


class Slots:
    """`slots` x `slab_bytes` of memory, wherever it is, and the matrices in it."""

    def __init__(self, slots: int, slab_bytes: int) -> None:
        """`slab_bytes` is a multiple of `SLOT_ALIGNMENT`. Whoever derives from this sets the memory."""
        if slots < 1 or slab_bytes < 1 or slab_bytes % SLOT_ALIGNMENT:
            raise ValueError(f"{slots} slots of {slab_bytes} bytes, wanted at least one, multiples of {SLOT_ALIGNMENT}")
        self.slots = slots
        self.slab_bytes = slab_bytes
        self._tensor: Tensor | None = None
        """None once closed."""
        self._views: dict[int, tuple[SlabLayout, ExpertWeights]] = {}
        """By slot, what was last looked at in it."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together."""
        return self.slots * self.slab_bytes

    def whole(self) -> Tensor:
        """All slots, uint8 [nbytes]."""
        if self._tensor is None:
            raise EngineClosedError("the slots of the expert cache were used after they were closed")
        return self._tensor

    def slab(self, slot: int) -> Tensor:
        """The slot's bytes, uint8 [slab_bytes]."""
        start = self._start(slot)
        return self.whole()[start : start + self.slab_bytes]

    def weights(self, slot: int, layout: SlabLayout) -> ExpertWeights:
        """The matrices of the expert in `slot`, as views: they change when the slot is filled again."""
        if self._tensor is None:
            raise EngineClosedError("the slots of the expert cache were used after they were closed")
        kept = self._views.get(slot)
        if kept is None or kept[0] is not layout:  # making views anew for every use costs 3 % of a step
            kept = self._views[slot] = (layout, layout.weights(self.slab(slot)))
        return kept[1]

    def expert(self, slot: int, layout: SlabLayout) -> SlabExpert:
        """The expert in `slot`, to be looked at only when it is computed."""
        return SlabExpert(layout, self.whole(), self._start(slot))

    def wait_touched(self) -> None:
        """Wait until the memory is there. Raises `MemoryBudgetError` when the system did not give all of it."""

    def resize(self, slots: int) -> None:
        """Become `slots` large, at least one; what the slots hold that remain stays. Nobody may hold on to a buffer or
        a matrix that was handed out.

        Raises `MemoryBudgetError` when the system refuses the memory, `UsageError` while somebody holds on to some;
        nothing has changed then.
        """
        raise InternalError(f"{type(self).__name__}: its {self.slots} slots can't become {slots} where they are")

    def mend(self) -> None:
        """Make good what an interrupt of `resize` has left half done; `slots` is then how many there are. What is in
        them is lost where that was so.
        """

    def close(self) -> None:
        """Let go of the memory; it is returned once no matrix handed out is left. Idempotent."""
        self._views.clear()
        self._tensor = None

    def _start(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot}, wanted 0 to {self.slots - 1}")
        return slot * self.slab_bytes


class DeviceArena(Slots):
    """Slots in the memory of a device, in one piece, for the kernels find a slot by its number. The piece can't change
    its size, but may be replaced (`experts.device.resizing`).
    """

    def __init__(self, slots: int, slab_bytes: int, allocate: Callable[[int], Tensor]) -> None:
        """`allocate(nbytes)` gives device memory, uint8 [nbytes]."""
        super().__init__(slots, slab_bytes)
        self._tensor = allocate(self.nbytes)

    @property
    def has_memory(self) -> bool:
        """Whether there is a piece; there is none once closed, and after `give_up`."""
        return self._tensor is not None

    def give_up(self) -> Tensor | None:
        """The piece, which is the caller's now: there are no slots until it is replaced. None where there is none."""
        given, self._tensor = self._tensor, None
        self._views.clear()
        return given

    def replace(self, memory: Tensor) -> Tensor | None:
        """Have slots in `memory`, uint8 of a whole number of slabs, from now on; returns the piece that was."""
        if memory.numel() < self.slab_bytes or memory.numel() % self.slab_bytes:
            raise InternalError(f"{memory.numel()} bytes for slots of {self.slab_bytes} bytes")
        given = self.give_up()
        self._tensor, self.slots = memory, memory.numel() // self.slab_bytes
        return given


class HostSlots(Slots):
    """`slots` x `slab_bytes` of host memory, of exactly that size; a page of it is taken when it is touched.

    Every slot begins on a multiple of `SLOT_ALIGNMENT`. Raises `MemoryBudgetError` when the system refuses the memory.
    """

    def __init__(self, slots: int, slab_bytes: int) -> None:
        """`slab_bytes` is a multiple of `SLOT_ALIGNMENT`."""
        super().__init__(slots, slab_bytes)
        self._mapping: mmap.mmap | None = _map(slots, slab_bytes)
        """None once closed."""
        self._bytes: memoryview | None = None
        self._hand_out(self._mapping)

    def _hand_out(self, mapping: mmap.mmap) -> None:
        # An open memoryview keeps the mapping alive: the memory goes back when the last view of it does, never earlier.
        self.slots = len(mapping) // self.slab_bytes
        self._bytes = memoryview(mapping)
        self._tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)

    def buffer(self, slot: int) -> memoryview:
        """The slot's bytes [slab_bytes], writable."""
        if self._bytes is None:
            raise EngineClosedError("the slots of the expert cache were used after they were closed")
        start = self._start(slot)
        return self._bytes[start : start + self.slab_bytes]

    def slabs(self, first: int, count: int) -> Tensor:
        """The bytes of `count` slots from `first` on, fewer where there are fewer: uint8."""
        start = self._start(first)
        return self.whole()[start : start + count * self.slab_bytes]

    def close(self) -> None:
        """Let go of the memory; it is returned once no buffer or matrix handed out is left. Idempotent."""
        super().close()
        self._bytes = self._mapping = None


class SlotArena(HostSlots):
    """Host slots of which every page is touched by a thread of its own, begun here: a budget that is short must not
    show up mid-answer, but gigabytes of fresh pages take seconds, in which weights can be read and a prompt be worked
    on. A slot may be used at any time; `wait_touched` waits until all are there.
    """

    def __init__(self, slots: int, slab_bytes: int) -> None:
        """`slab_bytes` is a multiple of `SLOT_ALIGNMENT`."""
        super().__init__(slots, slab_bytes)
        self._remapping = threading.Lock()
        """Keeps `close`, which may come from any thread, from a mapping that is being resized."""
        self._half_done = False
        """Whether the mapping's size is being changed, or something stopped that half way."""
        self._toucher = Toucher(self.whole())

    def wait_touched(self) -> None:
        """Wait until every page of the slots is there, or the arena is closed.

        Raises `MemoryBudgetError` when the system did not give them all.
        """
        refused = self._toucher.wait()
        if refused:
            raise MemoryBudgetError(
                f"the system refused {refused} of the {self.nbytes} bytes for {self.slots} expert slots; "
                "ask for a smaller --gpu-mem or --expert-mem"
            )

    def resize(self, slots: int) -> None:
        """See `Slots`. Every page of new slots is there when this returns, the pages of those that go are not."""
        self.wait_touched()
        before = self.slots
        self._remap(slots)
        try:
            self.wait_touched()
        except MemoryBudgetError:
            self._remap(before)
            raise

    def _remap(self, slots: int) -> None:
        """Have the kernel change the mapping's size; it moves page tables, not bytes."""
        with self._remapping:
            if self._mapping is None:
                raise EngineClosedError("the slots of the expert cache were resized after they were closed")
            kept = min(slots, self.slots) * self.slab_bytes
            self._views.clear()
            looked_at = weakref.ref(cast("memoryview", self._bytes))  # every tensor in the mapping holds it
            self._half_done = True
            self._tensor = self._bytes = None
            try:
                _resize(self._mapping, slots * self.slab_bytes, looked_at)
            except BufferError:
                raise UsageError(
                    f"{self.slots} expert slots can't become {slots}: something outside the engine still holds memory "
                    "of one, such as an exception that is kept with its traceback; let go of it, and resize again"
                ) from None
            except (OSError, OverflowError, SystemError) as error:  # SystemError: what Python says without mremap
                raise MemoryBudgetError(
                    f"the system refused to make {self.slots} expert slots of {self.slab_bytes} bytes {slots} "
                    f"({error}); ask for fewer, or make another engine"
                ) from None
            finally:
                self._hand_out(self._mapping)
                self._toucher = Toucher(self.whole()[kept:])
                self._half_done = False

    def mend(self) -> None:
        """See `Slots`. Pages that had not been touched are from now on."""
        with self._remapping:
            if self._half_done and self._mapping is not None:
                if self._tensor is None:
                    self._hand_out(self._mapping)
                self._toucher = Toucher(self.whole())
                self._half_done = False

    def close(self) -> None:
        """See `HostSlots`."""
        with self._remapping:
            self._toucher.stop()
            super().close()


def _resize(mapping: mmap.mmap, nbytes: int, looked_at: Callable[[], object]) -> None:
    """Raises `BufferError` while a buffer of `mapping`, or a tensor in it (then `looked_at()`), is left."""
    try:
        if looked_at() is not None:
            raise BufferError
        mapping.resize(nbytes)
    except BufferError:
        gc.collect()  # an error's traceback may hold what nobody needs
        if looked_at() is not None:
            raise
        mapping.resize(nbytes)


def _map(slots: int, slab_bytes: int) -> mmap.mmap:
    nbytes = slots * slab_bytes
    try:
        return huge_pages(nbytes)
    except (OSError, OverflowError) as error:
        raise MemoryBudgetError(
            f"the system refused {nbytes} bytes for {slots} expert slots of {slab_bytes} bytes ({error}); "
            "ask for a smaller --gpu-mem or --expert-mem"
        ) from None
