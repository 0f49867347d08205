"""The seam between our transfers and a device: streams, events, copies, launches.

`cuda_driver` implements it with torch.cuda; the tests' stream simulator implements it on CPU tensors, and defers and
reorders whatever CUDA would be free to defer and reorder. Nothing beyond what is said here may be relied on:

- What is enqueued on one stream runs in order, some time after the call returned. Streams are not ordered among each
  other, nor against the host, but by events.
- A stream that waits for an event waits for what the event marked when the wait was enqueued. An event that marks
  nothing yet holds up nobody.
- A copy from pinned memory reads its source when it runs; one from pageable memory has read it when the call returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from offload_engine.experts.transfer.base import Stream


class Event(Protocol):
    """A mark on a stream. It can be set anew, which changes nothing for those who wait already."""

    def record(self, stream: Stream) -> None:
        """Mark everything enqueued on `stream` so far."""

    def before(self, stream: Stream) -> None:
        """What is enqueued on `stream` from now on runs after what it marks now."""

    def wait(self) -> None:
        """Have the host wait until what it marks has run. Holds no interpreter lock."""

    def done(self) -> bool:
        """Whether what it marks has run. Once it has, that is as if `wait` had been called."""

    def seconds_since(self, earlier: Event) -> float:
        """By the device's clock, between what the two mark, both done and both `timed`."""

    def close(self) -> None:
        """Give it back. Nobody may wait for it any more."""


class StreamDriver(Protocol):
    """A device with a compute stream and a copy stream. May be called from several threads at once."""

    @property
    def device(self) -> torch.device:
        """Where the memory it allocates is."""

    def allocate(self, nbytes: int) -> Tensor:
        """Device memory, uint8 [nbytes], that starts on a multiple of 256 at least. Raises `MemoryBudgetError`."""

    def free(self, memory: Tensor) -> None:
        """Give back what `allocate` gave, to other processes too, once the host has waited for all work that uses it.
        Nobody may look at it any more.
        """

    def pin(self, memory: Tensor) -> str | None:
        """Make host memory, whole pages, a source of asynchronous copies, each from within it; None, or why the system
        refused.
        """

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`, once every copy from there has run, and before the memory is freed."""

    def move(self, source: Tensor, target: Tensor) -> None:
        """Copy host bytes to host memory of the same size, before this returns. Holds no interpreter lock."""

    def event(self, *, timed: bool = False) -> Event:
        """A new one, marking nothing; `timed`: it keeps the time. To be closed."""

    def copy(self, stream: Stream, source: Tensor, target: Tensor) -> None:
        """Enqueue the copy of host bytes to device memory of the same size."""

    def fetch(self, stream: Stream, source: Tensor, target: Tensor) -> None:
        """Enqueue the copy of device bytes to host memory of the same size. `source` may be what the caller has just
        computed: it runs after that, on whatever stream it was. Unless `target` is pinned, it has run when the call
        returns.
        """

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
        """Enqueue the work of `fn`, which reads and writes these pieces of device memory. Called at once, or later;
        once.
        """

    def join(self, stream: Stream) -> None:
        """What the caller computes next runs after everything enqueued on `stream`; the host need not wait."""

    def finish(self) -> None:
        """Have the host wait until everything enqueued on both streams has run."""
