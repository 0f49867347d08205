"""What tables and figures say, counted again from made-up evaluations and measurements."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest

from offload_engine.evaluate.statistics import wilson
from tests.tools.analysis_data import FACTS, SAMPLES, MadeUp, evaluated
from tools.analysis import paper, runs
from tools.analysis.figures import Drawn
from tools.analysis.sections import ablations, comparison, costs, latency, observations
from tools.analysis.sections.content import Content, MissingError
from tools.analysis.study import Effort
from tools.analysis.tables import Table

ORIGINAL = evaluated(runs.original(), 16, 100.0)
OURS = evaluated(runs.dmoe(0.6), 15, 25.0)


def tables(content: Content) -> list[Table]:
    return [part for part in content.parts if isinstance(part, Table)]


def cells(content: Content, row: str, table: int = 0) -> dict[str, str]:
    found = tables(content)[table]
    (one,) = [cells for cells in found.rows if cells[0] == row]
    return dict(zip(found.columns, one, strict=True))


def test_table_2_counts_what_dmoe_saves_and_keeps(tmp_path: Path) -> None:
    content = comparison.table_2(MadeUp(tmp_path, [ORIGINAL, OURS]))
    ours = cells(content, "dMoE (p = 0.6)")
    low, high = wilson(15, SAMPLES)
    assert ours["Unique experts"] == "25.0"
    assert ours["Change"] == "−75.0 %"
    assert ours["Accuracy %"] == "75.0"
    assert ours["95 % interval"] == f"{100 * low:.1f} to {100 * high:.1f}"
    assert ours["Kept %"] == "93.75"
    assert 70 < float(ours["Kept, at least %"]) < 93.75
    assert ours["Tokens / step"] == "7.50"
    assert ours["paper, mean of 4: experts"] == "16.6"
    assert ours["kept %"] == f"{paper.ACCURACY_KEPT}"
    assert cells(content, "Original")["Change"] == "–"
    (lesson,) = [part for part in content.parts if isinstance(part, str)]
    assert "75.0 % fewer" in lesson
    assert "93.75 %" in lesson


def test_table_2_marks_our_rows_and_names_those_that_are_missing(tmp_path: Path) -> None:
    content = comparison.table_2(MadeUp(tmp_path, [ORIGINAL, OURS]))
    (table,) = tables(content)
    assert [table.rows[place][0] for place in table.ours] == ["dMoE (p = 0.6)"]
    assert "the evaluation top-4 on tiny-arithmetic" in content.missing
    assert "the evaluation des-vote-matched on tiny-arithmetic" in content.missing
    assert len(content.missing) + len(table.rows) == len(runs.main_comparison(Effort())) + 1


def test_without_the_original_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="the evaluation original on tiny-arithmetic"):
        comparison.table_2(MadeUp(tmp_path, [OURS]))


def test_des_vote_is_held_to_as_many_experts_as_dmoe_uses(tmp_path: Path) -> None:
    rows = comparison.rows_of_table_2(Effort(), MadeUp(tmp_path, [ORIGINAL, OURS]), "tiny-arithmetic")
    (matched,) = [run for run in rows if run.name == runs.MATCHED]
    assert matched.routing == {"routing": "des-vote", "des_beta": 25 / 256}
    unknown = comparison.rows_of_table_2(Effort(), MadeUp(tmp_path, [ORIGINAL]), "tiny-arithmetic")
    assert runs.MATCHED not in [run.name for run in unknown]


def test_an_accuracy_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    content = comparison.table_2(MadeUp(tmp_path, [ORIGINAL, evaluated(runs.dmoe(0.6), 0, 25.0)]))
    assert cells(content, "dMoE (p = 0.6)")["Kept %"] == "–"


def test_expert_memory_is_the_bytes_of_distinct_experts_in_all_layers(tmp_path: Path) -> None:
    content = costs.figure_5a(MadeUp(tmp_path, [ORIGINAL, OURS]))
    assert content.numbers["bytes"] == {"original": 3 * 100 * 1000, "dmoe-p0.6": 3 * 25 * 1000}
    assert cells(content, "dMoE (p = 0.6)") == {"Routing": "dMoE (p = 0.6)", "MB": "0.07", "Change": "−75.0 %"}
    assert isinstance(content.parts[0], Drawn)


def rounds(seconds: list[float], steps: int = 10, moved: int = 4_000_000) -> list[dict[str, float]]:
    keys = ("seconds", "denoise_seconds", "moe_seconds")
    return [{**dict.fromkeys(keys, one), "steps": steps, "tokens": 5, "bytes_moved": moved} for one in seconds]


def test_speed_is_compared_round_by_round(tmp_path: Path) -> None:
    data = MadeUp(tmp_path, [])
    names = [run.name for run in costs.compared(data.study)]
    others = {name: rounds([1.0, 1.0, 1.0]) for name in names}
    one = {"prompts": 2, "slots": {"base": 768}, "rounds": {**others, "original": rounds([2.0, 4.0, 40.0])}}
    data.results["speed"] = {"whole": one, "tight": {**one, "slots": {"base": 77}}}
    speed = costs.figure_5b(data).numbers["whole"]["dmoe-p0.6"]
    assert (speed["speed_up"], speed["least"], speed["most"]) == (4.0, 2.0, 40.0)
    assert speed["answer_ms"] == 500.0
    assert speed["step_ms"] == 100.0
    assert speed["megabytes_per_answer"] == 2.0


def test_table_4_compares_at_the_same_block_length(tmp_path: Path) -> None:
    before, after = runs.of_block_length(16)
    made = [ORIGINAL, OURS, evaluated(before, 10, 60.0), evaluated(after, 10, 30.0)]
    content = ablations.table_4(MadeUp(tmp_path, made))
    ours = cells(content, "16 tokens, dMoE (p = 0.6)")
    assert ours["Change"] == "−50.0 %"
    assert ours["Kept %"] == "100.00"
    assert ours["kept %"] == "99.79"
    assert "the evaluation original-block8 on tiny-arithmetic" in content.missing


def test_table_3_and_figure_6_follow_p(tmp_path: Path) -> None:
    made = [ORIGINAL, OURS, evaluated(runs.dmoe(0.8), 16, 50.0), evaluated(runs.des_vote(0.1), 8, 24.0)]
    data = MadeUp(tmp_path, made)
    assert cells(ablations.table_3(data), "dMoE (p = 0.8)")["Kept %"] == "100.00"
    points = ablations.figure_6(data).numbers["tiny-arithmetic"]
    assert [(point["unique_experts"], point["accuracy"]) for point in points["dMoE"]] == [(25.0, 0.75), (50.0, 0.8)]
    assert [point["run"] for point in points["DES-V"]] == ["des-vote-b0.1"]


def test_options_are_held_against_plain_dmoe(tmp_path: Path) -> None:
    plain, bonus, *_ = runs.options(Effort())
    made = [evaluated(plain, 15, 25.0, moved=2_000_000), evaluated(bonus, 15, 20.0, moved=500_000)]
    row = cells(ablations.transfer_options(MadeUp(tmp_path, made)), bonus.label)
    assert row["MB moved / answer"] == "0.50"
    assert row["Change"] == "−75.0 %"
    assert row["Hit rate"] == "75.0 %"


def test_table_1_is_the_spread_over_all_steps(tmp_path: Path) -> None:
    content = observations.concentration(MadeUp(tmp_path, [ORIGINAL, OURS]))
    counts = [99, 101, 99, 101] * SAMPLES
    assert cells(content, "tiny-arithmetic, Original") == {
        "Task and routing": "tiny-arithmetic, Original",
        "Mean": "100.00",
        "Std": f"{statistics.pstdev(counts):.2f}",
        "CV": f"{100 * statistics.pstdev(counts) / 100:.2f} %",
    }
    assert cells(content, "paper: gsm8k, original")["CV"] == "17.09 %"


def test_steps_that_few_answers_reach_are_left_out() -> None:
    assert observations.by_step([[1, 2, 3], [4, 5], [6, 7]], 2) == [[1, 4, 6], [2, 5, 7]]
    assert observations.by_step([[1, 2]], 10) == [[1], [2]]


def test_masking_reports_the_correlation_of_its_points(tmp_path: Path) -> None:
    points = [(number // 4, 1, 0, number / 100, 2 * number / 100 + (number % 3) / 10) for number in range(80)]
    content = observations.masking(MadeUp(tmp_path, [], {"masking": {"token": points, "block": points}}))
    weights, rises = [point[3] for point in points], [point[4] for point in points]
    assert content.numbers["token"]["r"] == pytest.approx(statistics.correlation(weights, rises))
    assert content.numbers["token"]["problems"] == 20
    assert content.numbers["token"]["unmoved"] == pytest.approx(1 / 80)
    row = cells(content, "expert left out for one token")
    assert row["Pearson r"] == f"{content.numbers['token']['r']:.3f}"


def test_masking_without_any_effect_has_no_correlation(tmp_path: Path) -> None:
    points = [(0, 1, 0, 0.1, 0.0), (1, 1, 0, 0.2, 0.0)]
    content = observations.masking(MadeUp(tmp_path, [], {"masking": {"token": points, "block": points}}))
    assert cells(content, "expert left out for one token")["Pearson r"] == "–"


def test_moe_latency_is_fitted(tmp_path: Path) -> None:
    swept = [(unique, 0.5 + 0.02 * unique + noise) for unique in (8, 100, 200) for noise in (0.0, 0.0, 9.0)]
    real = [(unique, 1.0 + 0.03 * unique) for unique in (40, 50, 60)]
    data = MadeUp(
        tmp_path, [], {"moe-latency": {cache: {"swept": swept, "real": real} for cache in ("whole", "tight")}}
    )
    numbers = latency.moe_latency(data).numbers
    assert numbers["whole-swept"]["slope"] == pytest.approx(0.02), "an outlier moved the median"
    assert numbers["whole-swept"]["intercept"] == pytest.approx(0.5)
    assert numbers["tight-real"]["slope"] == pytest.approx(0.03)


def test_components_are_shares_of_their_total(tmp_path: Path) -> None:
    def bar(cache: str, routing: str, moe: float) -> dict[str, Any]:
        parts = {"moe": moe, "attention": 2.0, "other": 1.0, "total": moe + 3.0}
        return {"cache": cache, "routing": routing, "block_length": 32, **parts}

    bars = [bar(cache, *one) for cache in ("whole", "tight") for one in (("Original", 7.0), ("dMoE (p = 0.6)", 3.0))]
    content = latency.components(MadeUp(tmp_path, [], {"components": {"bars": bars}}))
    assert cells(content, "a: 32 tokens, Original")["MoE's share"] == "70.0 %"
    assert cells(content, "b: 32 tokens, dMoE (p = 0.6)")["MoE's share"] == "50.0 %"
    assert str(content.parts[0]).startswith("Under the original routing MoE takes 70 % to 70 % of a denoising step")


def test_the_papers_averages_are_those_it_prints() -> None:
    """§5.2 and §5.3: means of four benchmarks, and the shares saved and kept."""
    experts, accuracy = paper.ORIGINAL.of("tiny-arithmetic")
    assert (round(experts, 1), round(accuracy, 2)) == (69.5, 83.95)
    for length, saved, kept in ((32, 76.15, 99.55), (24, 72.97, 98.62), (16, 68.46, 99.79), (8, 53.97, 98.81)):
        before, after = (row.of("tiny-arithmetic") for row in paper.TABLE_4[length])
        assert 100 * (1 - after[0] / before[0]) == pytest.approx(saved, abs=0.02)
        assert 100 * after[1] / before[1] == pytest.approx(kept, abs=0.02)
    assert paper.TABLE_2["dmoe-p0.6"].of("gsm8k") == (16.6, 88.6)
    assert paper.column("mmlu:high_school_mathematics") == "mmlu"


def test_the_facts_are_the_base_models(tmp_path: Path) -> None:
    assert MadeUp(tmp_path, []).facts("base") == FACTS
