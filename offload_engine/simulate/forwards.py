"""A trace's records as the forwards they were recorded from, with the sizes that a timing model needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from offload_engine.core import BlockPass, ExpertKey, ForwardInfo, Phase
from offload_engine.experts.scheduling.outlook import FURTHEST, Outlook
from offload_engine.experts.scheduling.predictor import Chosen
from offload_engine.trace import TraceRecord


class Pass(NamedTuple):
    """What a forward did for one block, or in a prefill for the prompt's whole blocks together."""

    sequence: int
    phase: Phase
    block: int
    step: int


@dataclass(frozen=True, slots=True)
class LayerRun:
    """What one MoE layer wanted in one forward."""

    layer: int
    experts: tuple[int, ...]
    """By falling score."""
    scores: tuple[float, ...]
    learned: Chosen | None = None
    """See `ExpertPredictor.observe`: the part of it that is still denoised; None: all."""
    runners_up: tuple[int, ...] = ()
    """See `Outlook`, of the same part."""

    @property
    def outlook(self) -> Outlook:
        """What the layer's routing says of its next one."""
        return Outlook(self.experts if self.learned is None else self.learned[0], self.runners_up)

    @property
    def keys(self) -> list[ExpertKey]:
        """The experts as keys, in their order."""
        return [ExpertKey(self.layer, expert) for expert in self.experts]


class Size(NamedTuple):
    """How large a forward is."""

    tokens: int = 0
    """That go through the layers."""
    positions: int = 0
    """That each of them attends to, on average, itself included."""
    masked: int = 0
    """Whose logits are taken."""


UNSIZED = Size()


@dataclass(frozen=True, slots=True)
class ForwardRun:
    """One forward of a trace: its layers in the order they ran."""

    info: ForwardInfo
    layers: list[LayerRun] = field(default_factory=list)
    passes: tuple[Pass, ...] = ()
    size: Size = UNSIZED


def forwards(records: Iterable[TraceRecord], block_length: int = 0) -> Iterator[ForwardRun]:
    """Put a trace's records back together as forwards.

    A forward over several blocks is recorded block by block within each layer: those records belong together. Another
    forward begins with a layer before the last one, or with a pass that the forward's first layer did not have.
    `block_length` gives their passes a number of tokens.
    """
    group: list[TraceRecord] = []
    for record in records:
        if group and not _continues(group, record):
            yield _forward(group, block_length)
            group = []
        group.append(record)
    if group:
        yield _forward(group, block_length)


def _continues(group: Sequence[TraceRecord], record: TraceRecord) -> bool:
    last, first = group[-1], group[0].layer
    mine = _pass(record)
    if record.layer < last.layer:
        return False
    if record.layer > first:
        known = {_pass(one) for one in group if one.layer == first}
        return mine in known and all(_pass(one) != mine for one in group if one.layer == record.layer)
    # Still in the first layer: of a sequence, a forward has at most a finished block and the next one's first step.
    before = [_pass(one) for one in group if one.sequence == record.sequence]
    if Phase.PREFILL in (record.phase, last.phase) and record.phase is not last.phase:
        return False
    if not before:
        return True
    commit = before[-1]
    return len(before) == 1 and commit.phase is Phase.COMMIT and mine[1:] == (Phase.DENOISE, commit.block + 1, 0)


def _pass(record: TraceRecord) -> Pass:
    return Pass(record.sequence, record.phase, record.block, record.step)


def _forward(group: Sequence[TraceRecord], block_length: int) -> ForwardRun:
    by_layer: dict[int, list[TraceRecord]] = {}
    for record in group:
        by_layer.setdefault(record.layer, []).append(record)
    passes = tuple(_pass(record) for record in by_layer[group[0].layer])
    blocks = [BlockPass(one.phase, one.sequence, one.block, one.step, block_length) for one in passes]
    layers = [_layer_run(layer, records) for layer, records in by_layer.items()]
    return ForwardRun(ForwardInfo.of(blocks), layers, passes)


def _layer_run(layer: int, records: Sequence[TraceRecord]) -> LayerRun:
    if len(records) == 1:
        return LayerRun(layer, records[0].experts, records[0].scores, runners_up=records[0].runners_up)
    denoised = [record for record in records if record.phase is Phase.DENOISE]
    ranked = _ranked(records)
    if len(denoised) in (0, len(records)):
        return LayerRun(layer, tuple(ranked), tuple(ranked.values()), runners_up=_runners_up(records))
    kept = {expert for record in denoised for expert in record.experts}
    learned = {expert: score for expert, score in ranked.items() if expert in kept}
    told = tuple(learned), tuple(learned.values())
    return LayerRun(layer, tuple(ranked), tuple(ranked.values()), told, _runners_up(denoised))


def _runners_up(records: Sequence[TraceRecord]) -> tuple[int, ...]:
    """Those of all records whom none chose, by the best place they had; at most `FURTHEST`."""
    chosen = {expert for record in records for expert in record.experts}
    places: dict[int, int] = {}
    for record in records:
        for place, expert in enumerate(record.runners_up):
            if expert not in chosen:
                places[expert] = min(place, places.get(expert, place))
    return tuple(sorted(places, key=lambda expert: (places[expert], expert))[:FURTHEST])


def _ranked(records: Sequence[TraceRecord]) -> dict[int, float]:
    """The experts of all records by falling sum of their scores, ties by rising index."""
    scores: dict[int, float] = {}
    for record in records:
        for expert, score in zip(record.experts, record.scores, strict=True):
            scores[expert] = scores.get(expert, 0.0) + score
    return dict(sorted(scores.items(), key=lambda one: (-one[1], one[0])))


def sized(trace: Sequence[ForwardRun], block_length: int) -> list[ForwardRun]:
    """`trace` with the size of every forward, as far as a trace tells.

    A prefill has as many blocks as come before the first one that is denoised, or one where none ever is. A block's
    masked positions are taken to fall evenly from step to step; a trace doesn't say which were open.
    """
    steps: dict[tuple[int, int], int] = {}
    first: dict[int, int] = {}
    for forward in trace:
        for one in forward.passes:
            if one.phase is Phase.DENOISE:
                steps[one.sequence, one.block] = steps.get((one.sequence, one.block), 0) + 1
                first.setdefault(one.sequence, one.block)
    return [replace(forward, size=_size(forward, steps, first, block_length)) for forward in trace]


def _size(
    forward: ForwardRun, steps: Mapping[tuple[int, int], int], first: Mapping[int, int], block_length: int
) -> Size:
    tokens = weighted = 0
    masked = 0.0
    for one in forward.passes:
        if one.phase is Phase.PREFILL:
            count = max(1, first.get(one.sequence, 1)) * block_length
            seen = (count + block_length) // 2  # block-causal: a block sees itself and those before it
        else:
            count, seen = block_length, (one.block + 1) * block_length
        if one.phase is Phase.DENOISE:
            masked += block_length * (1 - one.step / max(steps[one.sequence, one.block], one.step + 1))
        tokens += count
        weighted += count * seen
    return Size(tokens, weighted // max(tokens, 1), round(masked))
