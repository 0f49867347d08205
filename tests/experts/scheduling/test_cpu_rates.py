"""What copies and CPU experts take: what is learned of it, and what is measured at the start."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.experts.calibration import SLABS, measure_rates
from offload_engine.experts.scheduling.cpu_rates import (
    FASTEST,
    FEWEST,
    HANDOVER,
    SLOWEST,
    STALE_COPIES,
    STALE_LAYERS,
    WINDOW,
    LearnedRates,
    line_through,
    median_seconds,
)
from offload_engine.experts.scheduling.sharing import Rates
from offload_engine.experts.transfer.base import Stream
from tests.experts.test_executor import KINDS, Model
from tests.streams.simulator import SimulatedDevice, WatchedStore

MEASURED = Rates(copy=1.0, expert=2.0, token=0.5, trip=0.25, row=0.125, read=3.0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=150, max_size=200), st.floats(0.2, 5.0))
def test_the_pace_comes_to_what_layers_take(layers: list[tuple[int, int]], pace: float) -> None:
    learned = LearnedRates(MEASURED)
    for experts, tokens in layers:
        learned.learn(experts, tokens, pace * (experts * 2.0 + tokens * 0.5), 0.5)
    assert learned.pace == pytest.approx(pace, rel=1e-3)
    now = learned.now
    assert now.expert == pytest.approx(2.0 * pace, rel=1e-3)
    assert now.token == pytest.approx(0.5 * pace, rel=1e-3)
    assert now.trip == pytest.approx(0.5, rel=1e-3)
    assert (now.copy, now.row, now.read) == (1.0, 0.125, 3.0)


def test_one_layer_that_took_forever_says_little() -> None:
    learned = LearnedRates(MEASURED)
    learned.learn(1, 1, 1e6, 1e6)
    assert learned.pace == learned.errand_pace == 1 + (SLOWEST - 1) / 16
    learned = LearnedRates(MEASURED)
    learned.learn(1, 1, 0.0, 0.0)
    assert learned.pace == learned.errand_pace == 1 + (FASTEST - 1) / 16


def test_of_unknown_rates_nothing_is_learned() -> None:
    learned = LearnedRates(Rates.unknown())
    learned.learn(3, 8, 1.0, 1.0)
    assert learned.now == Rates.unknown()


def test_an_expert_and_its_tokens_are_told_apart() -> None:
    assert line_through((1, 32), (2.5, 18.0)) == (2.0, 0.5)
    assert line_through((1, 32), (2.5, 2.0)) == (2.5, 0.0)
    assert line_through((1, 32), (0.25, 31.25)) == (0.0, 1.0)


def test_the_first_of_several_is_not_counted() -> None:
    clock = iter([0.0, 9.0, 10.0, 11.0, 20.0, 23.0]).__next__
    assert median_seconds([lambda: None] * 3, clock) == 2.0
    assert median_seconds([lambda: None], iter([0.0, 4.0]).__next__) == 4.0


@given(st.floats(0.2, 5.0), st.lists(st.sampled_from([0.0, 1e6]), max_size=7), st.randoms(use_true_random=False))
def test_a_copy_takes_what_most_of_the_last_ones_took(pace: float, odd: list[float], chance: Random) -> None:
    learned, before = LearnedRates(MEASURED), [0.3] * 40
    last = [pace] * (WINDOW - len(odd)) + odd
    chance.shuffle(last)
    learned.observe(before, [3.0 * one for one in before])
    learned.observe(last, [3.0 * one for one in last])
    now = learned.now
    assert (now.copy, now.row, now.read) == pytest.approx((pace, 0.125 * pace, 3.0 * pace))
    assert (now.expert, now.token, now.trip) == (2.0, 0.5, 0.25)


@given(st.lists(st.floats(0, 1e9), max_size=60))
def test_what_copies_take_is_bounded_and_known_once_there_are_some(seconds: list[float]) -> None:
    learned = LearnedRates(MEASURED)
    for one in seconds:
        learned.observe([one], [])
    assert FASTEST <= learned.now.copy <= SLOWEST
    assert len(seconds) >= FEWEST or learned.now == MEASURED


def test_half_of_the_last_copies_make_a_link_slower() -> None:
    learned = LearnedRates(MEASURED)
    learned.observe([1.0] * WINDOW, [])
    learned.observe([4.0] * (WINDOW // 2 - 1), [])
    assert learned.now.copy == 1.0
    learned.observe([4.0] * 2, [])
    assert learned.now.copy == 4.0


def test_a_link_that_nobody_uses_is_tried_again_and_so_is_the_cpu() -> None:
    learned = LearnedRates(MEASURED)
    learned.observe([8.0] * WINDOW, [9.0] * WINDOW)
    for _ in range(STALE_LAYERS - 1):
        learned.learn(1, 2, 6.0, 0.25)
    assert (learned.now.copy, learned.now.read) == (8.0, 9.0)
    assert learned.now.expert > 3.9
    learned.learn(1, 2, 6.0, 0.25)
    assert (learned.now.copy, learned.now.read) == (1.0, 3.0)
    learned.observe([8.0] * STALE_COPIES, [])
    assert (learned.now.copy, learned.now.expert) == (8.0, 2.0)


def test_of_copies_that_were_never_measured_nothing_is_learned() -> None:
    learned = LearnedRates(Rates.unknown())
    learned.observe([1.0] * 20, [1.0] * 20)
    assert learned.now == Rates.unknown()


class Clock:
    """Time passes with what a device and a store are asked to do, and with nothing else."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def taking(self, seconds: Callable[..., float], call: Callable[..., object]) -> Callable[..., object]:
        def timed(*arguments: object) -> object:
            self.now += seconds(*arguments)
            return call(*arguments)

        return timed


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16-int4"])
def test_rates_are_those_of_the_device_and_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model, clock, device = Model(tmp_path, *KINDS[kind]), Clock(), SimulatedDevice([1, 0, 2])
    store, slot = WatchedStore(model.store, device), device.allocate(model.store.slab_bytes)
    read = clock.taking(lambda *_: 7.0, store.read)
    monkeypatch.setattr(store, "read", read)
    copied = itertools.count()

    def copying(stream: Stream, source: torch.Tensor, _target: torch.Tensor) -> float:
        next(copied)
        return source.numel() / slot.numel()

    monkeypatch.setattr(device, "copy", clock.taking(copying, device.copy))
    monkeypatch.setattr(device, "fetch", clock.taking(lambda *_: 0.5, device.fetch))
    rates = measure_rates(device, store, slot, model.dtype, clock)  # type: ignore[arg-type]
    device.check()
    row = model.config.hidden_size * model.dtype.itemsize
    assert (rates.copy, rates.read) == (1.0, 7.0)
    assert rates.trip == pytest.approx(0.5 + row / slot.numel() + HANDOVER)
    assert rates.row == row / slot.numel()
    assert (rates.expert, rates.token) == (0.0, 0.0), "this clock stands still while the CPU computes"
    assert next(copied) == 2 * SLABS
    assert not device._pinned
