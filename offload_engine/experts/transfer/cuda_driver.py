"""`StreamDriver` with torch.cuda. Importing it needs no GPU; making one does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from offload_engine.errors import InternalError, MemoryBudgetError
from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.driver import Event


class CudaEvent:
    """See `Event`. A host that waits sleeps, rather than keep a core busy."""

    def __init__(self, driver: CudaDriver, timed: bool) -> None:
        self._driver = driver
        self._event: Any = torch.cuda.Event(blocking=True, enable_timing=timed)

    def record(self, stream: Stream) -> None:
        """See `Event`."""
        self._event.record(self._driver.stream(stream))

    def before(self, stream: Stream) -> None:
        """See `Event`."""
        self._driver.stream(stream).wait_event(self._event)

    def wait(self) -> None:
        """See `Event`."""
        self._event.synchronize()

    def done(self) -> bool:
        """See `Event`."""
        return bool(self._event.query())

    def seconds_since(self, earlier: Event) -> float:
        """See `Event`."""
        if not isinstance(earlier, CudaEvent):
            raise InternalError(f"the time since an event of another device, {type(earlier).__name__}, was asked for")
        return float(earlier._event.elapsed_time(self._event)) / 1000

    def close(self) -> None:
        """See `Event`."""
        self._event = None


class CudaDriver:
    """One GPU. The compute stream is the one on which torch computes for the thread that makes this; the copy stream
    is ours, and not ordered against it. Whoever computes on another stream finds the two ordered around each launch.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = {
            Stream.COMPUTE: torch.cuda.current_stream(device),
            Stream.COPY: torch.cuda.Stream(device),
        }

    @property
    def device(self) -> torch.device:
        """See `StreamDriver`."""
        return self._device

    def stream(self, stream: Stream) -> Any:
        """Torch's own."""
        return self._streams[stream]

    def allocate(self, nbytes: int) -> Tensor:
        """See `StreamDriver`."""
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            free, _all = torch.cuda.mem_get_info(self._device)
            raise MemoryBudgetError(
                f"{self._device} refused {nbytes} bytes for expert slots, {free} being free; "
                "end what else uses the GPU, or ask for a smaller --gpu-mem or --expert-mem"
            ) from None

    def free(self, memory: Tensor) -> None:
        """See `StreamDriver`. It goes back whoever may hold a view of it still, such as the traceback of an error."""
        memory.untyped_storage().resize_(0)
        with torch.cuda.device(self._device):
            torch.cuda.empty_cache()  # or torch would keep it, and cut what is asked for next out of it

    def pin(self, memory: Tensor) -> str | None:
        """See `StreamDriver`."""
        runtime = torch.cuda.cudart()
        with torch.cuda.device(self._device):
            error = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            if int(error) == 0:
                return None
            self._forget_error()
        return f"cudaHostRegister of {memory.numel()} bytes: {runtime.cudaGetErrorString(error)}"

    def unpin(self, memory: Tensor) -> None:
        """See `StreamDriver`."""
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def move(self, source: Tensor, target: Tensor) -> None:
        """See `StreamDriver`."""
        ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel())  # torch would begin threads of its own

    def event(self, *, timed: bool = False) -> CudaEvent:
        """See `StreamDriver`."""
        return CudaEvent(self, timed)

    def copy(self, stream: Stream, source: Tensor, target: Tensor) -> None:
        """See `StreamDriver`."""
        with torch.cuda.stream(self._streams[stream]):
            target.copy_(source, non_blocking=True)

    def fetch(self, stream: Stream, source: Tensor, target: Tensor) -> None:
        """See `StreamDriver`."""

        def bring() -> None:
            target.copy_(source, non_blocking=True)

        self.launch(stream, bring, [], [])

    def launch(self, stream: Stream, fn: Callable[[], None], reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:  # noqa: ARG002
        """See `StreamDriver`."""
        mine, theirs = torch.cuda.current_stream(self._device), self._streams[stream]
        if mine != theirs:
            theirs.wait_stream(mine)
        with torch.cuda.stream(theirs):
            fn()

    def join(self, stream: Stream) -> None:
        """See `StreamDriver`."""
        mine, theirs = torch.cuda.current_stream(self._device), self._streams[stream]
        if mine != theirs:
            mine.wait_stream(theirs)

    def finish(self) -> None:
        """See `StreamDriver`."""
        for stream in self._streams.values():
            stream.synchronize()

    def _forget_error(self) -> None:
        """A refusal stays behind in the runtime, for the next launch to trip over. Let that be one of ours."""
        try:
            torch.ones(1, device=self._device)
        except RuntimeError:
            return
