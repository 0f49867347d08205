"""Interrupts while work is on the streams: the next answer is exact, and what is copied then comes after it all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from offload_engine.experts.executor import OffloadedExperts
from tests.experts.test_executor import Model
from tests.experts.test_interrupted_executor import interrupted_everywhere
from tests.streams.engines import on_device
from tests.streams.order import Fault
from tests.streams.simulator import SimulatedDevice


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize(("slots", "order"), [(3, [0]), (6, [2, 0, 1]), (40, [0])])
def test_an_interrupt_anywhere_leaves_the_streams_in_order(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, slots: int, order: list[int], emulated: bool
) -> None:
    model, devices = Model(tmp_path, torch.bfloat16), []

    def offloaded(_model: Model, slots: int, eviction: str, predictor: str) -> OffloadedExperts:
        devices.append(SimulatedDevice(order))
        return on_device(devices[-1], model.store, slots, eviction=eviction, predictor=predictor, emulated=emulated)

    monkeypatch.setattr(Model, "offloaded", offloaded)
    times, places = interrupted_everywhere(model, slots, every=797, first=slots)
    assert times > 5
    assert len(places) > 3
    (device,) = devices
    assert set(device.faults) <= {Fault.LEAK}, "an event that nobody has taken note of goes with its object"
