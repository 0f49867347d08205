"""Memory that is touched before a contender's clock starts."""

from __future__ import annotations

import sys

import pytest

from offload_engine.bench import fresh
from offload_engine.metrics import measure_peak, reset_peak

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="peaks can be reset on Linux alone")
def test_as_much_is_touched_as_was_asked_for_and_given_back() -> None:
    reset_peak()
    before = measure_peak()
    rate = fresh.touch_memory(300 * MIB + 5)
    assert rate is not None
    assert rate > 0
    assert measure_peak() - before == pytest.approx(300 * MIB, rel=0.1)
    reset_peak()
    assert measure_peak() - before < 100 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="peaks can be reset on Linux alone")
def test_no_more_is_touched_than_a_share_of_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh, "available_memory", lambda: 200 * MIB)
    reset_peak()
    before = measure_peak()
    assert fresh.touch_memory(10**15) is not None
    assert measure_peak() - before == pytest.approx(170 * MIB, rel=0.1)


def test_what_can_not_be_touched_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fresh.touch_memory(0) is None
    assert fresh.touch_memory(fresh.PAGE - 1) is None
    monkeypatch.setattr(fresh, "touch", lambda _memory: False)
    assert fresh.touch_memory(fresh.PAGE) is None
    monkeypatch.setattr(fresh, "available_memory", lambda: 2**62)
    assert fresh.touch_memory(2**61) is None
