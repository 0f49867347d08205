"""What the weights of `make_checkpoint` make of routing: the engine answers, and the options are seen in its trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from offload_engine.core import Phase
from offload_engine.trace import TraceRecord
from tests.tools.pocket_checkpoint import POCKET, write
from tools.checkpoint_maker.measure import Measured, measure, summarise
from tools.checkpoint_maker.presets import PRESETS, config_of
from tools.checkpoint_maker.weights import RoutingStatistics
from tools.make_checkpoint import main, make_checkpoint, report

CONFIG = config_of(PRESETS["llada2-nano"], torch.bfloat16, layers=3)
DEFAULTS = RoutingStatistics()
Answer = Callable[[RoutingStatistics], dict[str, Measured]]


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """Routing of a nano checkpoint by what was asked for."""

    @cache
    def run(wanted: RoutingStatistics) -> dict[str, Measured]:
        out = tmp_path_factory.mktemp("nano") / "made"
        make_checkpoint(out, CONFIG, seed=0, shard_bytes=10**9, tokenizer=None, statistics=wanted)
        return {one.routing: one for one in measure(out, blocks=3, gpu_mem="2GB")}

    return run


def test_the_defaults_come_near_what_is_reported_of_llada2_mini(answered: Answer) -> None:
    measured = answered(DEFAULTS)
    assert 62 <= measured["original"].unique_experts <= 78
    assert 14 <= measured["dmoe"].unique_experts <= 18
    for one in measured.values():
        assert 0.08 <= one.variation <= 0.25
        assert one.tokens == 192, "an answer of random weights has no eos"
        assert one.distinct_tokens > 150
    assert measured["original"].similarity > 0.85
    assert measured["dmoe"].similarity > 0.7


def test_blocks_and_answers_differ_in_their_experts(answered: Answer) -> None:
    """With an even popularity, as load balancing makes it, the text decides what the positions of a block agree on."""
    measured = answered(DEFAULTS)
    adjacent, prompts = measured["dmoe"].adjacent_blocks, measured["dmoe"].prompts
    assert adjacent is not None
    assert prompts is not None
    assert prompts + 0.08 < adjacent < 0.45
    assert prompts < 0.2
    assert measured["dmoe"].union > 2 * measured["dmoe"].unique_experts


def test_a_larger_share_of_the_topic_is_less_alike_from_block_to_block(answered: Answer) -> None:
    runs = [answered(RoutingStatistics(topic=topic)) for topic in (0.0, 0.95)]
    for routing in ("original", "dmoe"):
        alike, different = (run[routing] for run in runs)
        assert (alike.adjacent_blocks or 0) > (different.adjacent_blocks or 0) + 0.1
        assert (alike.prompts or 0) > (different.prompts or 0) + 0.2
        assert alike.union < different.union


def test_higher_similarity_is_more_alike_from_step_to_step(answered: Answer) -> None:
    runs = [answered(RoutingStatistics(similarity=similarity)) for similarity in (0.1, 0.5, 0.95)]
    low, middle, high = (run["original"].similarity for run in runs)
    assert low + 0.02 < middle < high - 0.02
    low, _, high = (run["dmoe"].similarity for run in runs)  # which experts just make the coreset is near to chance
    assert low + 0.03 < high


def test_a_wider_bias_is_fewer_experts(answered: Answer) -> None:
    runs = [answered(RoutingStatistics(bias_spread=spread)) for spread in (0.0, 0.1, 0.4)]
    most, middle, least = (run["original"].unique_experts for run in runs)
    assert most - 10 > middle > least + 10
    most, _, least = (run["dmoe"].unique_experts for run in runs)  # between the two the smallest coreset is reached
    assert most - 2 > least


def record(
    layer: int, block: int, step: int, experts: list[int], phase: Phase = Phase.DENOISE, sequence: int = 0
) -> TraceRecord:
    return TraceRecord(
        phase=phase,
        sequence=sequence,
        block=block,
        step=step,
        layer=layer,
        experts=tuple(experts),
        scores=(1.0,) * len(experts),
    )


def test_a_summary_is_that_of_the_denoising_steps() -> None:
    records = [
        record(1, 0, 0, list(range(200)), Phase.PREFILL),
        record(1, 4, 0, [1, 2, 3, 4]),
        record(2, 4, 0, [7, 8]),
        record(1, 4, 1, [3, 4, 5, 6]),
        record(2, 4, 1, [8, 7]),
        record(1, 4, 2, list(range(100)), Phase.COMMIT),
        record(1, 5, 0, [1, 2, 3, 4, 5, 6, 7]),
        record(2, 5, 0, [9, 10]),
    ]
    found = summarise("original", records, [5, 5, 6])
    assert found.unique_experts == pytest.approx((5 + 2) / 2)
    assert found.similarity == pytest.approx((2 / 6 + 1) / 2), "from one block to the next nothing is compared"
    assert found.variation == pytest.approx((2**0.5 / 5 + 0) / 2)
    assert found.adjacent_blocks == pytest.approx((4 / 7 + 0) / 2)
    assert found.prompts is None, "there is one answer"
    assert found.union == pytest.approx((7 + 4) / 2)
    assert (found.distinct_tokens, found.tokens) == (2, 3)
    assert str(found) == (
        "original: 3.5 unique experts per layer (CV 14.1%), 5.5 in an answer, adjacent-step similarity 0.667, "
        "of adjacent blocks' first steps 0.286, 2 different tokens of 3"
    )


def test_answers_are_compared_by_their_first_blocks() -> None:
    records = [
        record(1, 4, 0, [1, 2], sequence=0),
        record(1, 4, 1, [6], sequence=0),
        record(1, 5, 0, [2, 3], sequence=0),
        record(1, 4, 0, [2, 5], sequence=1),
        record(1, 6, 0, [9], sequence=1),
    ]
    found = summarise("dmoe", records, [5])
    assert found.prompts == pytest.approx(1 / 3)
    assert found.adjacent_blocks == pytest.approx(1 / 3), "neither the next answer's nor one further on"
    assert found.union == pytest.approx((4 + 3) / 2)
    assert "of different prompts' first steps 0.333" in str(found)


def test_the_command_prints_what_it_measured(tmp_path: Path) -> None:
    given = ["--preset", "llada2-nano", "--layers", "2", "--blocks", "1", "--gpu-mem", "2GB"]
    done = CliRunner().invoke(main, [*given, "--out", str(tmp_path / "made")])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["original", "dmoe"]
    assert all("unique experts per layer" in line and "of 64" in line for line in lines[1:])


def test_a_checkpoint_without_routing_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "made", {**POCKET, "num_hidden_layers": 1})
    report(tmp_path / "made", 1, "2GB")
    assert capsys.readouterr().out == "no MoE layer, so no routing to measure\n"


def test_too_small_a_budget_costs_the_measurement_not_the_checkpoint(tmp_path: Path) -> None:
    given = ["--preset", "llada2-nano", "--layers", "2", "--gpu-mem", "1MB", "--out", str(tmp_path / "made")]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0
    assert "routing not measured:" in done.stderr
    assert (tmp_path / "made" / "config.json").exists()
