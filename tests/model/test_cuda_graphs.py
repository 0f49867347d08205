"""What our recorder asks of torch.cuda, without a GPU to ask."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from offload_engine.model.cuda_graphs import CudaRecorder
from offload_engine.model.graphs import Attended, RecordingError

CUDA = torch.device("cuda", 0)
RESULT = Attended(torch.zeros(1), torch.ones(1), torch.ones(1, 2))


class Torch:
    """What of torch.cuda is seen, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: str = "") -> None:
        self.seen: list[Any] = []
        seen = self.seen

        class Stream:
            def __init__(self, name: Any) -> None:
                self.name = "side" if name == CUDA else name

            def wait_stream(self, other: Stream) -> None:
                seen.append((self.name, "waits for", other.name))

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                assert not gc.isenabled()
                seen.append(("begin", pool, capture_error_mode))

            def capture_end(self) -> None:
                seen.append("end")
                if refuses:
                    raise RuntimeError(refuses)

            def replay(self) -> None:
                seen.append("replay")

        @contextmanager
        def entering(stream: Stream) -> Iterator[None]:
            seen.append(stream.name)
            yield
            seen.append("left")

        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream("main"))
        monkeypatch.setattr(torch.cuda, "stream", entering)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")


def test_work_is_recorded_on_a_stream_of_its_own_in_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Torch(monkeypatch)
    recorder = CudaRecorder(CUDA)
    recording = recorder.record(lambda: (cuda.seen.append("work"), RESULT)[1])
    assert gc.isenabled()
    assert recording.outputs is RESULT
    assert cuda.seen == [
        ("side", "waits for", "main"),
        "side",
        ("begin", "pool", "thread_local"),
        "work",
        "end",
        "left",
        ("main", "waits for", "side"),
    ]
    recording.replay()
    assert cuda.seen[-1] == "replay"


@pytest.mark.parametrize("collecting", [True, False])
def test_a_refusal_is_one_line_and_leaves_nothing_changed(monkeypatch: pytest.MonkeyPatch, collecting: bool) -> None:
    cuda = Torch(monkeypatch, refuses="CUDA error: operation not permitted when stream is capturing\nCompile with more")
    try:
        (gc.enable if collecting else gc.disable)()
        with pytest.raises(RecordingError) as refused:
            CudaRecorder(CUDA).record(lambda: RESULT)
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
    told = "CUDA refuses to record it (CUDA error: operation not permitted when stream is capturing)"
    assert str(refused.value) == told
    assert "end" in cuda.seen


def test_work_that_fails_ends_the_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Torch(monkeypatch)

    def failing() -> Attended:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RecordingError, match="CUDA out of memory"):
        CudaRecorder(CUDA).record(failing)
    assert cuda.seen[-1] == "end"
