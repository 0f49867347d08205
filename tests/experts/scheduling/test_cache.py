from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from offload_engine.core import ExpertKey
from offload_engine.errors import InternalError
from offload_engine.experts.scheduling.cache import ExpertCache, Occupancy, Reservation, SlotState
from offload_engine.experts.scheduling.eviction import EVICTION, EvictionPolicy, make_eviction

FREE, LOADING, RESIDENT = SlotState.FREE, SlotState.LOADING, SlotState.RESIDENT
KEYS = [ExpertKey(layer, expert) for layer in (1, 2) for expert in range(4)]
A, B, C, D, E, F = KEYS[:6]


def make(slots: int, policy: str = "lru", share: float = 0.25) -> ExpertCache:
    return ExpertCache(slots, make_eviction(policy), share)


def bring(cache: ExpertCache, *keys: ExpertKey, prefetch: bool = False) -> list[ExpertKey | None]:
    """Load each key; returns what each evicted."""
    evicted = []
    for key in keys:
        reservation = cache.reserve(key, prefetch=prefetch)
        assert reservation is not None
        cache.loaded(key)
        evicted.append(reservation.evicted)
    return evicted


def test_the_life_of_a_slot() -> None:
    cache = make(2)
    assert cache.state(A) is FREE
    assert cache.reserve(A, prefetch=False) == Reservation(0, None)
    assert (cache.state(A), cache.slot(A)) == (LOADING, None)
    cache.loaded(A)
    assert (cache.state(A), cache.slot(A)) == (RESIDENT, 0)
    assert bring(cache, B, C) == [None, A]
    assert cache.state(A) is FREE
    assert (cache.slot(B), cache.slot(C)) == (1, 0)
    assert cache.resident_keys() == [C, B]


def test_what_has_a_slot_is_held_loading_or_resident() -> None:
    cache = make(3)
    assert cache.held(KEYS) == []
    bring(cache, C)
    cache.reserve(A, prefetch=True)
    assert cache.held(KEYS) == [A, C]
    assert cache.held([C, B]) == [C]
    cache.failed(A)
    assert cache.held(KEYS) == [C]


def test_a_cache_shrinks_to_the_slots_that_are_there() -> None:
    cache = make(8, share=0.5)
    bring(cache, A, B)
    with pytest.raises(InternalError, match="shrink to 1"):
        cache.shrink(1)
    cache.check()
    cache.shrink(3)
    cache.check()
    assert (cache.slots, cache.probation_limit, cache.has_free) == (3, 1, True)
    assert bring(cache, C, D) == [None, A]
    cache.reset({})
    cache.check()
    assert cache.occupancy().free == 3


def test_a_failed_load_gives_its_slot_back() -> None:
    cache = make(1)
    cache.reserve(A, prefetch=True)
    cache.failed(A)
    assert cache.state(A) is FREE
    assert cache.occupancy() == Occupancy(free=1, loading=0, resident=0, probation=0, pinned=0)
    assert bring(cache, B) == [None]


def test_what_loads_or_is_pinned_stays() -> None:
    cache = make(2)
    bring(cache, A)
    cache.reserve(B, prefetch=False)
    cache.pin(A)
    cache.pin(A)
    for prefetch in (False, True):
        assert cache.reserve(C, prefetch=prefetch) is None
    cache.unpin(A)
    assert cache.reserve(C, prefetch=False) is None
    cache.unpin(A)
    assert cache.reserve(C, prefetch=False) == Reservation(0, A)


def test_of_a_layer_that_is_lent_nothing_is_evicted() -> None:
    cache = make(2, share=1.0)
    bring(cache, A, E)  # of layers 1 and 2
    cache.lend(1)
    assert bring(cache, F) == [E]
    assert bring(cache, E, prefetch=True) == [F]
    bring(cache, B)
    for prefetch in (False, True):
        assert cache.reserve(F, prefetch=prefetch) is None
    cache.lend(2)
    cache.take_back(1)
    assert bring(cache, F) == [A]
    cache.lend(1)
    assert cache.reserve(A, prefetch=False) is None
    cache.take_back()
    assert bring(cache, A) == [B]


def test_a_demand_evicts_the_oldest_prediction_before_anything_used() -> None:
    cache = make(4)
    bring(cache, A)
    bring(cache, B, C, D, prefetch=True)
    cache.use(C, 1.0)
    cache.pin(B)
    assert bring(cache, E) == [D]
    cache.unpin(B)
    assert bring(cache, F) == [B]
    assert bring(cache, B) == [A]


def test_predictions_displace_no_more_than_their_share() -> None:
    cache = make(8, share=0.25)
    assert cache.probation_limit == 2
    used = [ExpertKey(3, expert) for expert in range(8)]
    bring(cache, *used)
    assert bring(cache, A, B, C, D, prefetch=True) == [used[0], used[1], A, B]
    assert cache.occupancy().probation == 2
    assert [key for key in used if cache.state(key) is FREE] == used[:2]


def test_predictions_may_fill_what_is_free() -> None:
    cache = make(4, share=0.25)
    assert bring(cache, A, B, C, prefetch=True) == [None] * 3
    assert bring(cache, D) == [None]
    assert bring(cache, E, prefetch=True) == [A]


def test_a_full_share_that_is_still_loading_makes_the_next_prediction_wait() -> None:
    cache = make(4, share=0.25)
    bring(cache, A, B, C, D)
    assert cache.reserve(E, prefetch=True) == Reservation(0, A)
    assert cache.reserve(F, prefetch=True) is None
    assert cache.reserve(F, prefetch=False) == Reservation(1, B)


def test_without_a_share_predictions_only_replace_each_other() -> None:
    cache = make(2, share=0.0)
    bring(cache, A, B)
    assert cache.reserve(C, prefetch=True) is None


@pytest.mark.parametrize("arrived", [False, True])
def test_promotion_ends_probation(arrived: bool) -> None:
    cache = make(2)
    cache.reserve(A, prefetch=True)
    if arrived:
        cache.loaded(A)
    assert cache.on_probation(A)
    assert cache.promote(A)
    assert not cache.promote(A)
    assert not cache.on_probation(A)
    if not arrived:
        cache.loaded(A)
    bring(cache, B, prefetch=True)
    assert bring(cache, C) == [B]
    assert bring(cache, D) == [A]


@pytest.mark.parametrize(
    "misuse",
    [
        lambda cache: cache.reserve(A, prefetch=False),
        lambda cache: cache.reserve(B, prefetch=True),
        lambda cache: cache.loaded(A),
        lambda cache: cache.loaded(C),
        lambda cache: cache.failed(A),
        lambda cache: cache.failed(C),
        lambda cache: cache.promote(C),
        lambda cache: cache.pin(B),
        lambda cache: cache.pin(C),
        lambda cache: cache.unpin(A),
        lambda cache: cache.unpin(C),
        lambda cache: cache.use(B, 1.0),
        lambda cache: cache.release(A, 1.0),
        lambda cache: cache.use(C, 1.0),
    ],
)
def test_misuse_is_refused_and_changes_nothing(misuse: Callable[[ExpertCache], object]) -> None:
    cache = make(3)  # A resident, B loading, C out
    bring(cache, A)
    cache.reserve(B, prefetch=False)
    before = cache.occupancy()
    with pytest.raises(InternalError, match=r"ExpertKey\(layer=1, expert=\d\) is "):
        misuse(cache)
    assert cache.occupancy() == before
    cache.check()


@pytest.mark.parametrize(("slots", "share"), [(-1, 0.5), (4, -0.1), (4, 1.5), (4, float("nan"))])
def test_impossible_caches_are_refused(slots: int, share: float) -> None:
    with pytest.raises(InternalError, match=f"{slots} slots with a probationary share of {share}"):
        make(slots, share=share)


def test_a_cache_without_slots_has_room_for_nothing() -> None:
    cache = make(0)
    assert cache.reserve(A, prefetch=False) is None
    cache.check()


@pytest.mark.parametrize(
    ("corrupt", "law"),
    [
        (lambda cache: cache._free.append(0), "each slot is free or taken"),
        (lambda cache: cache._free.pop(), "free \\+ loading \\+ resident = slots"),
        (lambda cache: cache._slot_of.update({A: 1}), "map to each other"),
        (lambda cache: cache._loading.add(D), "what loads has a slot"),
        (lambda cache: cache._pins.update({B: 1}), "only residents are pinned"),
        (lambda cache: cache._pins.update({A: 0}), "only residents are pinned"),
        (lambda cache: cache._probation.update({D: None}), "what is on probation has a slot"),
    ],
)
def test_check_names_the_broken_law(corrupt: Callable[[ExpertCache], object], law: str) -> None:
    cache = make(3)
    bring(cache, A)
    cache.reserve(B, prefetch=False)
    cache.check()
    corrupt(cache)
    with pytest.raises(InternalError, match=law):
        cache.check()


class CacheMachine(RuleBasedStateMachine):
    """Random calls, sensible or not, against the plainest model of the docstrings."""

    def __init__(self, policy: str) -> None:
        super().__init__()
        self.policy_name = policy

    @initialize(slots=st.integers(1, 5), share=st.sampled_from((0.0, 0.25, 0.5, 1.0)))
    def begin(self, slots: int, share: float) -> None:
        self.limit = int(slots * share)
        self.slots = slots
        self.cache = make(slots, self.policy_name, share)
        self.states = dict.fromkeys(KEYS, FREE)
        self.slot_of: dict[ExpertKey, int] = {}
        self.pins = dict.fromkeys(KEYS, 0)
        self.predicted: list[ExpertKey] = []
        self.order: EvictionPolicy = make_eviction(self.policy_name)
        """A twin of the policy under test (whose order has tests of its own), told only of what is off probation."""

    def expected_victim(self, prefetch: bool) -> ExpertKey | None:
        open_keys = [key for key in KEYS if self.states[key] is RESIDENT and not self.pins[key]]
        probationers: list[ExpertKey | None] = [key for key in self.predicted if key in open_keys]
        regular = self.order.victim(lambda key: key in open_keys)
        if not prefetch:
            choices = [*probationers, regular]
        elif len(self.predicted) < self.limit:
            choices = [regular, *probationers]
        else:
            choices = probationers
        return next((key for key in choices if key is not None), None)

    def end_probation(self, key: ExpertKey) -> None:
        if key in self.predicted:
            self.predicted.remove(key)
            if self.states[key] is RESIDENT:
                self.order.on_insert(key)

    @rule(key=st.sampled_from(KEYS), prefetch=st.booleans())
    def reserve(self, key: ExpertKey, prefetch: bool) -> None:
        if self.states[key] is not FREE:
            with pytest.raises(InternalError):
                self.cache.reserve(key, prefetch=prefetch)
            return
        full = len(self.slot_of) == self.slots
        victim = self.expected_victim(prefetch) if full else None
        reservation = self.cache.reserve(key, prefetch=prefetch)
        if full and victim is None:
            assert reservation is None
            return
        assert reservation is not None
        assert reservation.evicted == victim
        if victim is not None:
            assert reservation.slot == self.slot_of.pop(victim)
            self.states[victim] = FREE
            if victim in self.predicted:
                self.predicted.remove(victim)
            else:
                self.order.on_remove(victim)
        assert reservation.slot in set(range(self.slots)) - set(self.slot_of.values())
        self.states[key] = LOADING
        self.slot_of[key] = reservation.slot
        if prefetch:
            self.predicted.append(key)

    @rule(key=st.sampled_from(KEYS), success=st.integers(0, 3))
    def finish(self, key: ExpertKey, success: int) -> None:
        act = self.cache.loaded if success else self.cache.failed
        if self.states[key] is not LOADING:
            with pytest.raises(InternalError):
                act(key)
            return
        act(key)
        if success:
            self.states[key] = RESIDENT
            if key not in self.predicted:
                self.order.on_insert(key)
            return
        self.states[key] = FREE
        del self.slot_of[key]
        if key in self.predicted:
            self.predicted.remove(key)

    @rule(key=st.sampled_from(KEYS))
    def promote(self, key: ExpertKey) -> None:
        if self.states[key] is FREE:
            with pytest.raises(InternalError):
                self.cache.promote(key)
            return
        assert self.cache.promote(key) == (key in self.predicted)
        self.end_probation(key)

    @rule(key=st.sampled_from(KEYS))
    def pin(self, key: ExpertKey) -> None:
        if self.states[key] is not RESIDENT:
            with pytest.raises(InternalError):
                self.cache.pin(key)
            return
        self.cache.pin(key)
        self.pins[key] += 1

    @rule(key=st.sampled_from(KEYS))
    def unpin(self, key: ExpertKey) -> None:
        if not self.pins[key]:
            with pytest.raises(InternalError):
                self.cache.unpin(key)
            return
        self.cache.unpin(key)
        self.pins[key] -= 1

    @rule(key=st.sampled_from(KEYS))
    def claim(self, key: ExpertKey) -> None:
        state = self.states[key]
        assert self.cache.claim(key) == (state, self.slot_of.get(key, -1))
        if state is not FREE:
            self.end_probation(key)
        if state is RESIDENT:
            self.pins[key] += 1

    @rule(key=st.sampled_from(KEYS), score=st.sampled_from((0.0, 0.5, 2.0)))
    def release(self, key: ExpertKey, score: float) -> None:
        if not self.pins[key]:
            with pytest.raises(InternalError):
                self.cache.release(key, score)
            return
        self.cache.release(key, score)
        self.pins[key] -= 1
        self.end_probation(key)
        self.order.on_use(key, score)

    @rule(key=st.sampled_from(KEYS), score=st.sampled_from((0.0, 0.5, 2.0)))
    def use(self, key: ExpertKey, score: float) -> None:
        if self.states[key] is not RESIDENT:
            with pytest.raises(InternalError):
                self.cache.use(key, score)
            return
        self.cache.use(key, score)
        self.end_probation(key)
        self.order.on_use(key, score)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check()
        states = list(self.states.values())
        assert self.cache.occupancy() == Occupancy(
            free=self.slots - len(self.slot_of),
            loading=states.count(LOADING),
            resident=states.count(RESIDENT),
            probation=len(self.predicted),
            pinned=sum(count > 0 for count in self.pins.values()),
        )
        resident = [key for key in KEYS if self.states[key] is RESIDENT]
        assert self.cache.resident_keys() == sorted(resident, key=self.slot_of.__getitem__)
        for key in KEYS:
            assert self.cache.state(key) is self.states[key]
            assert self.cache.slot(key) == (self.slot_of[key] if key in resident else None)
            assert self.cache.pins(key) == self.pins[key]
            assert self.cache.on_probation(key) == (key in self.predicted)


@pytest.mark.parametrize("policy", EVICTION)
def test_any_sequence_of_calls_agrees_with_the_model(policy: str) -> None:
    run_state_machine_as_test(
        lambda: CacheMachine(policy), settings=settings(max_examples=60, stateful_step_count=60, deadline=None)
    )
