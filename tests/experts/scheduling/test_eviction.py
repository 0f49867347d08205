from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given

from offload_engine.core import ExpertKey
from offload_engine.errors import ConfigError
from offload_engine.experts.scheduling.eviction import EVICTION, LFU, LRU, EvictionPolicy, ScoreAware, make_eviction
from tests.contracts.eviction_contract import KEYS, Event, EvictionContract, drain, events, possible, tell

A, B, C = KEYS[:3]


@pytest.mark.parametrize("name", EVICTION)
class TestEveryPolicy(EvictionContract):
    def make(self, name: str) -> EvictionPolicy:
        return make_eviction(name)


def by_definition(name: str, history: list[Event]) -> list[ExpertKey]:
    """The order of eviction as the docstrings define it, with exact numbers and from the beginning each time."""
    worth: dict[ExpertKey, Fraction] = {}
    last: dict[ExpertKey, int] = {}
    uses = 0
    for number, (kind, key, score) in enumerate(history):
        last[key] = number
        if kind == "remove":
            del worth[key]
        elif kind == "insert":
            worth[key] = Fraction(0)
        elif name == "lfu":
            worth[key] += 1
            uses += 1
            if uses >= 8 * len(worth):
                uses = 0
                worth = {known: Fraction(count // 2) for known, count in worth.items()}
        elif name == "score-aware":
            fading = 1 + Fraction(1, 4 * len(worth))
            worth = {known: value / fading for known, value in worth.items()}
            worth[key] += Fraction(score)
    return sorted(worth, key=lambda key: (worth[key], last[key]))


@pytest.mark.parametrize("name", EVICTION)
@given(wanted=events)
def test_order_is_the_documented_one(name: str, wanted: list[Event]) -> None:
    policy, history = make_eviction(name), possible(wanted)
    tell(policy, history)
    assert drain(policy) == by_definition(name, history)


def test_lru_goes_by_the_last_use_alone() -> None:
    policy = LRU()
    tell(policy, [("insert", key, 0.0) for key in (A, B, C)])
    tell(policy, [("use", A, 9.0), ("use", A, 9.0), ("use", C, 0.0), ("use", B, 0.0)])
    assert drain(policy) == [A, C, B]


def test_lfu_goes_by_the_number_of_uses() -> None:
    policy = LFU()
    tell(policy, [("insert", key, 0.0) for key in (A, B, C)])
    tell(policy, [("use", A, 0.0), ("use", A, 0.0), ("use", B, 0.0), ("use", C, 0.0)])
    assert drain(policy) == [B, C, A]


def test_lfu_lets_old_counts_fade() -> None:
    policy = LFU(uses_per_halving=8)
    tell(policy, [("insert", key, 0.0) for key in (A, B)])
    tell(policy, [("use", A, 0.0)] * 15)
    tell(policy, [("use", B, 0.0)] * 9)  # halved once: 15 -> 7 against 1 // 2 + 8
    assert policy.victim(lambda _key: True) == A
    unfading = LFU(uses_per_halving=1000)
    tell(unfading, [("insert", key, 0.0) for key in (A, B)] + [("use", A, 0.0)] * 15 + [("use", B, 0.0)] * 9)
    assert unfading.victim(lambda _key: True) == B


def test_score_aware_goes_by_what_the_blocks_wanted() -> None:
    policy = ScoreAware()
    tell(policy, [("insert", key, 0.0) for key in (A, B, C)])
    tell(policy, [("use", A, 5.0), ("use", B, 0.1), ("use", B, 0.1), ("use", C, 1.0)])
    assert drain(policy) == [B, C, A]


def test_score_aware_lets_old_scores_fade() -> None:
    """With two candidates A's 10 is divided by 1.125 at each later use: below B's 3 from the eleventh on."""
    for uses, victim in ((9, B), (10, A)):
        policy = ScoreAware(memory=4)
        tell(policy, [("insert", A, 0.0), ("insert", B, 0.0), ("use", A, 10.0), *[("use", B, 0.0)] * uses])
        tell(policy, [("use", B, 3.0)])
        assert policy.victim(lambda _key: True) == victim


def test_score_aware_keeps_its_order_over_any_length() -> None:
    """Long enough to rescale often: the unit alone would leave the range of a float after 6000 such uses."""
    policy = ScoreAware()
    tell(policy, [("insert", key, 0.0) for key in (A, B)])
    for _ in range(100):
        for wanted, other in ((A, B), (B, A)):
            tell(policy, [("use", wanted, 1.0)] * 50)
            assert policy.victim(lambda _key: True) == other


def test_unknown_policies_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"eviction is 'fifo'; choose one of lru, lfu, score-aware"):
        make_eviction("fifo")
