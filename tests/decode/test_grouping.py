"""How many lanes go together: on statistics made by hand, and against the production cache on recorded traces."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.core import BlockPass, ForwardInfo, Phase
from offload_engine.decode.grouping import KNOWN, Grouping, loads_by_size, sizes
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import make_eviction
from offload_engine.experts.scheduling.predictor import make_predictor
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.simulate.forwards import ForwardRun, LayerRun
from offload_engine.simulate.replay import Costs, Replay
from offload_engine.trace import read_trace

TRACES = Path(__file__).parent.parent / "data" / "traces"
KIND = "dmoe", 32
Steps = Sequence[dict[int, set[int]]]
"""What each forward of a lane used, by layer."""


def told(lanes: Sequence[Steps], slots: float, size: int | str = "auto") -> Grouping:
    grouping = Grouping(lambda: slots, size)  # type: ignore[arg-type]
    grouping.begin(KIND)
    for lane, steps in enumerate(lanes):
        for uses in steps:
            for layer, experts in uses.items():
                grouping.saw(lane, layer, experts)
    return grouping


def steady(lanes: int, wanted: int, shared: int = 0, steps: int = 8) -> list[Steps]:
    """Lanes that want the same experts in every step, `shared` of them the same in all lanes."""
    own = wanted - shared
    return [
        [{1: {*range(shared), *range(1000 + lane * own, 1000 + (lane + 1) * own)}} for _ in range(steps)]
        for lane in range(lanes)
    ]


@pytest.mark.parametrize(
    ("slots", "together"), [(8, 1), (16, 1), (24, 1), (32, 2), (48, 3), (64, 4), (130, 8), (200, 8)]
)
def test_as_many_go_together_as_the_slots_hold(slots: int, together: int) -> None:
    assert told(steady(8, wanted=16), slots).together(KIND, 8) == together


def test_lanes_that_want_the_same_go_together() -> None:
    assert told(steady(8, wanted=16, shared=16), 16).together(KIND, 8) == 8
    assert told(steady(8, wanted=16, shared=14), 24).together(KIND, 8) in (5, 6), "5 want 24"


def test_where_one_alone_wants_more_than_the_cache_all_share_what_is_loaded() -> None:
    drawn = random.Random(0)
    lanes = [[{1: set(drawn.sample(range(256), 70))} for _ in range(8)] for _ in range(8)]
    assert told(lanes, 20).together(KIND, 8) == 8


def test_who_is_unknown_is_alone_or_among_as_many_known() -> None:
    assert Grouping(lambda: 200).together(KIND, 8) == 1
    assert told(steady(1, wanted=16, steps=KNOWN - 1), 200).together(KIND, 8) == 1, "it has shown too little"
    assert told(steady(1, wanted=16, steps=KNOWN), 200).together(KIND, 8) == 2
    known = told(steady(3, wanted=16), 200)
    assert [known.together(KIND, most) for most in (1, 2, 3, 4, 8)] == [1, 2, 3, 4, 5]
    assert told(steady(3, wanted=16), 16).together(KIND, 8) == 1, "nothing speaks for more"
    assert known.together("another kind", 3) == 1


def test_where_every_expert_has_a_slot_all_go_together_at_once() -> None:
    assert Grouping(lambda: 64.0, experts=64).together(KIND, 8) == 8
    assert Grouping(lambda: 63.5, experts=64).together(KIND, 8) == 1


def test_groups_grow_as_long_as_they_fit() -> None:
    """By half of the lanes that were seen to fit at a time."""
    grouping = Grouping(lambda: 200)
    lanes = steady(8, wanted=16)
    sizes_taken = []
    for step in range(5 * KNOWN):
        size = grouping.together(KIND, 8)
        sizes_taken.append(size)
        grouping.begin(KIND)
        for lane in range(size):
            grouping.saw(lane, 1, lanes[lane][step % KNOWN][1])
    assert sizes_taken == [1] * KNOWN + [2] * KNOWN + [3] * KNOWN + [5] * KNOWN + [8] * KNOWN


def test_a_size_is_kept_until_another_is_clearly_better() -> None:
    """Of 72 experts the slots lack some: two lanes together load them in every forward, in turns once per turn."""
    slots = [0.0]
    grouping = Grouping(lambda: slots[0])
    grouping.begin(KIND)
    for step in range(8):
        for lane, steps in enumerate(steady(2, wanted=36)):
            grouping.saw(lane, 1, steps[step][1])
    taken = []
    for held in (71.0, 72.0, 71.0, 70.0, 71.0):
        slots[0] = held
        taken.append(grouping.together(KIND, 2))
    assert taken == [1, 2, 2, 1, 1]


def test_a_number_is_kept_to() -> None:
    assert [told(steady(8, wanted=16), 16, 3).together(KIND, most) for most in (1, 2, 3, 8)] == [1, 2, 3, 3]


def test_kinds_are_judged_by_themselves_and_the_oldest_is_forgotten() -> None:
    grouping = told(steady(2, wanted=16), 32)
    for number in range(8):
        assert grouping.together(KIND, 2) == 2
        grouping.begin(number)
        for lane in range(2):
            grouping.saw(lane, 1, range(4))
        assert grouping.together(number, 2) == 1
    assert grouping.together(KIND, 2) == 1, "nothing is known of it any more"


def test_a_decision_follows_what_lanes_use_and_how_many_slots_there_are() -> None:
    slots = [16.0]
    grouping = Grouping(lambda: slots[0])
    grouping.begin(KIND)

    def use(first: int) -> None:
        for _ in range(40):
            for lane in range(2):
                grouping.saw(lane, 1, range(lane * first, lane * first + 16))

    use(100)
    assert grouping.together(KIND, 2) == 1
    slots[0] = 32.0
    assert grouping.together(KIND, 2) == 2
    slots[0] = 16.0
    assert grouping.together(KIND, 2) == 1
    use(0)
    assert grouping.together(KIND, 2) == 2


uses = st.lists(
    st.lists(
        st.fixed_dictionaries({1: st.sets(st.integers(0, 40)), 4: st.sets(st.integers(0, 40))}), min_size=1, max_size=12
    ),
    min_size=1,
    max_size=6,
)


@given(uses, st.floats(0, 60), st.integers(1, 6))
def test_whatever_was_seen_the_answer_is_a_possible_size_and_the_same_again(
    lanes: list[Steps], slots: float, most: int
) -> None:
    found = told(lanes, slots).together(KIND, most)
    assert 1 <= found <= most
    assert found == told(lanes, slots).together(KIND, most)
    known = sum(len(steps) >= KNOWN for steps in lanes)
    assert told(lanes, 100).together(KIND, most) == min(most, max(1, known + (known + 1) // 2)), "everything fits"


@given(st.integers(1, 5000))
def test_the_sizes_compared_reach_from_one_to_all(most: int) -> None:
    found = sizes(most)
    assert (found[0], found[-1]) == (1, most)
    assert found == sorted(set(found))
    assert len(found) < 50


def test_loads_are_those_of_the_groups_one_after_the_other() -> None:
    one, two = {1: 0b0011}, {1: 0b1100}
    lanes = [[one, one, two], [two, two, two]]
    assert loads_by_size(lanes, [1, 2], 4) == {1: 0, 2: 0}, "all four fit"
    assert loads_by_size(lanes, [1, 2], 2) == {1: 4 / 6, 2: 4 / 6}, "two pairs in turns; two of four twice, then none"
    assert loads_by_size([lanes[0][-1:], lanes[1]], [1], 2) == {1: 0}, "only the newest forwards that both have"


@given(
    st.lists(st.lists(st.sets(st.integers(0, 20)), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(0, 24),
)
def test_no_more_is_loaded_than_wanted_and_no_less_than_the_slots_lack(lanes: list[list[set[int]]], slots: int) -> None:
    masks = [[{1: sum(1 << expert for expert in uses)} for uses in steps] for steps in lanes]
    found = loads_by_size(masks, [1], slots)[1] * 3 * len(lanes)
    wants = [len(uses) for steps in lanes for uses in steps]
    assert sum(max(0, want - slots) for want in wants) <= round(found, 6) <= sum(wants)
    if slots >= 21:
        assert found == 0


def recorded(name: str, lanes: int) -> list[Steps]:
    """Four layers of the denoising forwards of a recorded answer, cut into pieces that stand for as many lanes."""
    _header, records = read_trace(TRACES / f"{name}.jsonl.gz")
    steps: dict[tuple[int, int, int], dict[int, set[int]]] = defaultdict(dict)
    for one in records:
        if one.phase is Phase.DENOISE and one.layer <= 4:
            steps[one.sequence, one.block, one.step][one.layer] = set(one.experts)
    whole = list(steps.values())
    each = len(whole) // lanes
    return [whole[lane * each : (lane + 1) * each] for lane in range(lanes)]


def replayed(lanes: Sequence[Steps], size: int, slots: int) -> float:
    """Loads per layer, lane and forward of groups of `size` lanes, one group after the other, for the second time."""
    forwards: list[ForwardRun] = []
    for start in list(range(0, len(lanes), size)) * 2:
        for step, together in enumerate(zip(*lanes[start : start + size], strict=True)):
            info = ForwardInfo.of([BlockPass(Phase.DENOISE, start, 0, step, 32)])
            forwards.append(ForwardRun(info, [_run(layer, together) for layer in together[0]]))
    layers = list(lanes[0][0])
    scheduler = ExpertScheduler(ExpertCache(slots * len(layers), make_eviction("next-use")))
    moments = Replay(scheduler, make_predictor("none"), layers, Costs()).run(forwards).moments
    loads = moments[-1].loads - moments[len(moments) // 2 - 1].loads
    return loads / len(layers) / sum(map(len, lanes))


def _run(layer: int, together: Iterable[dict[int, set[int]]]) -> LayerRun:
    experts = tuple(sorted(set().union(*(uses[layer] for uses in together))))
    return LayerRun(layer, experts, (1.0,) * len(experts))


@pytest.mark.parametrize("name", ["llada2-mini-dmoe", "llada2-mini-original"])
def test_the_size_chosen_is_near_the_best_in_the_production_cache(name: str) -> None:
    lanes = recorded(name, 4)
    masks = [
        [{layer: sum(1 << e for e in experts) for layer, experts in uses.items()} for uses in one] for one in lanes
    ]
    chosen = {}
    for slots in (8, 24, 44, 80, 160):
        measured = {size: replayed(lanes, size, slots) for size in (1, 2, 4)}
        chosen[slots] = told(lanes, slots).together(KIND, 4)
        near = {1: 1, 2: 2, 3: 2, 4: 4}[chosen[slots]]
        assert measured[near] <= 1.2 * min(measured.values()) + 0.3, (slots, measured)
        for size, loads in loads_by_size(masks, list(measured), slots).items():
            assert loads == pytest.approx(measured[size], rel=0.25, abs=0.5), (slots, size)
    assert chosen[160] == 4
    assert len(set(chosen.values())) > 1
