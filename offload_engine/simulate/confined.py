"""What dMoE would have wanted, estimated from a trace of original routing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from offload_engine.trace import TraceRecord


def confined(records: Iterable[TraceRecord], top_p: float, min_experts: int) -> Iterator[TraceRecord]:
    """Of each record's experts those that hold `top_p` of the block's scores, the one that crosses it included, and at
    least `min_experts` (REFERENCE §3).

    An estimate: votes for experts that no token chose in the end are unknown, tokens then choose a little fewer than
    their coreset has, and later hidden states would differ. Roughest of all for prefills, which sum many blocks.
    """
    for record in records:
        count = _coreset_size(record.scores, top_p, min_experts)
        yield record.model_copy(update={"experts": record.experts[:count], "scores": record.scores[:count]})


def _coreset_size(scores: tuple[float, ...], top_p: float, min_experts: int) -> int:
    total, held = sum(scores), 0.0
    for count, score in enumerate(scores):
        if count >= min_experts and (top_p < 1 and held > top_p * total):
            return count
        held += score
    return len(scores)
