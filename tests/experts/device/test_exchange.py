"""A row to the device and a record back: what is read is what was packed, and no memory is written too early."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offload_engine.core import RoutingDecision
from offload_engine.experts.device.exchange import FIRST_ROOM
from offload_engine.experts.device.record import Record
from offload_engine.experts.transfer.base import Stream
from tests.streams.engines import WatchedExchange
from tests.streams.order import Fault
from tests.streams.simulator import SimulatedDevice

ORDERS = [(0,), (1, 0, 2), (7,)]


def closed(exchange: WatchedExchange, device: SimulatedDevice) -> None:
    device.finish()
    exchange.close()
    exchange.close()
    device.check()


@pytest.mark.parametrize("pinning", [None, "no pages left to lock"])
@pytest.mark.parametrize("order", ORDERS)
def test_what_was_packed_comes_back(order: tuple[int, ...], pinning: str | None) -> None:
    device = SimulatedDevice(order, pinning)
    exchange, row = WatchedExchange(device), device.allocate(16)
    for value in range(3):
        exchange.begin()
        exchange.send(bytes([value] * 16), row)
        one = torch.full((2,), value, dtype=torch.int32)
        exchange.bring(0, 24, lambda one=one: [one, row.view(torch.int64)], [row])  # type: ignore[misc]
        found = exchange.rest()
        assert found[:8].view(torch.int32).tolist() == [value] * 2
        assert found[8:].tolist() == [value] * 16
    closed(exchange, device)


@pytest.mark.parametrize("order", ORDERS)
def test_the_first_part_comes_before_the_second(order: tuple[int, ...]) -> None:
    device = SimulatedDevice(order)
    exchange = WatchedExchange(device)
    for front in (8, 0, 4):
        exchange.begin()
        exchange.bring(front, 6, lambda front=front: [torch.arange(front + 6).to(torch.uint8)])  # type: ignore[misc]
        if front:
            assert exchange.front().tolist() == list(range(front))
            if order == (0,):
                assert not exchange.landed()
        device.finish()
        assert exchange.landed()
        assert exchange.rest().tolist() == list(range(front, front + 6))
    closed(exchange, device)


def broken_off(device: SimulatedDevice) -> WatchedExchange:
    exchange, row = WatchedExchange(device), device.allocate(16)
    exchange.begin()
    exchange.send(b"\x01" * 16, row)
    exchange.bring(0, 16, lambda: [row], [row])
    return exchange


@pytest.mark.parametrize("order", ORDERS)
def test_an_exchange_that_was_broken_off_is_waited_for(order: tuple[int, ...]) -> None:
    device = SimulatedDevice(order)
    exchange, row = broken_off(device), device.allocate(16)
    exchange.begin()
    exchange.send(b"\x02" * 16, row)
    exchange.bring(0, 16, lambda: [row], [row])
    assert exchange.rest().tolist() == [2] * 16
    closed(exchange, device)


def test_that_wait_is_what_keeps_the_memory_apart() -> None:
    device = SimulatedDevice()
    exchange = broken_off(device)
    exchange._under_way = False
    exchange.begin()
    exchange.send(b"\x02" * 16, device.allocate(16))
    assert Fault.STAGING in device.faults


def test_a_record_larger_than_any_before_finds_room() -> None:
    device = SimulatedDevice()
    exchange = WatchedExchange(device)
    large = torch.arange(FIRST_ROOM).to(torch.uint8)
    for piece in (large, torch.cat([large, large]), large[:10]):
        exchange.begin()
        exchange.bring(0, piece.numel(), lambda piece=piece: [piece], [])  # type: ignore[misc]
        assert torch.equal(exchange.rest(), piece)
    closed(exchange, device)


@pytest.mark.parametrize("scores", [None, torch.rand(2, 6)])
@pytest.mark.parametrize("slots", [None, torch.tensor([3, -1, -2, 0, -2, 7], dtype=torch.int32)])
def test_a_record_is_read_as_it_was_made(scores: Tensor | None, slots: Tensor | None) -> None:
    chosen = torch.tensor([[4, 0, -1], [5, 1, 3]])
    decision = RoutingDecision(chosen, torch.rand(2, 3), torch.rand(2, 6) > 0.5, scores)
    record = Record(decision, 0 if slots is None else 6)
    raw = torch.cat([piece.flatten().view(torch.uint8) for piece in record.pieces(slots)])
    assert raw.numel() == record.nbytes
    assert (record.front > 0) == (slots is not None)
    found = record.read(raw[record.front :].clone())
    assert torch.equal(found.decision.experts, chosen)
    assert found.decision.weights is decision.weights
    assert found.decision.coreset is decision.coreset
    assert (found.decision.block_scores is None) == (scores is None)
    assert scores is None or torch.equal(found.decision.block_scores, scores)  # type: ignore[arg-type]
    assert (found.slots is None) == (slots is None)
    assert slots is None or torch.equal(found.slots, slots)  # type: ignore[arg-type]


def test_the_streams_of_an_exchange_are_the_compute_stream_alone() -> None:
    device = SimulatedDevice()
    exchange = broken_off(device)
    assert not device._queues[Stream.COPY]
    assert exchange.rest().tolist() == [1] * 16
    closed(exchange, device)
