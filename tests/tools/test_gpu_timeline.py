"""The arithmetic of a timeline, and what is recorded, with a clock that ticks whenever an event is marked."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import DeviceError, InternalError
from offload_engine.experts.transfer.base import Stream
from tests.checkpoints import tiny_config, write_checkpoint
from tools.gpu_timeline import Recorder, Stretch, common, drawing, length, main, measure, summarise, union, watched

stretches_of = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), max_size=12).map(
    lambda pairs: [Stretch("copy", began, began + long) for began, long in pairs]
)


def cells(spans: Any) -> set[int]:
    """The whole milliseconds that are covered."""
    return {cell for began, ended in spans for cell in range(int(began), int(ended))}


@given(one=stretches_of, other=stretches_of)
def test_unions_and_what_they_share(one: list[Stretch], other: list[Stretch]) -> None:
    first, second = union(one), union(other)
    assert cells(first) == cells((each.began, each.ended) for each in one)
    assert length(first) == len(cells(first)), "nothing is counted twice"
    assert cells(common(first, second)) == cells(first) & cells(second)
    assert length(common(first, second)) == len(cells(first) & cells(second))


SEEN = [
    Stretch("copy", 0, 5, 10**6),  # of the prefill
    Stretch("forward", 10, 30),
    Stretch("attention", 10, 14),
    Stretch("experts", 16, 20),
    Stretch("copy", 12, 18, 2 * 10**6),
    Stretch("copy", 18, 19, 10**6),
    Stretch("forward", 40, 50),
    Stretch("attention", 40, 45),
    Stretch("copy", 45, 50, 10**6),
    Stretch("stall", 46, 50),
]


def test_a_summary_is_of_the_time_between_the_first_forward_and_the_last() -> None:
    summary = summarise(SEEN)
    assert (summary.forwards, summary.wall_ms, summary.copies, summary.copied_bytes) == (2, 40, 3, 4 * 10**6)
    assert (summary.copy_ms, summary.attention_ms, summary.experts_ms) == (12, 9, 4)
    assert summary.copy_beside_attention_ms == 2
    assert summary.copy_beside_compute_ms == 5
    assert summary.gigabytes_per_second == pytest.approx(4 / 12)
    lines = list(summary.lines())
    assert "3 copies, 4.0 MB in 12.0 ms, 0.3 GB/s" in lines
    assert "beside attention: 2.0 ms, 17% of the copies' time" in lines
    assert summary.stall_ms == 4
    assert "attention 9.0 ms, experts 4.0 ms; stalled 4.0 ms, 10% of the time" in lines


def test_without_copies_or_forwards() -> None:
    summary = summarise([Stretch("forward", 0, 5), Stretch("attention", 0, 5)])
    assert summary.gigabytes_per_second is None
    assert "beside compute: 0.0 ms, there was nothing to hide" in summary.lines()
    with pytest.raises(InternalError, match="no forward was recorded"):
        summarise([Stretch("copy", 0, 5)])


def test_a_drawing_shows_the_last_forward() -> None:
    assert drawing(SEEN, columns=10) == [
        "     copy .....#####",
        "attention #####.....",
        "  experts ..........",
        "    stall ......####",
    ]
    assert drawing([*SEEN, Stretch("experts", 49.8, 60)], columns=10)[2] == "  experts .........+"


class Clock:
    """Stands in for the device's: a stream runs at once, and every mark is a millisecond later."""

    def __init__(self) -> None:
        self.ticks = itertools.count()

    def event(self) -> Any:
        clock = self

        class Event:
            def record(self, _stream: Any) -> None:
                self.at = next(clock.ticks)

            def elapsed_time(self, other: Event) -> float:
                return float(other.at - self.at)

        return Event()


class Driver:
    def __init__(self) -> None:
        self.done: list[str] = []

    def stream(self, stream: Stream) -> str:
        return str(stream)

    def copy(self, _stream: Stream, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)
        self.done.append("copy")

    def launch(self, _stream: Stream, work: Any, *_slots: Any) -> None:
        work()
        self.done.append("launch")


class Stalls:
    """As `DeviceStalls`."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def end(self) -> None:
        self.calls.append("end")

    def forget(self) -> None:
        self.calls.append("forget")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("timeline"), tiny_config())


def test_copies_launches_attention_and_forwards_are_recorded_while_watched(checkpoint: Path) -> None:
    driver, recorder = Driver(), Recorder(Clock().event)
    transfers = SimpleNamespace(driver=driver, stalls=Stalls())
    copy = driver.copy
    with Engine.from_pretrained(checkpoint, gpu_mem="3GB") as engine:
        model = engine._parts.model
        with watched(transfers, model, recorder):
            driver.copy(Stream.COPY, torch.ones(12), torch.empty(12))
            driver.launch(Stream.COMPUTE, lambda: None, [], [])
            stalls = transfers.stalls
            for call in (stalls.begin, stalls.begin, stalls.end, stalls.end, stalls.begin, stalls.forget, stalls.end):
                call()
            done = engine.generate([1, 2, 3], SamplingParams(max_new_tokens=32, steps=4))
        seen = recorder.stretches()
        assert driver.copy == copy, "nothing is left behind"
        engine.generate([1, 2, 3], SamplingParams(max_new_tokens=32, steps=4))
        assert len(recorder.stretches()) == len(seen)
    assert driver.done == ["copy", "launch"]
    assert transfers.stalls.calls == ["begin", "begin", "end", "end", "begin", "forget", "end"]
    assert seen[:3] == [Stretch("copy", 1, 2, 48), Stretch("experts", 3, 4), Stretch("stall", 5, 6)]
    assert sum(one.kind == "stall" for one in seen) == 1
    forwards = [one for one in seen if one.kind == "forward"]
    assert len(forwards) >= done.stats.denoise_steps > 0
    attention = [one for one in seen if one.kind == "attention"]
    assert len(attention) == 3 * len(forwards), "one per layer, each within its forward"
    assert all(any(whole.began < one.began < one.ended < whole.ended for whole in forwards) for one in attention)


def test_a_body_that_fails_is_recorded_all_the_same() -> None:
    recorder = Recorder(Clock().event)
    recorder.begin("compute")
    with pytest.raises(RuntimeError), recorder.around("copy", "copy"):
        raise RuntimeError
    assert recorder.stretches() == [Stretch("copy", 1, 2)]


def test_an_engine_on_the_cpu_has_no_timeline(checkpoint: Path) -> None:
    with (
        Engine.from_pretrained(checkpoint, gpu_mem="3GB") as engine,
        pytest.raises(DeviceError, match="a timeline needs device cuda"),
    ):
        measure(engine, 1, 8)


def test_the_command_says_so_in_one_line(checkpoint: Path) -> None:
    ran = CliRunner().invoke(main, ["--model", str(checkpoint), "--device", "cpu", "--gpu-mem", "3GB"])
    assert ran.exit_code != 0
    assert ran.stderr.strip().splitlines()[-1].startswith("error: the engine runs on the CPU")
