"""What other routing would have wanted where a trace was recorded, and how much of the routers' votes it keeps.

A trace of original routing holds, per block, what the votes for each expert come to, which is dMoE's own measure: so
the coresets that dMoE would have chosen there follow from it, estimated as `simulate.confined` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from offload_engine.core import Phase
from offload_engine.simulate.confined import confined
from offload_engine.trace import TraceRecord

Settings = dict[str, str | float | int]
"""Options of the engine, by name."""


@dataclass(frozen=True, slots=True)
class Routing:
    """One way to route, and the requests that come of it."""

    name: str
    records: tuple[TraceRecord, ...]
    kept: float | None
    """Share of original routing's votes that its experts hold, mean over denoising steps and layers; None: unknown."""
    settings: Settings = field(default_factory=dict)
    """Options of the engine that route so."""


class _Held(NamedTuple):
    block: int
    step: int
    coreset: tuple[int, ...]


def as_coresets(
    records: Sequence[TraceRecord], top_p: float, min_experts: int, hold_steps: int = 1
) -> tuple[TraceRecord, ...]:
    """`records` of original routing as dMoE would have had them, a coreset serving `hold_steps` steps of its block
    (`routing.situated`).
    """
    held: dict[tuple[int, int], _Held] = {}
    found = []
    for record, fresh in zip(records, confined(records, top_p, min_experts), strict=True):
        place = record.layer, record.sequence
        last = held.get(place)
        if record.phase is not Phase.DENOISE:
            found.append(fresh)
        elif last is not None and last.block == record.block and 0 < record.step - last.step < hold_steps:
            found.append(_among(record, last.coreset))
        else:
            held[place] = _Held(record.block, record.step, fresh.experts)
            found.append(fresh)
    return tuple(found)


def kept_share(original: Iterable[TraceRecord], other: Iterable[TraceRecord]) -> float | None:
    """Share of `original`'s votes that fall on the experts `other` wanted at the same place, mean over the places both
    have; None where there is none.
    """
    there = {_place(record): set(record.experts) for record in other if record.phase is Phase.DENOISE}
    shares = []
    for record in original:
        wanted = there.get(_place(record)) if record.phase is Phase.DENOISE else None
        total = sum(map(_vote, record.scores))
        if wanted is not None and total > 0:
            pairs = zip(record.experts, record.scores, strict=True)
            shares.append(sum(_vote(score) for expert, score in pairs if expert in wanted) / total)
    return sum(shares) / len(shares) if shares else None


def steps_of(records: Iterable[TraceRecord]) -> int:
    """Denoising steps of blocks, each counted once however many layers it has."""
    return len({_place(record)[:3] for record in records if record.phase is Phase.DENOISE})


def blocks_of(records: Iterable[TraceRecord]) -> int:
    """Blocks that were denoised."""
    return len({_place(record)[:2] for record in records if record.phase is Phase.DENOISE})


def _among(record: TraceRecord, coreset: Sequence[int]) -> TraceRecord:
    """The record with the experts of `coreset` for its own, by falling score, ties by rising index."""
    scores = dict(zip(record.experts, record.scores, strict=True))
    ranked = sorted(coreset, key=lambda expert: (-scores.get(expert, 0.0), expert))
    return record.model_copy(
        update={"experts": tuple(ranked), "scores": tuple(scores.get(expert, 0.0) for expert in ranked)}
    )


def _place(record: TraceRecord) -> tuple[int, int, int, int]:
    return record.sequence, record.block, record.step, record.layer


def _vote(score: float) -> float:
    """Selection scores may be negative, votes are not."""
    return max(score, 0.0)
