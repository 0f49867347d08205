"""`Recorder` with torch.cuda. Importing it needs no GPU; making one does."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from offload_engine.model.graphs import Attended, RecordingError


class CudaRecording:
    """See `Recording`."""

    def __init__(self, graph: torch.cuda.CUDAGraph, outputs: Attended) -> None:
        self._graph = graph
        self.outputs = outputs

    def replay(self) -> None:
        """See `Recording`. On the stream on which torch computes for the caller."""
        self._graph.replay()


class CudaRecorder:
    """Records on a stream of its own, for the default one can't be recorded, into one pool of memory: recordings run
    one after the other, and only what one of them keeps, its outputs, is not another's to use.

    `torch.cuda.graph` does the same, but waits for the whole device and gives torch's free memory back each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, work: Callable[[], Attended]) -> CudaRecording:
        """See `Recorder`. Other threads may use the device meanwhile."""
        graph = torch.cuda.CUDAGraph()
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        try:
            with _uncollected(), torch.cuda.stream(self._stream):
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    outputs = work()
                finally:
                    graph.capture_end()
        except RuntimeError as error:  # torch has no type for it
            told = str(error).strip().partition("\n")[0]
            raise RecordingError(f"CUDA refuses to record it ({told})") from error
        computing.wait_stream(self._stream)
        return CudaRecording(graph, outputs)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage is collected: what the collector frees may call on CUDA in ways that end a recording."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
