"""Held and cache-aware coresets, and the block-level policies, in whole engines that offload."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine.core import ForwardInfo, Phase, RoutingDecision, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.metrics import EngineStats
from offload_engine.routing import SituatedCoreset
from offload_engine.routing.base import Route
from tests.checkpoints import tiny_config, write_checkpoint

PARAMS = SamplingParams(max_new_tokens=96, threshold=0.2, steps=12)
PROMPT = list(range(5, 50))
SLAB = 4096 * 2
Decisions = list[tuple[ForwardInfo, int, RoutingDecision]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(num_experts=64, n_group=8, topk_group=4, num_hidden_layers=4)
    return write_checkpoint(tmp_path_factory.mktemp("many"), config, seed=1)


def open_engine(directory: Path, **options: Any) -> Engine:
    few = {"gpu_mem": "3GB", "expert_mem": 60 * SLAB, "routing": "dmoe", "min_experts": 8, "predictor": "none"}
    return Engine.from_pretrained(directory, **{**few, **options})


def watch(engine: Engine) -> Decisions:
    """What the engine decides from now on."""
    seen: Decisions = []
    engine._observed.watchers.append(lambda info, layer, decision: seen.append((info, layer, decision)))
    return seen


def answer(directory: Path, **options: Any) -> tuple[list[int], EngineStats, Decisions]:
    with open_engine(directory, **options) as engine:
        seen = watch(engine)
        done = engine.generate(PROMPT, PARAMS)
        return done.token_ids, done.stats, seen


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> tuple[list[int], EngineStats, Decisions]:
    return answer(checkpoint)


def coresets(seen: Decisions) -> dict[tuple[int, int], list[torch.Tensor]]:
    """By (layer, block): the coreset of each denoising step in turn."""
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    for info, layer, decision in seen:
        if info.phase is Phase.DENOISE:
            assert decision.coreset is not None
            steps = found.setdefault((layer, info.block), [])
            assert len(steps) == info.step
            steps.append(decision.coreset)
    return found


def test_off_is_as_if_it_were_not_there(checkpoint: Path, plain: tuple[list[int], EngineStats, Decisions]) -> None:
    ids, stats, seen = answer(checkpoint, hold_steps=1, residency_bonus=0.0)
    assert ids == plain[0]
    assert stats.expert_requests == plain[1].expert_requests
    for (info, layer, decision), (other_info, other_layer, other) in zip(seen, plain[2], strict=True):
        assert (info, layer) == (other_info, other_layer)
        assert torch.equal(decision.experts, other.experts)
        assert torch.equal(decision.weights, other.weights)


def test_a_held_coreset_stays_for_its_steps(checkpoint: Path, plain: tuple[list[int], EngineStats, Decisions]) -> None:
    hold = 4
    _ids, stats, seen = answer(checkpoint, hold_steps=hold)
    for steps in coresets(seen).values():
        assert all(torch.equal(coreset, steps[step // hold * hold]) for step, coreset in enumerate(steps))
    held, afresh = coresets(seen), coresets(plain[2])

    def changes(found: dict[tuple[int, int], list[torch.Tensor]]) -> int:
        return sum(not torch.equal(a, b) for steps in found.values() for a, b in pairwise(steps))

    assert 0 < changes(held) < changes(afresh) / 2
    assert any(len(steps) > hold for steps in held.values())
    for _info, _layer, decision in seen:
        assert decision.coreset is not None
        for block, experts in enumerate(decision.experts.split(32)):
            assert decision.coreset[block, experts[experts >= 0]].all()
    assert stats.bytes_moved < plain[1].bytes_moved


def test_a_block_and_a_commit_choose_for_themselves(checkpoint: Path) -> None:
    _ids, _stats, seen = answer(checkpoint, hold_steps=1000)
    firsts = coresets(seen)
    assert all(torch.equal(coreset, steps[0]) for steps in firsts.values() for coreset in steps)
    layers = {layer for layer, _block in firsts}
    for layer in layers:
        own = [steps[0] for (other, _block), steps in firsts.items() if other == layer]
        assert any(not torch.equal(a, b) for a, b in pairwise(own))
    commits = [
        not torch.equal(decision.coreset, firsts[layer, info.block][0])  # type: ignore[arg-type]
        for info, layer, decision in seen
        if info.phase is Phase.COMMIT
    ]
    assert any(commits)


@pytest.mark.parametrize("broken_off", [1, 2, 5])
def test_a_generation_broken_off_leaves_nothing_behind(checkpoint: Path, broken_off: int) -> None:
    with open_engine(checkpoint, hold_steps=8, predictor="cross-layer-gate") as engine:
        prompts = [[7] * 40, list(range(40)), [3]]
        for other, prompt in zip(prompts, prompts[1:] + prompts[:1], strict=True):
            stream = engine.stream(other, PARAMS)
            for _ in range(broken_off):
                next(stream)
            stream.close()  # type: ignore[attr-defined]
            after = engine.generate(prompt, PARAMS).token_ids
            with open_engine(checkpoint, hold_steps=8) as fresh:
                assert fresh.generate(prompt, PARAMS).token_ids == after


@pytest.mark.parametrize("predictor", ["none", "previous-step", "cross-layer-gate", "block-history", "combined"])
def test_a_held_coreset_does_not_depend_on_the_cache(checkpoint: Path, predictor: str) -> None:
    everything, *_ = answer(checkpoint, hold_steps=3, expert_mem=None)
    few, *_ = answer(checkpoint, hold_steps=3, expert_mem=4 * SLAB, predictor=predictor)
    assert few == everything


def test_a_layer_routes_once_and_is_otherwise_only_previewed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[bool, list[tuple[ForwardInfo, int]]] = {True: [], False: []}
    original = SituatedCoreset.at

    def at(self: SituatedCoreset, layer: int, info: ForwardInfo, *, preview: bool = False) -> Route:
        asked[preview].append((info, layer))
        return original(self, layer, info, preview=preview)

    monkeypatch.setattr(SituatedCoreset, "at", at)
    options = {"hold_steps": 2, "predictor": "cross-layer-gate", "prefetch_depth": 2, "fused_commit": False}
    _ids, _stats, seen = answer(checkpoint, **options)
    assert asked[False] == [(info, layer) for info, layer, _decision in seen]
    assert asked[True] == asked[False], "where the host computes, each layer is looked at from itself alone"


def test_favouring_residents_moves_fewer_bytes(
    checkpoint: Path, plain: tuple[list[int], EngineStats, Decisions]
) -> None:
    stats = [plain[1]] + [answer(checkpoint, residency_bonus=bonus)[1] for bonus in (0.5, 2.0)]
    moved = [one.bytes_moved for one in stats]
    rates = [one.hits / one.expert_requests for one in stats]
    assert moved[0] > moved[1] > moved[2]
    assert rates[0] < rates[1] < rates[2]


def test_what_is_favoured_is_what_the_cache_holds_at_that_moment(checkpoint: Path) -> None:
    with open_engine(checkpoint, residency_bonus=2.0) as engine:
        experts = engine._parts.experts
        cache = experts.scheduler.cache
        policy = engine._parts.policy
        assert policy.residents == experts.residents  # type: ignore[attr-defined]
        assert experts.residents(1) == []
        engine.generate(PROMPT, PARAMS)
        experts.idle()
        for layer in experts.layers:
            held = sorted(key.expert for key in cache.resident_keys() if key.layer == layer)
            assert sorted(experts.residents(layer)) == held
        assert sum(len(experts.residents(layer)) for layer in experts.layers) == engine.plan.slots


def test_scoring_is_the_models_own_whatever_the_cache_holds(checkpoint: Path) -> None:
    with open_engine(checkpoint) as ordinary, open_engine(checkpoint, residency_bonus=5.0, hold_steps=4) as engine:
        for _ in range(2):
            assert torch.equal(engine.logits(PROMPT), ordinary.logits(PROMPT))
            engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20))


@pytest.mark.parametrize("routing", ["des-seq", "des-vote", "block-capacity"])
def test_a_small_cache_gives_the_same_answer_under_block_policies(checkpoint: Path, routing: str) -> None:
    options = {"routing": routing, "expert_capacity": 12}
    whole, _, seen = answer(checkpoint, **options, expert_mem=None)
    for predictor in ("previous-step", "cross-layer-gate"):
        few, stats, _ = answer(checkpoint, **options, expert_mem=4 * SLAB, predictor=predictor)
        assert few == whole
        assert stats.evictions > 0
    if routing != "des-seq":
        size = {"des-vote": 9, "block-capacity": 12}[routing]  # floor(0.15 * 64)
        assert all(int(coreset.sum()) == size for steps in coresets(seen).values() for coreset in steps)


def test_a_checkpoint_that_names_its_capacity_routes_by_it(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, tiny_config(expert_capacity=6))

    def opened(**options: Any) -> tuple[str, int, tuple[str, ...]]:
        with Engine.from_pretrained(directory, gpu_mem="3GB", **options) as engine:
            seen = watch(engine)
            engine.logits(PROMPT)
            coreset = seen[0][2].coreset
            return engine.routing_name, 0 if coreset is None else int(coreset[0].sum()), engine.notices

    name, size, notices = opened()
    assert (name, size) == ("block-capacity", 6)
    assert notices == ("the checkpoint routes by block: routing block-capacity, 6 experts per block",)
    assert opened(expert_capacity=7)[:2] == ("block-capacity", 7)
    assert opened(routing="original")[0] == "original"


def test_what_an_option_means_for_the_answer_is_said(checkpoint: Path) -> None:
    def notices(**options: Any) -> str:
        with open_engine(checkpoint, **options) as engine:
            return "\n".join(engine.notices)

    assert "residency_bonus is 0.5: answers depend on what the expert cache holds" in notices(residency_bonus=0.5)
    ignored = notices(routing="original", residency_bonus=0.5, hold_steps=2)
    assert "residency_bonus is ignored: it is an option of routing dmoe, and routing is original" in ignored
    assert "hold_steps is ignored" in ignored
    assert "not made for it" in notices(routing="block-capacity")
    assert notices(routing="des-vote") == ""
