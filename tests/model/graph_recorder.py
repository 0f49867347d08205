"""A recorder without a device: what it replays is the work itself, into memory that stays where it is."""

from __future__ import annotations

from collections.abc import Callable

import torch

from offload_engine.model.graphs import Attended, RecordingError


class FakeRecording:
    def __init__(self, work: Callable[[], Attended], wrong: bool) -> None:
        self._work, self._wrong = work, wrong
        self.outputs = Attended(*(torch.full_like(tensor, torch.nan) for tensor in work()))
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for output, result in zip(self.outputs, self._work(), strict=True):
            output.copy_(result)
        if self._wrong:
            self.outputs.logits[0, 0] += 1


class FakeRecorder:
    """Records so many times, and then refuses; `wrong`: recordings give other results than the work."""

    def __init__(self, most: int = 10**9, wrong: bool = False) -> None:
        self.most, self.wrong = most, wrong
        self.recordings: list[FakeRecording] = []

    @property
    def replays(self) -> int:
        return sum(one.replays for one in self.recordings)

    def record(self, work: Callable[[], Attended]) -> FakeRecording:
        if len(self.recordings) >= self.most:
            raise RecordingError("CUDA refuses to record it (no reason)")
        self.recordings.append(FakeRecording(work, self.wrong))
        return self.recordings[-1]
