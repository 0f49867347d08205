"""What became of the bytes that were missing: issued before their layer had routed? read while compute went on?

Pure arithmetic on the times at which layers ran, experts travelled, and compute stood still.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

from offload_engine.core import ExpertKey


class LayerRun(NamedTuple):
    """One MoE layer of one forward: from its routing's being known to its last expert's being computed, in seconds."""

    layer: int
    began: float
    ended: float
    experts: Collection[int]
    """What its tokens chose, each once."""


class Transfer(NamedTuple):
    """One expert's way into a slot: from its being handed to the driver to its being there, in seconds."""

    key: ExpertKey
    began: float
    ended: float
    nbytes: int


class Interval(NamedTuple):
    """A stretch of time, in seconds; here one in which compute waited for transfers."""

    began: float
    ended: float


class Missed(NamedTuple):
    """Bytes that layers asked for and a transfer had to bring."""

    nbytes: int
    early: int
    """Of these, handed to the driver before their layer's routing was known."""
    hidden: float
    """Of these, moved while compute did not wait: a transfer's bytes count by the share of its time without a stall."""

    @property
    def early_share(self) -> float | None:
        """None where nothing was missed."""
        return self.early / self.nbytes if self.nbytes else None

    @property
    def hidden_share(self) -> float | None:
        """None where nothing was missed."""
        return self.hidden / self.nbytes if self.nbytes else None


def missed_bytes(
    runs: Sequence[LayerRun],
    transfers: Sequence[Transfer],
    stalls: Sequence[Interval],
    since: float = -math.inf,
) -> Missed:
    """Sum up the transfers that served a run begun at `since` or later; what was never asked for is left out.

    `runs` and `stalls` don't overlap among themselves and rise in time. A transfer belongs to the run of its layer that
    wants its expert and ends after the transfer began, the first of them; the last transfer before that run counts.
    """
    wanted: dict[ExpertKey, list[LayerRun]] = defaultdict(list)
    for run in runs:
        for expert in run.experts:
            wanted[ExpertKey(run.layer, expert)].append(run)
    served: dict[tuple[ExpertKey, float], tuple[Transfer, LayerRun]] = {}
    for transfer in sorted(transfers, key=lambda one: one.began):
        candidates = wanted.get(transfer.key, [])
        place = bisect.bisect_right(candidates, transfer.began, key=lambda run: run.ended)
        if place < len(candidates):
            run = candidates[place]
            served[transfer.key, run.began] = (transfer, run)
    total = early = 0
    hidden = 0.0
    for transfer, run in served.values():
        if run.began < since:
            continue
        total += transfer.nbytes
        early += transfer.nbytes if transfer.began < run.began else 0
        hidden += transfer.nbytes * (1 - _stalled_share(transfer, stalls))
    return Missed(total, early, hidden)


def _stalled_share(transfer: Transfer, stalls: Sequence[Interval]) -> float:
    """The share of the transfer's time in which compute waited."""
    duration = transfer.ended - transfer.began
    if duration <= 0:
        return 0.0
    first = bisect.bisect_right(stalls, transfer.began, key=lambda stall: stall.ended)
    waited = 0.0
    for stall in stalls[first:]:
        if stall.began >= transfer.ended:
            break
        waited += min(stall.ended, transfer.ended) - max(stall.began, transfer.began)
    return waited / duration
