"""What every eviction policy must do; a policy's tests inherit from this and say how to make one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey
from offload_engine.experts.scheduling.eviction import EvictionPolicy

KEYS = [ExpertKey(layer, expert) for layer in (1, 2) for expert in range(3)]
SCORES = (0.0, 0.3, 0.7, 1.9)
Event = tuple[str, ExpertKey, float]
events = st.lists(
    st.tuples(
        st.sampled_from(("insert", "use", "use", "use", "remove")), st.sampled_from(KEYS), st.sampled_from(SCORES)
    ),
    max_size=80,
)


def possible(wanted: list[Event]) -> list[Event]:
    """The events that make sense in turn: only what is in may be used or removed, only what is out put in."""
    inside: set[ExpertKey] = set()
    kept = []
    for event in wanted:
        kind, key, _score = event
        if (kind == "insert") == (key not in inside):
            kept.append(event)
            inside ^= {key} if kind != "use" else set()
    return kept


def tell(policy: EvictionPolicy, history: list[Event]) -> None:
    for kind, key, score in history:
        if kind == "insert":
            policy.on_insert(key)
        elif kind == "use":
            policy.on_use(key, score)
        else:
            policy.on_remove(key)


def drain(policy: EvictionPolicy) -> list[ExpertKey]:
    """Every candidate, in the order of eviction."""
    order = []
    while (key := policy.victim(lambda _key: True)) is not None:
        order.append(key)
        policy.on_remove(key)
    return order


class EvictionContract:
    @pytest.fixture
    def name(self) -> str:
        raise NotImplementedError

    def make(self, name: str) -> EvictionPolicy:
        raise NotImplementedError

    def test_knows_its_name(self, name: str) -> None:
        assert self.make(name).name == name

    def test_nothing_to_evict(self, name: str) -> None:
        policy = self.make(name)
        assert policy.victim(lambda _key: True) is None
        policy.on_insert(KEYS[0])
        assert policy.victim(lambda _key: False) is None

    @given(wanted=events)
    def test_every_candidate_is_evicted_once(self, name: str, wanted: list[Event]) -> None:
        policy, history = self.make(name), possible(wanted)
        tell(policy, history)
        inside = {key for key in KEYS if sum(k == key and kind != "use" for kind, k, _score in history) % 2}
        order = drain(policy)
        assert len(order) == len(inside)
        assert set(order) == inside

    @given(wanted=events, pinned=st.sets(st.sampled_from(KEYS)))
    def test_asking_for_a_victim_changes_nothing_and_skips_what_may_not_go(
        self, name: str, wanted: list[Event], pinned: set[ExpertKey]
    ) -> None:
        asked, silent = self.make(name), self.make(name)
        for event in possible(wanted):
            tell(asked, [event])
            tell(silent, [event])
            asked.victim(lambda key: key not in pinned)
        victim = asked.victim(lambda key: key not in pinned)
        order = drain(silent)
        assert victim == next((key for key in order if key not in pinned), None)
        assert drain(asked) == order

    @pytest.mark.parametrize("used", [False, True])
    def test_ties_go_to_the_least_recent(self, name: str, used: bool) -> None:
        policy = self.make(name)
        tell(policy, [("insert", key, 0.0) for key in KEYS])
        order = list(reversed(KEYS)) if used else KEYS
        if used:
            tell(policy, [("use", key, 0.5) for key in order])
        assert drain(policy) == order

    def test_a_key_that_comes_back_starts_afresh(self, name: str) -> None:
        policy = self.make(name)
        back, stayed = KEYS[:2]
        tell(policy, [("insert", back, 0.0), *[("use", back, 9.0)] * 3, ("remove", back, 0.0)])
        tell(policy, [("insert", back, 0.0), ("insert", stayed, 0.0), ("use", stayed, 0.1)])
        assert drain(policy) == [back, stayed]

    def test_a_victim_costs_few_more_looks_than_are_passed_over(self, name: str) -> None:
        policy = self.make(name)
        many = [ExpertKey(layer, expert) for layer in range(20) for expert in range(250)]
        for key in many:
            policy.on_insert(key)
            policy.on_use(key, 1.0)
        pinned, looks = set(many[:40]), []

        def evictable(key: ExpertKey) -> bool:
            looks.append(key)
            return key not in pinned

        assert policy.victim(evictable) == many[40]
        assert 41 <= len(looks) < 45  # who looks for several at once looks at a few more
