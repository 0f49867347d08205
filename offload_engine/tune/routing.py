"""What other routing would have wanted where a trace was recorded, and how much of the routers' votes it keeps.

A trace of original routing holds, per block, what each expert's votes come to: dMoE's own measure. So the coresets that
dMoE would have chosen there follow from it. They are exact for the first forward; later ones would have seen other
hidden states, and where a router limits groups, votes are counted without that limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from offload_engine.core import Phase
from offload_engine.trace import TraceRecord

Settings = dict[str, str | float | int]
"""Options of the engine, by name."""
Place = tuple[int, int, int, int]
"""Sequence, block, step, layer of a denoising forward."""


@dataclass(frozen=True, slots=True)
class Routing:
    """One way to route, and the requests that come of it."""

    name: str
    records: tuple[TraceRecord, ...]
    kept: float | None
    """Share of original routing's votes that its experts hold, mean over denoising steps and layers; None: unknown."""
    settings: Settings = field(default_factory=dict)
    """Options of the engine that route so."""


def as_coresets(
    records: Iterable[TraceRecord], top_p: float, min_experts: int, hold_steps: int = 1
) -> tuple[TraceRecord, ...]:
    """`records` of original routing as dMoE would have had them (`routing.coreset`, `routing.situated`).

    A prefill, which a trace doesn't tell block by block, stays as it is.
    """
    held: dict[tuple[int, int], tuple[int, int, tuple[int, ...]]] = {}
    found = []
    for record in records:
        if record.phase not in (Phase.DENOISE, Phase.COMMIT):
            found.append(record)
            continue
        chosen = _coreset(record, top_p, min_experts)
        if record.phase is Phase.DENOISE:
            place = record.layer, record.sequence
            block, step, coreset = held.get(place, (-1, 0, ()))
            if block == record.block and 0 < record.step - step < hold_steps:
                chosen = coreset
            else:
                held[place] = record.block, record.step, chosen
        found.append(_among(record, chosen))
    return tuple(found)


def kept_share(original: Iterable[TraceRecord], other: Iterable[TraceRecord]) -> float | None:
    """Share of `original`'s votes that fall on the experts `other` wanted at the same place, mean over the places both
    have; None where there is none.
    """
    there = {_place(record): record for record in other if record.phase is Phase.DENOISE}
    shares = []
    for record in original:
        match = there.get(_place(record)) if record.phase is Phase.DENOISE else None
        total = sum(map(_vote, record.scores))
        if match is not None and total > 0:
            wanted = set(match.experts)
            pairs = zip(record.experts, record.scores, strict=True)
            shares.append(sum(_vote(score) for expert, score in pairs if expert in wanted) / total)
    return sum(shares) / len(shares) if shares else None


def steps_of(records: Iterable[TraceRecord]) -> int:
    """Denoising steps, each counted once however many layers it has."""
    return len({_place(record)[:3] for record in records if record.phase is Phase.DENOISE})


def experts_per_layer(records: Iterable[TraceRecord]) -> float:
    """Experts wanted per denoising step and layer; 0 where there is none."""
    counts = [len(record.experts) for record in records if record.phase is Phase.DENOISE]
    return sum(counts) / len(counts) if counts else 0.0


def after_warm_up(records: Sequence[TraceRecord], share: float = 1 / 3) -> int:
    """Where the steady part begins: at the first step of the block that ends this share of the blocks, with the commit
    it is fused with. 0 for a trace of one block.
    """
    blocks: dict[tuple[int, int], int] = {}
    for index, record in enumerate(records):
        if record.phase is Phase.DENOISE:
            blocks.setdefault((record.sequence, record.block), index)
    begins = list(blocks.values())[int(len(blocks) * share + 1) if len(blocks) > 1 else 0 :][:1]
    cut = begins[0] if begins else next(iter(blocks.values()), 0)
    if cut and records[cut - 1].phase is Phase.COMMIT and records[cut - 1].layer == records[cut].layer:
        return cut - 1
    return cut


def _coreset(record: TraceRecord, top_p: float, min_experts: int) -> tuple[int, ...]:
    """The experts that hold `top_p` of the votes, and the one that crosses it: as `routing.coreset.top_p_coreset`."""
    total = max(sum(map(_vote, record.scores)), 1e-30)
    before, count = 0.0, 0
    for score in record.scores:
        if top_p < 1 and before / total > top_p and count >= min_experts:
            break
        before += _vote(score)
        count += 1
    return record.experts[:count]


def _among(record: TraceRecord, coreset: Sequence[int]) -> TraceRecord:
    """The record with the experts of `coreset` for its own, by falling score, ties by rising index."""
    scores = dict(zip(record.experts, record.scores, strict=True))
    ranked = sorted(coreset, key=lambda expert: (-scores.get(expert, 0.0), expert))
    return record.model_copy(
        update={"experts": tuple(ranked), "scores": tuple(scores.get(expert, 0.0) for expert in ranked)}
    )


def _place(record: TraceRecord) -> Place:
    return record.sequence, record.block, record.step, record.layer


def _vote(score: float) -> float:
    """Selection scores may be negative, votes are not."""
    return max(score, 0.0)
