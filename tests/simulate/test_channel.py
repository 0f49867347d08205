from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import LRU
from offload_engine.simulate.channel import Channel, Direct, Tiered, Transfers


def key(expert: int) -> ExpertKey:
    return ExpertKey(1, expert)


def drained(transfers: Transfers) -> list[tuple[float, int]]:
    arrived = []
    while transfers.next_event() is not None:
        at, landed = transfers.advance()
        if landed is not None:
            arrived.append((at, landed.expert))
    return arrived


def test_latency_overlaps_what_is_under_way() -> None:
    channel = Channel(seconds=2.0, latency=0.5)
    assert [channel.take(0.0), channel.take(0.0), channel.take(10.0)] == [2.5, 4.5, 12.5]
    assert channel.busy == 6.0


def test_direct_loads_arrive_in_their_order() -> None:
    transfers = Direct(Channel(1.0))
    for expert in (3, 1, 2):
        transfers.begin(key(expert), 0.0)
    assert drained(transfers) == [(1.0, 3), (2.0, 1), (3.0, 2)]
    assert transfers.busy == 3.0


def test_the_host_tier_is_a_pipeline() -> None:
    """Disk 4 each, link 1 each: the second is read while the first is copied, and a hit overtakes both."""
    host = ExpertCache(3, LRU())
    host.reserve(key(9), prefetch=False)
    host.loaded(key(9))
    transfers = Tiered(Channel(4.0), Channel(1.0), host)
    for expert in (1, 2, 9):
        transfers.begin(key(expert), 0.0)
    assert drained(transfers) == [(1.0, 9), (5.0, 1), (9.0, 2)]
    assert (transfers.disk_loads, transfers.busy) == (2, 3.0)
    transfers.begin(key(1), 20.0)
    assert drained(transfers) == [(21.0, 1)], "it is on the host now"


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 5)), max_size=40), st.integers(2, 5))
def test_a_host_tier_keeps_its_books(loads: list[tuple[int, float]], slots: int) -> None:
    """Two at a time, as the scheduler has it: whatever comes, each arrives once and nothing stays pinned."""
    host = ExpertCache(slots, LRU())
    transfers = Tiered(Channel(3.0, 0.5), Channel(1.0, 0.25), host)
    now, waiting, arrived = 0.0, set(), 0
    for expert, pause in loads:
        now += pause
        while transfers.next_event() is not None and (len(waiting) == 2 or key(expert) in waiting):
            at, landed = transfers.advance()
            now = max(now, at)
            waiting.discard(landed)
            arrived += landed is not None
        transfers.begin(key(expert), now)
        waiting.add(key(expert))
    arrived += len(drained(transfers))
    assert arrived == len(loads)
    host.check()
    assert host.occupancy().pinned == host.occupancy().loading == 0
