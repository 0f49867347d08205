"""The slot table as the host keeps it: an expert stands in it from its landing until its slot is given away."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.experts.device.table import ABSENT, SlotTable
from tests.streams.simulator import SimulatedDevice

EXPERTS = {1: 4, 5: 3}


def table(slots: int = 3) -> SlotTable:
    return SlotTable(SimulatedDevice(), EXPERTS, slots)


def test_every_layer_has_a_row_of_its_own_on_the_device() -> None:
    rows = table()
    first, second = rows.on_device(1), rows.on_device(5)
    assert (first.numel(), second.numel()) == (16, 12)
    assert first.data_ptr() + 16 == second.data_ptr()
    assert first.view(torch.int32).tolist() == [-1] * 4


def test_an_expert_is_entered_when_it_has_landed_and_not_before() -> None:
    rows = table()
    rows.fill(ExpertKey(1, 2), 0)
    assert rows.settle(1, lambda _slot: False).tolist() == [ABSENT] * 4
    asked: list[int] = []
    assert rows.settle(1, lambda slot: not asked.append(slot)).tolist() == [ABSENT, ABSENT, 0, ABSENT]
    assert asked == [0]
    assert rows.settle(5, lambda _slot: True).tolist() == [ABSENT] * 3


def test_a_row_is_stale_until_it_is_sent_and_again_once_it_changes() -> None:
    rows = table()
    assert rows.is_stale(1)
    rows.sent(1)
    rows.fill(ExpertKey(1, 2), 0)
    assert not rows.is_stale(1), "it is not known to have landed"
    rows.settle(1, lambda _slot: True)
    assert rows.is_stale(1)
    rows.sent(1)
    rows.settle(1, lambda _slot: True)
    assert not rows.is_stale(1)
    rows.clear(0)
    assert rows.is_stale(1)
    assert rows.is_stale(5)


def test_who_is_evicted_before_it_was_entered_is_never_entered() -> None:
    rows = table()
    rows.fill(ExpertKey(1, 2), 0)
    rows.clear(0)
    assert rows.settle(1, lambda _slot: True).tolist() == [ABSENT] * 4


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from([ExpertKey(layer, expert) for layer in EXPERTS for expert in range(3)]), st.booleans()
        )
    )
)
def test_the_rows_are_what_the_slots_hold(events: list[tuple[ExpertKey, bool]]) -> None:
    rows, held = table(), dict[int, ExpertKey]()
    for number, (key, settled) in enumerate(events):
        if key not in held.values():
            slot = number % 3
            rows.clear(slot)
            held.pop(slot, None)
            rows.fill(key, slot)
            held[slot] = key
        if settled:
            for layer, count in EXPERTS.items():
                wanted = [ABSENT] * count
                for slot, (of, expert) in held.items():
                    if of == layer:
                        wanted[expert] = slot
                assert rows.settle(layer, lambda _slot: True).tolist() == wanted
    rows.reset()
    assert all((rows.settle(layer, lambda _slot: True) == ABSENT).all() for layer in EXPERTS)
