from __future__ import annotations

import copy
import random

import pytest

from offload_engine.core import BlockPass, ExpertKey, ForwardInfo, Phase
from offload_engine.experts.scheduling import next_use
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import EvictionPolicy, make_eviction
from offload_engine.experts.scheduling.next_use import NextUse, opens_block
from offload_engine.experts.scheduling.outlook import Outlook
from offload_engine.experts.scheduling.scheduler import Compute, ExpertScheduler, Load
from tests.contracts.eviction_contract import drain


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def told(policy: NextUse, info: ForwardInfo, *layers: tuple[int, list[int]]) -> None:
    """One forward; what it uses becomes a candidate if it is none."""
    policy.begin(info)
    for layer, experts in layers:
        policy.on_route(layer, experts, Outlook(experts))
        for key in keys(layer, *experts):
            if key.expert not in policy._layer(layer).candidates:
                policy.on_insert(key)
            policy.on_use(key, 1.0)


def steps(policy: NextUse, count: int, *layers: tuple[int, list[int]]) -> None:
    for number in range(count):
        told(policy, ForwardInfo(Phase.DENOISE, 0, number + 1), *layers)


def test_what_comes_next_stays_and_what_has_just_run_goes() -> None:
    policy = NextUse()
    steps(policy, 3, (1, [0]), (2, [0]), (3, [0]))
    policy.on_route(1, [0], Outlook([0]))
    assert [key.layer for key in drain(policy)] == [1, 3, 2]


def test_what_the_layer_stopped_using_goes_first() -> None:
    policy = NextUse()
    steps(policy, 3, (1, [0, 1]), (2, [0, 1]))
    steps(policy, 2, (1, [0]), (2, [0]))
    assert {key.expert for key in drain(policy)[:2]} == {1}


def test_uses_are_remembered_of_what_has_left() -> None:
    policy = NextUse()
    steps(policy, 4, (1, [0]))
    policy.on_remove(ExpertKey(1, 0))
    told(policy, ForwardInfo(Phase.DENOISE, 0, 5), (1, [0, 7]))
    assert drain(policy) == keys(1, 7, 0)


def test_after_a_commit_what_blocks_want_first_counts() -> None:
    policy = NextUse()
    for block in range(3):
        told(policy, ForwardInfo(Phase.DENOISE, block, 0), (1, [0]))
        for number in range(1, 4):
            told(policy, ForwardInfo(Phase.DENOISE, block, number), (1, [5]))
        if block < 2:
            told(policy, ForwardInfo(Phase.COMMIT, block, 4), (1, [5]))
    assert policy.victim(lambda _key: True) == ExpertKey(1, 0), "within a block its own experts count"
    told(policy, ForwardInfo(Phase.COMMIT, 2, 4), (1, [5]))
    assert policy.victim(lambda _key: True) == ExpertKey(1, 5), "what the next block begins with is kept"


def fused(block: int) -> ForwardInfo:
    """The first step of `block`, which commits the one before."""
    return ForwardInfo.of([BlockPass(Phase.COMMIT, 0, block - 1, 4, 32), BlockPass(Phase.DENOISE, 0, block, 0, 32)])


def test_a_forward_that_opens_a_block_keeps_what_blocks_want_first_until_the_layer_has_routed() -> None:
    policy = NextUse()
    for block in range(1, 4):
        told(policy, fused(block), (1, [0]), (2, [0]))
        for number, expert in enumerate((7, 5, 5, 5, 5, 5), start=1):
            told(policy, ForwardInfo(Phase.DENOISE, block, number), (1, [expert]), (2, [expert]))
    assert policy.victim(lambda key: key.layer == 2) == ExpertKey(2, 0), "within a block its own experts count"
    told(policy, fused(4), (1, [5]))
    assert policy.victim(lambda key: key.layer == 2) == ExpertKey(2, 7), "what the block begins with is kept"
    assert policy.victim(lambda key: key.layer == 1) == ExpertKey(1, 0), "layer 1 has routed"


def test_a_forward_over_a_block_under_way_opens_none() -> None:
    lanes = [BlockPass(Phase.DENOISE, 0, 3, 0, 32), BlockPass(Phase.DENOISE, 1, 2, 5, 32)]
    assert opens_block(ForwardInfo(Phase.DENOISE, 3, 0))
    assert opens_block(fused(1))
    assert not opens_block(ForwardInfo.of(lanes))
    assert not opens_block(ForwardInfo(Phase.COMMIT, 3, 0))


def test_a_prefill_is_not_learnt_from() -> None:
    policy = NextUse()
    steps(policy, 3, (1, [0]))
    told(policy, ForwardInfo(Phase.PREFILL, 0, 0), (1, [3]))
    told(policy, ForwardInfo(Phase.PREFILL, 1, 0), (1, [3]))
    steps(policy, 1, (1, [0]))
    assert drain(policy) == keys(1, 3, 0)


def misses_of_sweeps(eviction: str, slots: int, layers: int, experts: int, sweeps: int) -> int:
    """Every layer wants the same experts in every sweep, and together they are more than the cache holds."""
    policy: EvictionPolicy = make_eviction(eviction)
    scheduler = ExpertScheduler(ExpertCache(slots, policy))
    for sweep in range(sweeps):
        scheduler.begin(ForwardInfo(Phase.DENOISE, 0, sweep))
        for layer in range(layers):
            commands = scheduler.want(layer, range(experts), [1.0] * experts)
            while commands:
                command = commands.pop(0)
                if isinstance(command, Load):
                    commands += scheduler.arrived(command.key)
                elif isinstance(command, Compute):
                    commands += scheduler.computed(command.key)
            assert scheduler.done
    return scheduler.counters.misses


def test_a_working_set_larger_than_the_cache_does_not_thrash() -> None:
    """Six layers of 10 with 40 slots: recency misses all 60 each time; the best 60 + 5 * 21."""
    assert misses_of_sweeps("lru", 40, 6, 10, sweeps=6) == 360
    assert misses_of_sweeps("next-use", 40, 6, 10, sweeps=6) <= 1.15 * (60 + 5 * 21)


def test_when_victims_are_asked_for_makes_no_difference() -> None:
    """What a forward's layers routed is learnt from together, and late."""
    generator = random.Random(0)
    asked, unasked = NextUse(), NextUse()
    for number in range(40):
        phase = Phase.COMMIT if number % 8 == 7 else Phase.DENOISE
        routed = [(layer, generator.sample(range(6 + number // 4), 4)) for layer in range(3)]
        told(unasked, ForwardInfo(phase, 0, number % 8), *routed)
        asked.begin(ForwardInfo(phase, 0, number % 8))
        for layer, experts in routed:
            asked.on_route(layer, experts, Outlook(experts))
            for key in keys(layer, *experts):
                asked.victim(lambda _key: False)
                if key.expert not in asked._layer(layer).candidates:
                    asked.on_insert(key)
                asked.on_use(key, 1.0)
    left = [key for layer in range(3) for key in keys(layer, *range(16))]
    while left:
        gone = asked.victim(left.__contains__)
        assert gone == unasked.victim(left.__contains__)
        if gone is None:
            break
        left.remove(gone)
    assert len(left) < 20


MANY = [(layer, list(range(40))) for layer in range(5)]
"""Enough candidates for four victims to be found together."""


def test_victims_found_together_are_those_found_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = NextUse(), NextUse()
    for policy in (together, apart):
        steps(policy, 3, *MANY)
    order = drain(together)
    monkeypatch.setattr(next_use, "AT_ONCE", 1)
    assert drain(apart) == order


def test_who_is_used_after_victims_were_found_is_none_of_them() -> None:
    policy = NextUse()
    steps(policy, 3, *MANY)
    order = drain(copy.deepcopy(policy))
    assert policy.victim(lambda _key: True) == order[0]
    policy.on_use(order[1], 1.0)
    policy.on_remove(order[0])
    assert policy.victim(lambda _key: True) == order[2]


def test_who_might_not_go_when_victims_were_found_goes_first_as_soon_as_it_may() -> None:
    policy = NextUse()
    steps(policy, 3, *MANY)
    order = drain(copy.deepcopy(policy))
    assert policy.victim(lambda key: key != order[0]) == order[1]
    assert policy.victim(lambda _key: True) == order[0]


def test_who_became_a_better_victim_waits_for_the_next_search_in_a_large_cache() -> None:
    policy = NextUse()
    steps(policy, 3, *MANY)
    found = drain(copy.deepcopy(policy))[:4]
    assert policy.victim(lambda _key: True) == found[0]
    policy.on_insert(ExpertKey(4, 99))  # never used
    for key in found:
        assert policy.victim(lambda _key: True) == key
        policy.on_remove(key)
    assert policy.victim(lambda _key: True) == ExpertKey(4, 99)
