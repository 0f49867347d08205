"""Spans of a stream's time: their lengths, their order, and the events that mark them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.experts.transfer.base import Stream
from offload_engine.experts.transfer.spans import Spans
from tests.streams.order import Fault
from tests.streams.simulator import SimulatedDevice, StreamError

LAUNCH = 2.0
COMPUTE = Stream.COMPUTE


def device(order: tuple[int, ...] = (0,)) -> SimulatedDevice:
    """One that takes as long for every launch; by itself it does nothing before the host waits."""
    made = SimulatedDevice(order)
    made.takes = 0.0, LAUNCH
    return made


def launch(where: SimulatedDevice, times: int) -> None:
    for _ in range(times):
        where.launch(COMPUTE, lambda: None, [], [])


def test_a_span_is_told_of_once_it_is_over_and_once() -> None:
    gpu = device()
    spans = Spans(gpu, COMPUTE)
    launch(gpu, 5)
    began = spans.mark()
    assert len(spans) == 0
    launch(gpu, 3)
    spans.end(began)
    launch(gpu, 1)
    assert (len(spans), spans.over()) == (1, []), "the device has done nothing yet"
    gpu.finish()
    assert len(spans) == 1
    assert spans.over() == [3 * LAUNCH]
    assert (len(spans), spans.over()) == (0, [])
    spans.close()
    gpu.check()


def test_another_stream_is_another_matter() -> None:
    gpu = device()
    spans = Spans(gpu, Stream.COPY)
    began = spans.mark()
    launch(gpu, 3)
    spans.end(began)
    gpu.finish()
    assert spans.over() == [0.0]
    spans.close()
    gpu.check()


def test_who_began_first_need_not_end_first() -> None:
    gpu = device()
    spans = Spans(gpu, COMPUTE)
    outer = spans.mark()
    launch(gpu, 1)
    inner = spans.mark()
    launch(gpu, 1)
    spans.end(inner)
    launch(gpu, 2)
    spans.end(outer)
    gpu.finish()
    assert spans.over() == [LAUNCH, 4 * LAUNCH]
    spans.close()
    gpu.check()


@given(
    begun=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.booleans()), max_size=30),
    order=st.lists(st.integers(0, 7), min_size=1, max_size=12),
)
def test_in_whatever_order_the_device_works_lengths_are_exact_and_events_used_again(
    begun: list[tuple[int, bool, bool]], order: list[int]
) -> None:
    """Each with so many launches within, with an end or dropped, and looked at afterwards or not."""
    gpu = device(tuple(order))
    spans = Spans(gpu, COMPUTE)
    expected, told, most = [], [], 0
    for launches, ends, asked in begun:
        began = spans.mark()
        launch(gpu, launches)
        if ends:
            spans.end(began)
            expected.append(launches * LAUNCH)
        else:
            spans.drop(began)
        most = max(most, 2 * len(spans) + (not ends))
        if asked:
            told += spans.over()
        assert told == expected[: len(told)]
        assert len(told) + len(spans) == len(expected)
    assert len(gpu.events) == most, "as many as were needed at once"
    assert all(event.timed for event in gpu.events)
    gpu.finish()
    assert told + spans.over() == expected
    spans.close()
    spans.close()
    gpu.check()


def test_close_gives_back_what_is_begun_under_way_and_free() -> None:
    gpu = device()
    spans = Spans(gpu, COMPUTE)
    for _ in range(2):
        spans.end(spans.mark())
    gpu.finish()
    spans.over()
    spans.end(spans.mark())
    spans.mark()
    gpu.finish()
    with pytest.raises(StreamError, match=str(Fault.LEAK)):
        gpu.check()
    gpu.faults.clear()
    spans.close()
    assert all(event.closed for event in gpu.events)
    assert (len(spans), spans.over()) == (0, [])
    gpu.check()
