"""Where every expert is and how often it was used, layer by layer: what a heat map is drawn from."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from offload_engine.core import ForwardInfo, Phase, RoutingDecision
from offload_engine.experts.executor import OffloadedExperts
from offload_engine.experts.scheduling.cache import SlotState

SIGNS = {SlotState.FREE: ".", SlotState.LOADING: "l", SlotState.RESIDENT: "r"}


class ExpertActivity:
    """A `Watcher` that counts the uses of each expert by blocks being denoised.

    It counts only while somebody is watching, for it costs a few microseconds per layer. Its other methods may be
    called from any thread.
    """

    def __init__(self, experts: OffloadedExperts, num_experts: int) -> None:
        self._experts = experts
        self._num_experts = num_experts
        self._row = {layer: row for row, layer in enumerate(experts.layers)}
        self._uses = torch.zeros(len(self._row), num_experts, dtype=torch.int64)
        self._watching = 0
        self._lock = threading.Lock()

    def __call__(self, info: ForwardInfo, layer: int, decision: RoutingDecision) -> None:
        """See `Watcher`."""
        if self._watching and info.phase is Phase.DENOISE:
            chosen = decision.experts.reshape(-1).cpu()
            counts = torch.bincount(chosen + 1, minlength=self._num_experts + 1)[1:]  # -1 is no expert
            self._uses[self._row[layer]] += counts

    @property
    def layers(self) -> list[int]:
        """The MoE layers, in the order of the rows of `uses` and `rows`."""
        return list(self._row)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, uses are counted."""
        with self._lock:
            self._watching += 1
        try:
            yield
        finally:
            with self._lock:
                self._watching -= 1

    def uses(self) -> Tensor:
        """[layers, experts] int64: how many tokens of blocks being denoised chose each expert, as far as it was
        counted; a copy.
        """
        return self._uses.clone()

    def rows(self) -> list[str]:
        """Per MoE layer a character per expert: `r` resident, `l` loading, `.` neither."""
        states = self._experts.states()
        signs = [["."] * self._num_experts for _row in self._row]
        for key, state in states.items():
            signs[self._row[key.layer]][key.expert] = SIGNS[state]
        return ["".join(row) for row in signs]
