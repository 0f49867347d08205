"""`ExpertCache.resize`: conserved slots, the right victims, moves that lose nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.errors import InternalError
from offload_engine.experts.scheduling.cache import ExpertCache, SlotState
from offload_engine.experts.scheduling.eviction import EVICTION, LRU, make_eviction
from offload_engine.experts.scheduling.scheduler import ExpertScheduler


def key(number: int) -> ExpertKey:
    return ExpertKey(1, number)


def fill(cache: ExpertCache, number: int, *, prefetch: bool = False) -> None:
    assert cache.reserve(key(number), prefetch=prefetch) is not None
    cache.loaded(key(number))


def contents(cache: ExpertCache) -> dict[ExpertKey, int | None]:
    return {one: cache.slot(one) for one in cache.resident_keys()}


@given(
    name=st.sampled_from(sorted(EVICTION)),
    before=st.integers(1, 12),
    numbers=st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=30),
    after=st.lists(st.integers(1, 14), min_size=1, max_size=5),
)
def test_bytes_follow_their_experts(name: str, before: int, numbers: list[tuple[int, bool]], after: list[int]) -> None:
    cache = ExpertCache(before, make_eviction(name), probation_share=0.5)
    for number, prefetch in numbers:
        if cache.state(key(number)) is SlotState.FREE and cache.reserve(key(number), prefetch=prefetch) is not None:
            cache.loaded(key(number))
    memory = {slot: one for one, slot in contents(cache).items()}
    for slots in after:
        held = set(cache.resident_keys())
        resized = cache.resize(slots)
        cache.check()
        for source, target in resized.moves:
            assert source >= slots > target
            memory[target] = memory[source]
        assert set(cache.resident_keys()) == held - set(resized.evicted)
        assert len(resized.evicted) == max(0, len(held) - slots)
        assert all(memory[slot] == one for one, slot in contents(cache).items() if slot is not None)
        assert cache.probation_limit == slots // 2


def test_the_policy_names_who_goes_and_probationers_go_first() -> None:
    cache = ExpertCache(4, LRU(), probation_share=0.5)
    for number in range(3):
        fill(cache, number)
    fill(cache, 3, prefetch=True)
    cache.use(key(0), 1.0)
    assert cache.resize(2).evicted == (key(3), key(1))
    assert set(cache.resident_keys()) == {key(0), key(2)}


def test_who_is_loading_or_pinned_is_not_resized_around() -> None:
    cache = ExpertCache(3, LRU())
    assert cache.reserve(key(0), prefetch=False) is not None
    with pytest.raises(InternalError, match="3 slots were to become 2"):
        cache.resize(2)
    cache.loaded(key(0))
    cache.pin(key(0))
    with pytest.raises(InternalError):
        cache.resize(2)
    cache.unpin(key(0))
    with pytest.raises(InternalError, match="become 0"):
        cache.resize(0)
    assert cache.resize(2).evicted == ()


def test_the_scheduler_counts_evictions_and_refuses_while_anything_moves() -> None:
    scheduler = ExpertScheduler(ExpertCache(4, LRU(), probation_share=0.5))
    scheduler.predict([key(0), key(1)])
    with pytest.raises(InternalError, match="2 on their way"):
        scheduler.resize(2)
    scheduler.arrived(key(0))
    scheduler.arrived(key(1))
    assert scheduler.resize(1) == ((1, 0),)
    assert (scheduler.counters.evictions, scheduler.counters.prefetches_wasted) == (1, 1)
