"""Interrupts while experts are being run: no slot is lost, nothing waits for ever, the next answer is exact."""

from __future__ import annotations

import threading
from typing import Any
from unittest import mock

import pytest
import torch

from offload_engine.experts.transfer.base import TransferTicket
from tests.experts.test_executor import Model
from tests.interrupts import Interrupt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"), torch.bfloat16)


def in_experts(path: str) -> bool:
    return "offload_engine/experts/" in path


def interrupted_everywhere(model: Model, slots: int, every: int, first: int) -> tuple[int, set[str]]:
    """Interrupt a forward at every so-manieth point; returns how often, and where."""
    experts = model.offloaded(slots, "next-use", "combined")
    ids = torch.arange(12)
    wanted = model.hidden(model.resident, "dmoe", ids)
    prefill = torch.arange(32) % 90
    cached = model.prefilled(model.resident, "dmoe", prefill, 2)
    places, at = set(), first

    def forwards() -> None:
        assert torch.equal(model.prefilled(experts, "dmoe", prefill, 2), cached)
        assert torch.equal(model.hidden(experts, "dmoe", ids), wanted)

    try:
        while True:
            interrupt = Interrupt(in_experts, at)
            try:
                with interrupt.armed():
                    forwards()
            except KeyboardInterrupt:
                places.add(interrupt.place)
            else:
                break
            experts.idle(timeout=20)
            forwards()
            at += every
        assert interrupt.passed <= at
        experts.idle(timeout=20)
    finally:
        experts.close()
    return at // every, places


@pytest.mark.parametrize("slots", [3, 6, 40])
def test_an_interrupt_anywhere_leaves_the_engine_usable_and_exact(model: Model, slots: int) -> None:
    times, places = interrupted_everywhere(model, slots, every=397, first=slots)
    assert times > 10
    assert len(places) > 10


@pytest.mark.parametrize("queued", [False, True])
def test_an_interrupt_between_scheduling_a_load_and_queueing_it_leaves_no_ghost(model: Model, queued: bool) -> None:
    experts = model.offloaded(slots=6, predictor="previous-step")
    copy, calls = experts.transfers.copy, iter(range(10**6))

    def interrupted(*arguments: Any) -> TransferTicket:
        mine = threading.current_thread() is threading.main_thread()  # signals come to no other
        if mine and next(calls) % 5 == 1:
            if queued:
                copy(*arguments)
            raise KeyboardInterrupt
        return copy(*arguments)

    expected = model.hidden(model.resident, "dmoe", torch.arange(12))
    for _ in range(4):
        with mock.patch.object(experts.transfers, "copy", interrupted), pytest.raises(KeyboardInterrupt):
            model.hidden(experts, "dmoe", torch.arange(12))
        experts.idle(timeout=20)
        assert torch.equal(model.hidden(experts, "dmoe", torch.arange(12)), expected)
    experts.close()


def test_a_second_interrupt_while_the_first_is_seen_to_is_made_good_by_the_next_forward(model: Model) -> None:
    experts = model.offloaded(slots=6)
    want = experts.scheduler.want

    def interrupted(*arguments: Any) -> list[Any]:
        want(*arguments)
        raise KeyboardInterrupt

    with (
        mock.patch.object(experts.scheduler, "want", interrupted),
        mock.patch.object(experts, "_start_over", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        model.hidden(experts, "dmoe", torch.arange(12))
    expected = model.hidden(model.resident, "dmoe", torch.arange(12))
    assert torch.equal(model.hidden(experts, "dmoe", torch.arange(12)), expected)
    experts.idle(timeout=20)
    experts.close()
