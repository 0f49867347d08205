from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ForwardInfo, Phase
from offload_engine.simulate.forwards import ForwardRun, LayerRun, Size
from offload_engine.simulate.timing import LAUNCHES, Timing
from tests.simulate.trace_data import SHAPE, machine

RUN = LayerRun(1, (0, 1, 2, 3), (4.0, 3.0, 2.0, 1.0))
STEP = ForwardRun(ForwardInfo(Phase.DENOISE), [RUN, RUN], size=Size(tokens=8, positions=20, masked=4))


def test_a_kernel_takes_the_longer_of_memory_and_arithmetic() -> None:
    timing = Timing(SHAPE, machine(memory_bandwidth=10.0, memory_efficiency=0.5, compute=100.0, compute_efficiency=0.1))
    assert timing.kernel(nbytes=50, flops=20, launches=0) == 10.0
    assert timing.kernel(nbytes=5, flops=20, launches=0) == 2.0


def test_without_overlap_they_add_up() -> None:
    slow = machine(memory_bandwidth=10.0, compute=10.0, launch=0.25, overlap=0.0)
    assert Timing(SHAPE, slow).kernel(nbytes=50, flops=20, launches=4) == 5.0 + 2.0 + 1.0
    assert Timing(SHAPE, slow.with_values("half", overlap=0.5)).kernel(50, 20, 4) == 6.0 + 0.5


def test_experts_by_hand() -> None:
    """8 tokens x top-2 over 4 experts: 4 tokens each, 3 matrices of 10 x 10."""
    memory = Timing(SHAPE, machine(memory_bandwidth=100.0, compute=1e9))
    assert memory.experts(STEP, RUN, 3) == pytest.approx(3 * 600 / 100)
    arithmetic = Timing(SHAPE, machine(memory_bandwidth=1e9, compute=100.0))
    assert arithmetic.experts(STEP, RUN, 3) == pytest.approx(3 * 4 * 2 * 300 / 100)
    host = Timing(SHAPE, machine(memory_bandwidth=1e9, compute=1e9, expert=2.0, launch=1.0))
    assert host.experts(STEP, RUN, 3) == 6.0
    assert host.experts(STEP, RUN, 1) == LAUNCHES["experts"]


def test_attention_by_hand() -> None:
    """Projections 10 x (2 x 10 + 2 x 5) weights of 2 bytes; keys and values of 20 positions x 5, 2 bytes."""
    timing = Timing(SHAPE, machine(memory_bandwidth=1.0, compute=1e12))
    assert timing.attention(STEP) == 300 * 2 + 2 * 20 * 5 * 2
    timing = Timing(SHAPE, machine(memory_bandwidth=1e12, compute=1.0))
    assert timing.attention(STEP) == 2 * 8 * 300 + 4 * 8 * 20 * 10


def test_a_prefill_has_no_head_and_an_attention_without_experts() -> None:
    timing = Timing(SHAPE, machine(memory_bandwidth=1.0, compute=1e12))
    prefill = ForwardRun(ForwardInfo(Phase.PREFILL), [RUN], size=Size(tokens=8, positions=20))
    assert timing.end(prefill) == timing.attention(prefill)
    assert timing.end(STEP) == 10 * 100 * 2 + 2 * 4 * 100 * 4


def test_links() -> None:
    fast = machine(link_bandwidth=300.0, link_efficiency=0.5, pageable_bandwidth=60.0, disk_bandwidth=30.0)
    timing = Timing(SHAPE, fast)
    assert (timing.link_seconds(), timing.link_seconds(pinned=False), timing.disk_seconds()) == (4.0, 10.0, 20.0)
    assert Timing(SHAPE, machine("cpu")).link_seconds() == math.inf


@given(st.floats(1, 1e6), st.floats(1, 1e6), st.floats(0, 1), st.integers(0, 9), st.floats(1, 100))
def test_a_faster_machine_is_never_slower(
    nbytes: float, flops: float, overlap: float, launches: int, factor: float
) -> None:
    slow = machine(memory_bandwidth=5.0, compute=7.0, launch=0.5, overlap=overlap)
    times = Timing(SHAPE, slow).kernel(nbytes, flops, launches)
    for name, value in (("memory_bandwidth", 5.0 * factor), ("compute", 7.0 * factor), ("launch", 0.5 / factor)):
        faster = Timing(SHAPE, slow.with_values("a wish", **{name: value})).kernel(nbytes, flops, launches)
        assert faster <= times * (1 + 1e-12)
