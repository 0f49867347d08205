"""What is replayed, and when: the books of recordings, with a recorder that runs the work again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload_engine import Engine, SamplingParams
from offload_engine.errors import DeviceError
from offload_engine.model.graphs import Attended, LayerGraphs
from tests.model.graph_recorder import FakeRecorder

HIDDEN = 4


class Layer:
    """Work that depends on its key as well, and counts."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, 0

    def __call__(self, hidden: Tensor) -> Attended:
        self.calls += 1
        return Attended(hidden * self.factor, hidden + self.factor, hidden @ torch.ones(HIDDEN, 3))


def same(one: Attended, other: Attended) -> bool:
    return all(map(torch.equal, one, other))


def test_first_plain_then_recorded_then_replayed() -> None:
    recorder, layer = FakeRecorder(), Layer(3.0)
    graphs = LayerGraphs(recorder)
    counts = []
    for step in range(5):
        hidden = torch.full((2, HIDDEN), float(step))
        assert same(graphs.run(7, "place", hidden, layer), Layer(3.0)(hidden))
        counts.append((len(recorder.recordings), recorder.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3), (1, 4)], "the first replay is held against the plain result"
    assert not graphs.notices


def test_what_was_proven_of_a_layer_is_recorded_without_a_replay() -> None:
    recorder, layer = FakeRecorder(), Layer(3.0)
    graphs = LayerGraphs(recorder)
    for place in ("one", "other"):
        for _ in range(2):
            graphs.run(7, place, torch.ones(2, HIDDEN), layer)
    assert [one.replays for one in recorder.recordings] == [1, 0]


@given(
    calls=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.sampled_from([1, 3]), st.integers(0, 9)), max_size=40
    ),
    most=st.integers(0, 6),
)
def test_results_are_always_those_of_the_plain_work(calls: list[tuple[int, int, int, int]], most: int) -> None:
    graphs = LayerGraphs(FakeRecorder(most))
    for layer, place, tokens, value in calls:
        hidden = torch.full((tokens, HIDDEN), float(value))
        work = Layer(float(10 * layer + place))
        assert same(graphs.run(layer, place, hidden, work), work(hidden))


def test_one_recording_of_a_layer_is_kept_and_other_shapes_begin_anew() -> None:
    recorder, layer = FakeRecorder(), Layer(2.0)
    graphs = LayerGraphs(recorder)

    def run(place: str, tokens: int = 2) -> None:
        graphs.run(0, place, torch.ones(tokens, HIDDEN), layer)

    for place in ("a", "a", "a", "b", "b", "b"):
        run(place)
    assert [one.replays for one in recorder.recordings] == [2, 1]
    for _ in range(2):
        run("a")
    assert len(recorder.recordings) == 3, "the first was dropped"
    for _ in range(3):
        run("a", tokens=3)
    assert [one.replays for one in recorder.recordings][3:] == [1], "proven once, for all shapes"
    run("a")
    assert len(recorder.recordings) == 4


def test_a_refusal_ends_recording_and_is_told() -> None:
    recorder, layer = FakeRecorder(most=1), Layer(2.0)
    graphs = LayerGraphs(recorder)
    for number in (0, 1):
        for _ in range(3):
            assert same(graphs.run(number, "a", torch.ones(2, HIDDEN), layer), Layer(2.0)(torch.ones(2, HIDDEN)))
    replays = recorder.replays
    graphs.run(0, "a", torch.ones(2, HIDDEN), layer)
    assert recorder.replays == replays, "nothing is replayed any more"
    (notice,) = graphs.notices
    assert notice.endswith("more slowly than in CUDA graphs: CUDA refuses to record it (no reason)")


def test_a_recording_that_differs_is_not_used() -> None:
    graphs, hidden = LayerGraphs(FakeRecorder(wrong=True)), torch.ones(2, HIDDEN)
    for _ in range(4):
        assert same(graphs.run(5, "a", hidden, Layer(2.0)), Layer(2.0)(hidden))
    assert "what was recorded of layer 5 gave other results" in graphs.notices[0]


@pytest.mark.parametrize("recorder", [FakeRecorder(most=0), FakeRecorder(wrong=True)])
def test_where_graphs_are_asked_for_doing_without_is_an_error(recorder: FakeRecorder) -> None:
    graphs, hidden = LayerGraphs(recorder, required=True), torch.ones(2, HIDDEN)
    graphs.run(5, "a", hidden, Layer(2.0))
    with pytest.raises(DeviceError, match=r"cuda_graphs is on, but .*; set cuda_graphs to auto or off"):
        graphs.run(5, "a", hidden, Layer(2.0))


PROMPTS = ["Anna has 37 apples. Tom gives her 58 more. How many?", "A box holds 12 pencils. How many are in 7 boxes?"]


@pytest.mark.parametrize("options", [{}, {"fused_commit": False}, {"batch_size": 2}, {"routing": "dmoe"}])
def test_answers_are_the_same_and_most_steps_of_a_block_are_replayed(options: dict[str, Any]) -> None:
    params = SamplingParams(max_new_tokens=96, threshold=0.9999)
    answers = []
    for recorder in (None, FakeRecorder()):
        with Engine.from_pretrained(gpu_mem="2GB", device="cpu", **options) as engine:
            decoder = engine._decoder
            decoder.graphs = None if recorder is None else LayerGraphs(recorder)
            done = engine.generate(PROMPTS, params)
            answers.append([one.token_ids for one in done])
            again = engine.generate(PROMPTS[0], params)  # the same places, and a cache that was reset
            answers[-1].append(again.token_ids)
            written = [cache.written for cache in decoder.caches]
            answers[-1].append(written)
    assert answers[0] == answers[1]
    assert recorder is not None
    layers, steps = len(engine.model_config.moe_layers), again.stats.denoise_steps
    assert recorder.replays > layers * (steps - 3 * again.stats.blocks) > 0
    assert recorder.replays % layers == 0


def test_prefills_commits_and_forwards_of_several_sequences_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    run = LayerGraphs.run

    def noted(graphs: LayerGraphs, layer: int, key: Any, hidden: Tensor, work: Any) -> Attended:
        keys.append((key, hidden.shape[0]))
        return run(graphs, layer, key, hidden, work)

    monkeypatch.setattr(LayerGraphs, "run", noted)
    with Engine.from_pretrained(gpu_mem="2GB", device="cpu", batch_size=2, lanes_together=2) as engine:
        engine._decoder.graphs = LayerGraphs(FakeRecorder())
        engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=96, threshold=0.9999))
        assert {tokens for _key, tokens in keys} == {32}
        alone = len(keys)
        engine.generate([PROMPTS[1], PROMPTS[1]], SamplingParams(max_new_tokens=32, threshold=1, steps=4))
        assert len(keys) == alone, "both are in every forward"


def test_moved_weights_are_another_key() -> None:
    with Engine.from_pretrained(gpu_mem="2GB", device="cpu") as engine:
        recorder = FakeRecorder()
        engine._decoder.graphs = LayerGraphs(recorder)
        params = SamplingParams(max_new_tokens=32, threshold=1, steps=6)
        answer = engine.generate(PROMPTS[0], params).token_ids
        before = len(recorder.recordings)
        for layer in engine._parts.model.layers:
            weight = layer.attention.query_key_value.weight
            weight.data = weight.data.clone()
        assert engine.generate(PROMPTS[0], params).token_ids == answer
        assert len(recorder.recordings) == 2 * before


def test_closing_drops_what_was_recorded() -> None:
    graphs = LayerGraphs(FakeRecorder())
    for _ in range(2):
        graphs.run(0, "a", torch.ones(2, HIDDEN), Layer(2.0))
    assert graphs._kept
    engine = Engine.from_pretrained(gpu_mem="2GB", device="cpu")
    engine._parts = dataclasses.replace(engine._parts, graphs=graphs)
    engine.close()
    assert not graphs._kept
    assert graphs._input is None
