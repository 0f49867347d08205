from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import ExpertKey, ForwardInfo, Phase
from offload_engine.errors import InternalError
from offload_engine.experts.scheduling.cache import ExpertCache, SlotState
from offload_engine.experts.scheduling.eviction import EVICTION, make_eviction
from offload_engine.experts.scheduling.outlook import Outlook
from offload_engine.experts.scheduling.scheduler import Command, Compute, ExpertScheduler, Load


def scheduler_of(slots: int, in_flight: int = 2, eviction: str = "lru") -> ExpertScheduler:
    return ExpertScheduler(ExpertCache(slots, make_eviction(eviction)), in_flight)


def keys(layer: int, *experts: int) -> list[ExpertKey]:
    return [ExpertKey(layer, expert) for expert in experts]


def loads(commands: list[Command]) -> list[ExpertKey]:
    return [command.key for command in commands if isinstance(command, Load)]


def computes(commands: list[Command]) -> list[ExpertKey]:
    return [command.key for command in commands if isinstance(command, Compute)]


def test_residents_are_computed_while_the_others_load() -> None:
    scheduler = scheduler_of(4)
    scheduler.predict(keys(1, 7))
    scheduler.arrived(ExpertKey(1, 7))
    commands = scheduler.want(1, [3, 7], [2.0, 1.0])
    assert isinstance(commands[0], Load), "the transfer starts before anything is computed"
    assert loads(commands) == keys(1, 3)
    assert computes(commands) == keys(1, 7)
    assert (scheduler.counters.hits, scheduler.counters.misses, scheduler.counters.prefetches_used) == (1, 1, 1)
    assert computes(scheduler.arrived(ExpertKey(1, 3))) == keys(1, 3)


def test_a_demand_overtakes_queued_prefetches() -> None:
    scheduler = scheduler_of(8, in_flight=1)
    assert loads(scheduler.predict(keys(2, 0, 1, 2))) == keys(2, 0)
    assert loads(scheduler.want(1, [5], [1.0])) == []
    assert loads(scheduler.arrived(ExpertKey(2, 0))) == keys(1, 5)
    assert loads(scheduler.arrived(ExpertKey(1, 5))) == keys(2, 1)


def test_what_is_lent_stays_until_the_layer_wants_something() -> None:
    scheduler = scheduler_of(4)
    scheduler.predict(keys(1, 0))
    scheduler.arrived(ExpertKey(1, 0))
    scheduler.lend(1)
    for key in loads(scheduler.predict(keys(2, *range(8)))):
        while key is not None:
            following = loads(scheduler.arrived(key))
            key = following[0] if following else None
    assert scheduler.cache.state(ExpertKey(1, 0)) is SlotState.RESIDENT
    assert loads(scheduler.settle(1, [0], [1.0], Outlook([0]), {0: 0})) == []
    assert not scheduler.cache._lent
    assert (scheduler.counters.hits, scheduler.counters.prefetches_used) == (1, 1)
    assert not scheduler.cache.on_probation(ExpertKey(1, 0)), "it was used"


def test_what_is_missing_is_asked_for_before_the_books_hear_of_the_rest() -> None:
    scheduler = scheduler_of(3, in_flight=1)
    for layer, expert in ((1, 0), (1, 1), (2, 0)):
        scheduler.want(layer, [expert], [1.0])
        scheduler.arrived(ExpertKey(layer, expert))
        scheduler.computed(ExpertKey(layer, expert))
    before = scheduler.counters.misses
    scheduler.lend(1)
    assert loads(scheduler.ask(1, [5, 6, 7], [3.0, 2.0, 1.0])) == keys(1, 5)
    assert scheduler.cache.state(ExpertKey(2, 0)) is SlotState.FREE, "a victim from elsewhere"
    arrived = scheduler.arrived(ExpertKey(1, 5))
    assert (loads(arrived), computes(arrived)) == ([], keys(1, 5)), "what is lent makes no room"
    assert loads(scheduler.settle(1, [5, 0, 6, 7], [3.0, 2.5, 2.0, 1.0], Outlook([5, 0, 6, 7]), {0: 0})) == keys(1, 6)
    assert scheduler.cache.state(ExpertKey(1, 0)) is SlotState.RESIDENT, "the one that nobody wanted went"
    assert (scheduler.counters.hits, scheduler.counters.misses - before) == (1, 3)
    with pytest.raises(InternalError, match="routed while 3 experts"):
        scheduler.ask(2, [0], [1.0])


@pytest.mark.parametrize("slot", [1, 0])
def test_what_was_computed_from_elsewhere_than_the_books_say_is_a_defect(slot: int) -> None:
    scheduler = scheduler_of(2)
    if slot:
        scheduler.want(1, [0], [1.0])
        scheduler.arrived(ExpertKey(1, 0))
        scheduler.computed(ExpertKey(1, 0))
    scheduler.lend(1)
    with pytest.raises(InternalError, match=rf"was computed from slot {slot}, but is"):
        scheduler.settle(1, [0], [1.0], Outlook([0]), {0: slot})


@pytest.mark.parametrize("end", [ExpertScheduler.abandon, lambda scheduler: scheduler.reset({})])
def test_a_layer_that_is_given_up_is_lent_no_longer(end: Callable[[ExpertScheduler], None]) -> None:
    scheduler = scheduler_of(4)
    scheduler.lend(1)
    end(scheduler)
    assert not scheduler.cache._lent


def test_an_expert_on_its_way_is_not_fetched_again() -> None:
    scheduler = scheduler_of(4)
    scheduler.predict(keys(1, 4))
    assert scheduler.want(1, [4], [1.0]) == []
    assert scheduler.counters.late == 1
    assert computes(scheduler.arrived(ExpertKey(1, 4))) == keys(1, 4)


def test_no_load_of_a_layer_evicts_what_the_layer_still_needs() -> None:
    scheduler = scheduler_of(2)
    for key in keys(1, 0, 1):
        scheduler.predict([key])
        scheduler.arrived(key)
        scheduler.want(1, [key.expert], [1.0])
        scheduler.computed(key)
    commands = scheduler.want(1, [0, 1, 2], [3.0, 2.0, 1.0])
    assert loads(commands) == []
    assert computes(commands) == keys(1, 0, 1)
    assert loads(scheduler.computed(ExpertKey(1, 1))) == keys(1, 2)


def test_a_new_prediction_of_a_layer_replaces_the_old_one() -> None:
    scheduler = scheduler_of(8, in_flight=1)
    scheduler.predict(keys(1, 0, 1, 2))
    scheduler.predict(keys(1, 5))
    assert loads(scheduler.arrived(ExpertKey(1, 0))) == keys(1, 5)


def test_predictions_of_a_layer_that_has_routed_are_dropped() -> None:
    scheduler = scheduler_of(8, in_flight=1)
    scheduler.predict(keys(1, 0, 1, 2))
    scheduler.want(1, [9], [1.0])
    assert loads(scheduler.arrived(ExpertKey(1, 0))) == keys(1, 9)
    assert loads(scheduler.arrived(ExpertKey(1, 9))) == []


def test_what_is_computed_elsewhere_takes_no_slot_and_no_transfer() -> None:
    scheduler = scheduler_of(4, in_flight=1)
    scheduler.predict(keys(1, 7, 8))
    assert scheduler.absent(1, [5, 7, 8, 9]) == [5, 8, 9]
    commands = scheduler.want(1, [5, 7, 8, 9], [4.0, 3.0, 2.0, 1.0], elsewhere={5, 8})
    assert (loads(commands), computes(commands)) == ([], [])
    arrived = scheduler.arrived(ExpertKey(1, 7))
    assert (loads(arrived), computes(arrived)) == (keys(1, 9), keys(1, 7))
    scheduler.computed(ExpertKey(1, 7))
    scheduler.arrived(ExpertKey(1, 9))
    scheduler.computed(ExpertKey(1, 9))
    counters = scheduler.counters
    assert scheduler.done
    assert (counters.elsewhere, counters.late, counters.misses) == (2, 1, 1)
    assert counters.moved == 4
    assert scheduler.cache.state(ExpertKey(1, 5)) is SlotState.FREE


def test_a_failed_load_frees_its_slot_and_the_layer_can_be_abandoned() -> None:
    scheduler = scheduler_of(2)
    scheduler.want(1, [0, 1, 2], [3.0, 2.0, 1.0])
    scheduler.arrived(ExpertKey(1, 0))
    scheduler.failed(ExpertKey(1, 1))
    scheduler.abandon()
    assert scheduler.done
    assert scheduler.cache.pins(ExpertKey(1, 0)) == 0
    for key in [k for k in keys(1, 2) if scheduler.cache.state(k) is SlotState.LOADING]:
        assert computes(scheduler.arrived(key)) == []
    scheduler.cache.check()
    assert scheduler.want(2, [0], [1.0]), "the next layer is served"


def test_warming_ends_where_a_prefetch_finds_no_room() -> None:
    scheduler = scheduler_of(1)
    scheduler.warm(keys(0, 0, 1))
    scheduler.predict(keys(0, 2))
    assert scheduler.arrived(ExpertKey(0, 0)) == []
    assert not scheduler.warming


def test_a_layer_cannot_be_wanted_twice() -> None:
    scheduler = scheduler_of(4)
    scheduler.want(1, [0], [1.0])
    with pytest.raises(InternalError, match="layer 2 was routed while 1 experts"):
        scheduler.want(2, [0], [1.0])


@given(
    slots=st.integers(1, 6),
    in_flight=st.integers(1, 3),
    eviction=st.sampled_from(sorted(EVICTION)),
    data=st.data(),
)
def test_every_layer_is_computed_whole_whatever_happens_in_between(
    slots: int, in_flight: int, eviction: str, data: st.DataObject
) -> None:
    """Random layers, predictions and orders of completion, some experts computed elsewhere: each other that is wanted
    is computed exactly once, from the slot it was loaded into, never more transfers are under way than allowed, and the
    cache conserves its slots.
    """
    scheduler = scheduler_of(slots, in_flight, eviction)
    flying: list[ExpertKey] = []
    ready: list[Compute] = []
    contents: dict[int, ExpertKey | None] = {}

    def carry_out(commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Load):
                assert command.slot not in {compute.slot for compute in ready}, "a slot is overwritten before its use"
                contents[command.slot] = None
                landing[command.key] = command.slot
                flying.append(command.key)
            else:
                assert contents[command.slot] == command.key
                ready.append(command)
        assert len(flying) <= in_flight

    landing: dict[ExpertKey, int] = {}
    counted = 0
    hot = [ExpertKey(*key) for key in data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7))), label="hot")]
    carry_out(scheduler.warm(hot))
    assert len(flying) <= 1
    expert_sets = st.lists(st.integers(0, 7), min_size=1, max_size=8, unique=True)
    for layer in data.draw(st.lists(st.integers(0, 2), max_size=6), label="layers"):
        scheduler.begin(ForwardInfo(data.draw(st.sampled_from(Phase)), 0, data.draw(st.integers(0, 1))))
        carry_out(scheduler.predict(keys(data.draw(st.integers(0, 2)), *data.draw(expert_sets))))
        wanted = data.draw(expert_sets, label="wanted")
        absent = scheduler.absent(layer, wanted)
        assert absent == [one for one in wanted if scheduler.cache.state(ExpertKey(layer, one)) is SlotState.FREE]
        elsewhere = [expert for expert in absent if data.draw(st.booleans(), label="elsewhere")]
        scores = [float(len(wanted) - i) for i in range(len(wanted))]
        carry_out(scheduler.want(layer, wanted, scores, elsewhere=elsewhere))
        counted += len(wanted)
        computed: list[ExpertKey] = []
        while not scheduler.done:
            assert flying or ready, "nothing under way, yet the layer is not done"
            if flying and (not ready or data.draw(st.booleans(), label="arrival first")):
                key = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
                contents[landing[key]] = key
                carry_out(scheduler.arrived(key))
            else:
                compute = ready.pop(0)
                assert contents[compute.slot] == compute.key
                computed.append(compute.key)
                carry_out(scheduler.computed(compute.key))
            scheduler.cache.check()
        assert sorted(computed) == sorted(keys(layer, *(expert for expert in wanted if expert not in elsewhere)))
        assert flying or not (scheduler.transfers_under_way or scheduler.warming), "nobody would report what is awaited"
    while flying:
        carry_out(scheduler.arrived(flying.pop()))
    assert (scheduler.transfers_under_way, scheduler.warming) == (0, False)
    counters = scheduler.counters
    assert counters.hits + counters.late + counters.misses + counters.elsewhere == counted
    assert counters.prefetches_used + counters.prefetches_wasted <= counters.prefetches
    assert counters.warmed <= min(slots, len(set(hot)))


def test_wasted_prefetches_and_evictions_are_counted() -> None:
    scheduler = scheduler_of(1)
    scheduler.predict(keys(1, 0))
    scheduler.arrived(ExpertKey(1, 0))
    assert loads(scheduler.want(1, [1], [1.0])) == keys(1, 1)
    counters = scheduler.counters
    assert (counters.evictions, counters.prefetches_wasted, counters.prefetches_used) == (1, 1, 0)


def test_hot_experts_fill_free_slots_one_at_a_time() -> None:
    scheduler = scheduler_of(2)
    assert loads(scheduler.warm(keys(1, 0, 1, 2))) == keys(1, 0)
    assert loads(scheduler.arrived(ExpertKey(1, 0))) == keys(1, 1)
    assert loads(scheduler.arrived(ExpertKey(1, 1))) == [], "nothing is evicted for them"
    counters = scheduler.counters
    assert (counters.warmed, counters.prefetches, counters.evictions) == (2, 0, 0)
    scheduler.want(1, [0], [1.0])
    assert counters.hits == 1
    assert not scheduler.cache.on_probation(ExpertKey(1, 1))


def test_a_demand_never_waits_for_a_hot_expert() -> None:
    scheduler = scheduler_of(8)
    scheduler.warm(keys(1, 0, 1, 2))
    assert loads(scheduler.want(2, [5, 6], [2.0, 1.0])) == keys(2, 5), "one of two transfers was free"
    assert loads(scheduler.arrived(ExpertKey(1, 0))) == keys(2, 6)
    assert loads(scheduler.arrived(ExpertKey(2, 5))) == [], "a demand is under way"
    assert loads(scheduler.arrived(ExpertKey(2, 6))) == keys(1, 1)


def test_only_what_layers_asked_for_counts_as_under_way() -> None:
    scheduler = scheduler_of(8, in_flight=1)
    scheduler.warm(keys(1, 0, 1))
    assert (scheduler.transfers_under_way, scheduler.warming) == (0, True)
    scheduler.predict(keys(2, 0))
    assert scheduler.transfers_under_way == 1, "queued behind the hot one"
    assert loads(scheduler.arrived(ExpertKey(1, 0))) == keys(2, 0)
    assert loads(scheduler.arrived(ExpertKey(2, 0))) == keys(1, 1)
    assert (scheduler.transfers_under_way, scheduler.warming) == (0, True)
    scheduler.want(1, [1], [1.0])
    assert (scheduler.transfers_under_way, scheduler.warming) == (1, False), "the layer waits for it now"
    assert computes(scheduler.arrived(ExpertKey(1, 1))) == keys(1, 1)
    counters = scheduler.counters
    assert (counters.hits, counters.late, counters.misses, counters.warmed) == (0, 0, 1, 2), "nobody predicted it"
    assert scheduler.transfers_under_way == 0


def test_warming_passes_over_what_is_here_and_ends_when_stopped() -> None:
    scheduler = scheduler_of(8, in_flight=1)
    scheduler.predict(keys(1, 0))
    assert loads(scheduler.warm(keys(1, 0, 1, 2))) == []
    assert loads(scheduler.arrived(ExpertKey(1, 0))) == keys(1, 1)
    scheduler.stop()
    assert loads(scheduler.arrived(ExpertKey(1, 1))) == []
    scheduler.cache.check()


def test_a_hot_expert_that_fails_to_load_is_left_out() -> None:
    scheduler = scheduler_of(4)
    scheduler.warm(keys(1, 0, 1))
    assert loads(scheduler.failed(ExpertKey(1, 0))) == keys(1, 1)
    assert scheduler.counters.prefetches_wasted == 0
    scheduler.cache.check()
