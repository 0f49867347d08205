"""Planning an expert's reads: every byte lands, none is read twice, matrices end up aligned."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine import kernels
from offload_engine.disk_file import align_down, align_up
from offload_engine.experts.storage.layout import (
    SLOT_ALIGNMENT,
    ReadPlan,
    SlabExpert,
    packed_layout,
    plan_reads,
)
from offload_engine.model.quantized import ExpertFormat, Matrix, QuantizedMatrix
from offload_engine.model.weights import ExpertSpans, FileSpan

ONE, TWO = Path("one.safetensors"), Path("two.safetensors")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@st.composite
def experts(draw: st.DrawFn) -> ExpertSpans:
    """Three matrices in any order, at any distance, at any address, in one file or several."""
    dtype = draw(st.sampled_from(DTYPES))
    intermediate, hidden = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    nbytes = intermediate * hidden * dtype.itemsize
    paths = draw(st.sampled_from([(ONE, ONE, ONE), (ONE, ONE, TWO), (TWO, ONE, TWO)]))
    gaps = st.one_of(st.just(0), st.integers(0, 9), st.integers(0, 3 * SLOT_ALIGNMENT))
    spans: dict[str, FileSpan] = {}
    ends = {ONE: draw(st.integers(0, 9000)), TWO: draw(st.integers(0, 9000))}
    for name, path in zip(draw(st.permutations(["gate", "up", "down"])), paths, strict=True):
        offset = ends[path] + draw(gaps)
        spans[name] = FileSpan(path, offset, nbytes)
        ends[path] = offset + nbytes
    return ExpertSpans(**spans, dtype=dtype, intermediate=intermediate, hidden=hidden)


def matrices(spans: ExpertSpans) -> tuple[FileSpan, FileSpan, FileSpan]:
    return spans.gate, spans.up, spans.down


def files(spans: ExpertSpans) -> dict[Path, bytes]:
    """Files of random bytes which end with the last matrix in them."""
    generator = torch.Generator().manual_seed(1)
    ends: dict[Path, int] = {}
    for span in matrices(spans):
        ends[span.path] = max(ends.get(span.path, 0), span.offset + span.nbytes)
    return {
        path: torch.randint(0, 256, (end,), dtype=torch.uint8, generator=generator).numpy().tobytes()
        for path, end in ends.items()
    }


def carry_out(plan: ReadPlan, content: dict[Path, bytes]) -> torch.Tensor:
    slab = bytearray(b"\xee" * plan.layout.nbytes)
    for window in plan.windows:
        read = content[window.path][window.file_offset : window.file_offset + window.nbytes]
        assert len(read) >= window.needed
        slab[window.slab_offset : window.slab_offset + len(read)] = read
    view = memoryview(slab)
    for move in plan.moves:
        view[move.target : move.target + move.nbytes] = view[move.source : move.source + move.nbytes]
    return torch.frombuffer(slab, dtype=torch.uint8)


@given(experts())
def test_matrices_arrive_whole(spans: ExpertSpans) -> None:
    content = files(spans)
    plan = plan_reads(spans)
    weights = plan.layout.weights(carry_out(plan, content))
    shapes = ((spans.intermediate, spans.hidden),) * 2 + ((spans.hidden, spans.intermediate),)
    for span, matrix, shape in zip(matrices(spans), weights, shapes, strict=True):
        stored = content[span.path][span.offset : span.offset + span.nbytes]
        assert matrix.contiguous().view(torch.uint8).numpy().tobytes() == stored
        assert tuple(matrix.shape) == shape
        assert matrix.dtype == spans.dtype


@given(experts())
def test_reads_are_aligned_and_ask_for_no_byte_too_many(spans: ExpertSpans) -> None:
    plan = plan_reads(spans)
    units = {
        (span.path, unit)
        for span in matrices(spans)
        for unit in range(align_down(span.offset), align_up(span.offset + span.nbytes), SLOT_ALIGNMENT)
    }
    asked = [
        (window.path, window.file_offset + place)
        for window in plan.windows
        for place in range(0, window.nbytes, SLOT_ALIGNMENT)
    ]
    assert sorted(asked) == sorted(units)
    assert plan.nbytes == plan.layout.nbytes == len(units) * SLOT_ALIGNMENT
    landed = 0
    for window in plan.windows:
        assert window.slab_offset == landed
        assert window.file_offset % SLOT_ALIGNMENT == 0
        assert window.nbytes - SLOT_ALIGNMENT < window.needed <= window.nbytes
        landed += window.nbytes


@given(experts())
def test_windows_that_touch_are_one(spans: ExpertSpans) -> None:
    windows = plan_reads(spans).windows
    for earlier, later in itertools.pairwise(windows):
        assert earlier.path != later.path or earlier.file_offset + earlier.nbytes < later.file_offset


@given(experts())
def test_only_odd_addresses_are_moved_and_by_less_than_a_number(spans: ExpertSpans) -> None:
    plan = plan_reads(spans)
    size = spans.dtype.itemsize
    assert len(plan.moves) == sum(span.offset % size != 0 for span in matrices(spans))
    assert all(0 < move.source - move.target < size for move in plan.moves)
    assert all(place.offset % size == 0 for place in (plan.layout.gate, plan.layout.up, plan.layout.down))


def test_the_published_order_is_kept() -> None:
    """Down, gate, up lie side by side in a published shard: one read, 1.001 times the payload for LLaDA2.0-mini."""
    nbytes = 512 * 2048 * 2
    start = 123_456
    down, gate, up = (FileSpan(ONE, start + i * nbytes, nbytes) for i in range(3))
    plan = plan_reads(ExpertSpans(gate, up, down, torch.bfloat16, intermediate=512, hidden=2048))
    assert len(plan.windows) == 1
    slack = start % SLOT_ALIGNMENT
    assert [place.offset for place in (plan.layout.down, plan.layout.gate, plan.layout.up)] == [
        slack,
        slack + nbytes,
        slack + 2 * nbytes,
    ]
    assert plan.nbytes <= 1.001 * 3 * nbytes


def test_views_share_the_slabs_memory() -> None:
    spans = ExpertSpans(*(FileSpan(ONE, i * 24, 24) for i in range(3)), torch.float32, intermediate=2, hidden=3)
    layout = plan_reads(spans).layout
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8)
    weights = layout.weights(slab)
    weights.up[1, 2] = 1.0
    assert slab[24 + 20 : 24 + 24].view(torch.float32).item() == 1.0
    assert int(slab.count_nonzero()) == 2


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_an_expert_in_its_slab_is_the_one_its_views_show(kind: str) -> None:
    if kernels.status().variant is None:
        pytest.skip(kernels.status().reason)
    form = {
        "bf16": ExpertFormat(torch.bfloat16),
        "int8": ExpertFormat(torch.bfloat16, 8),
        "int4": ExpertFormat(torch.bfloat16, 4, 16),
    }[kind]
    layout, _payload = packed_layout(form, hidden=64, width=32)
    start = 2 * layout.nbytes
    memory = torch.zeros(start + layout.nbytes, dtype=torch.uint8)
    found, wanted = SlabExpert(layout, memory, start), layout.weights(memory[start:])
    assert found.kernel_expert is not None
    assert wanted.kernel_expert is not None
    assert found.kernel_expert.pointers == wanted.kernel_expert.pointers
    assert found.kernel_expert.shape == wanted.kernel_expert.shape
    assert found.kernel_expert is found.kernel_expert, "kept"
    assert [same_memory(one, other) for one, other in zip(found, wanted, strict=True)] == [True] * 3


def test_an_expert_that_the_kernels_do_not_take_has_its_views() -> None:
    spans = ExpertSpans(*(FileSpan(ONE, i * 24, 24) for i in range(3)), torch.float32, intermediate=2, hidden=3)
    layout = plan_reads(spans).layout
    expert = SlabExpert(layout, torch.zeros(layout.nbytes, dtype=torch.uint8))
    assert expert.kernel_expert is None
    assert [cast("Tensor", matrix).shape for matrix in expert] == [(2, 3), (2, 3), (3, 2)]


def same_memory(one: Matrix, other: Matrix) -> bool:
    if isinstance(one, QuantizedMatrix) and isinstance(other, QuantizedMatrix):
        return same_memory(one.values, other.values) and same_memory(one.scales, other.scales)
    first, second = cast("Tensor", one), cast("Tensor", other)
    return first.data_ptr() == second.data_ptr() and first.shape == second.shape
