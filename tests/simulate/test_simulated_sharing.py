"""Misses shared with the CPU on the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.cli.simulate import model_of, shape_of
from offload_engine.core import ExpertKey, ForwardInfo, Phase
from offload_engine.experts.scheduling.cache import ExpertCache
from offload_engine.experts.scheduling.eviction import make_eviction
from offload_engine.experts.scheduling.predictor import NoPredictor
from offload_engine.experts.scheduling.scheduler import ExpertScheduler
from offload_engine.experts.scheduling.sharing import Rates, ShareMode
from offload_engine.simulate.channel import Channel, Direct, Tiered, Transfers
from offload_engine.simulate.forwards import ForwardRun, LayerRun, Size, forwards, sized
from offload_engine.simulate.profile import Profile, load_profile
from offload_engine.simulate.replay import Costs, Replay, ReplayResult
from offload_engine.simulate.run import Figures, Setting, Simulation
from offload_engine.simulate.sharing import Sharing, tokens_by_score
from offload_engine.simulate.timing import Timing
from offload_engine.trace import read_trace

TRACES = Path(__file__).parent.parent / "data" / "traces"
COSTS = Costs(transfer_seconds=4.0, compute_seconds=1.0, attention_seconds=2.0)
RATES = Rates(copy=4.0, expert=2.0, token=0.0, trip=1.0)


def step(number: int, *experts: int, phase: Phase = Phase.DENOISE) -> ForwardRun:
    run = LayerRun(1, experts, (1.0,) * len(experts))
    return ForwardRun(ForwardInfo(phase, 0, number), [run], size=Size(tokens=4, positions=4))


def replay(
    trace: Sequence[ForwardRun], mode: ShareMode, rates: Rates = RATES, transfers: Transfers | None = None
) -> ReplayResult:
    scheduler = ExpertScheduler(ExpertCache(4, make_eviction("lru")))
    transfers = transfers or Direct(Channel(4.0), from_host=True)
    sharing = Sharing(mode, 1, lambda _forward: rates)
    result = Replay(scheduler, NoPredictor(), [1], COSTS, 1, transfers, 1, None, sharing).run(trace)
    scheduler.cache.check()
    return result


def test_the_cpu_computes_while_the_link_copies() -> None:
    """Attention to 2; one is copied until 6 and computed until 7, the other on the CPU from 2 to 5."""
    assert replay([step(0, 0, 1)], "off").seconds == 11.0
    result = replay([step(0, 0, 1)], "auto")
    assert (result.seconds, result.stall_seconds, result.loads) == (7.0, 4.0, 1)
    counters = result.counters
    assert (counters.misses, counters.elsewhere, counters.hits) == (1, 1, 0)
    assert result.moments[-1].on_cpu == 1


def test_a_layer_waits_for_the_cpu_where_that_takes_longer() -> None:
    """Both on the CPU, until 2 + 1 + 2 x 2; nothing is copied, and nothing is there in the next step."""
    result = replay([step(0, 0, 1), step(1, 0, 1)], 1.0)
    assert result.seconds == 2 * 7.0
    assert (result.loads, result.counters.elsewhere, result.counters.hits) == (0, 4, 0)
    assert result.stall_seconds == 2 * 5.0


def test_what_everything_waits_for_is_waited_for_by_copies_too() -> None:
    result = replay([step(0, 0, 1)], 0.5, Rates(copy=4.0, expert=2.0, token=0.0, trip=1.0, own=1.5))
    assert result.seconds == 2 + 1.5 + 4 + 1


def test_prefills_are_left_to_the_device() -> None:
    result = replay([step(0, 0, 1, phase=Phase.PREFILL), step(1, 2, 3, phase=Phase.COMMIT)], 1.0)
    assert (result.counters.misses, result.counters.elsewhere) == (2, 2)


def test_what_is_on_disk_alone_is_not_computed_there() -> None:
    host = ExpertCache(2, make_eviction("lru"))
    for expert in (0, 1):
        host.reserve(ExpertKey(1, expert), prefetch=False)
        host.loaded(ExpertKey(1, expert))
    result = replay([step(0, 0, 2, 3)], 1.0, transfers=Tiered(Channel(8.0), Channel(4.0), host))
    assert (result.counters.elsewhere, result.counters.misses) == (1, 2)
    assert replay([step(0, 0, 1)], 1.0, transfers=Direct(Channel(4.0))).counters.elsewhere == 0


@given(scores=st.lists(st.floats(0, 100), min_size=1, max_size=40), tokens=st.integers(1, 64), top_k=st.integers(1, 8))
def test_tokens_are_divided_by_score(scores: list[float], tokens: int, top_k: int) -> None:
    ranked = sorted(scores, reverse=True)
    run = LayerRun(1, tuple(range(len(ranked))), tuple(ranked))
    forward = ForwardRun(ForwardInfo(Phase.DENOISE), [run], size=Size(tokens=tokens))
    divided = list(tokens_by_score(forward, run, top_k).values())
    assert divided == sorted(divided, reverse=True)
    assert all(1 <= one <= tokens for one in divided)
    assert sum(divided) <= tokens * top_k + 1.5 * len(scores)


def card(**removed: None) -> Profile:
    return Profile.model_validate(load_profile("rtx4060").model_dump() | removed)


def test_a_profile_tells_all_of_its_cpu_or_nothing() -> None:
    assert card().shares
    assert not card(host_bandwidth=None, host_compute=None).shares
    with pytest.raises(ValueError, match="host_bandwidth and host_compute belong together"):
        card(host_bandwidth=None)
    values = load_profile("cpu-disk").model_dump()
    values |= {name: card().model_dump()[name] for name in ("host_bandwidth", "host_compute")}
    with pytest.raises(ValueError, match="belong together, and to a machine with a GPU"):
        Profile.model_validate(values)


def figures(routing: str, gpu: str, mode: ShareMode) -> Figures:
    header, records = read_trace(TRACES / f"llada2-mini-{routing}.jsonl.gz")
    trace = sized(list(forwards(records, header.block_length)), header.block_length)
    timing = Timing(shape_of(model_of(header, None).config, header.expert_bytes), load_profile(gpu))
    simulation = Simulation(trace[:22], header.layers, timing, header.block_length)
    return simulation.figures(Setting(slots=800, cpu_experts=mode))


@pytest.mark.parametrize(("gpu", "times"), [("rtx4060", 2.0), ("h100", 1.0)])
def test_it_pays_where_much_is_missing_and_costs_nothing_where_little_is(gpu: str, times: float) -> None:
    for routing in ("original", "dmoe"):
        off, auto = (figures(routing, gpu, mode) for mode in ("off", "auto"))
        assert auto.step <= 1.01 * off.step
        assert off.on_cpu == 0
        if routing == "original":
            assert auto.step * times <= off.step
            assert auto.on_cpu > 10
            assert auto.loads < off.loads


def test_rates_need_a_profile_that_tells() -> None:
    forward = step(0, 0)
    header, _records = read_trace(TRACES / "llada2-mini-dmoe.jsonl.gz")
    shape = shape_of(model_of(header, None).config, header.expert_bytes)
    rates = Timing(shape, card()).rates(forward)
    assert rates.copy == pytest.approx(6291456 / (1.575e10 * 0.82))
    assert rates.expert == pytest.approx(6291456 / 3.5e10)
    assert rates.token == pytest.approx(6 * 2048 * 512 / 4e11)
    assert rates.cpu(16) / rates.copy == pytest.approx(0.9, abs=0.15), "about the same at 16 tokens"
    assert (
        Simulation([forward], [1], Timing(shape, card(host_bandwidth=None, host_compute=None)), 32)._sharing(
            Setting(slots=4, cpu_experts="auto")
        )
        is None
    )
