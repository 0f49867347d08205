"""What tables and figures say, counted again from made-up evaluations and measurements."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.evaluate.statistics import wilson
from tests.tools.analysis_data import FACTS, SAMPLES, MadeUp, evaluated
from tools.analysis import paper, runs
from tools.analysis.evaluations import Evaluated
from tools.analysis.figures import Drawn
from tools.analysis.matching import ATTEMPTS, search
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
    assert "the evaluation des-vote-keep25 on tiny-arithmetic" in content.missing
    assert len(content.missing) + len(table.rows) == len(runs.main_comparison(Effort())) + 1


def test_without_the_original_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="the evaluation original on tiny-arithmetic"):
        comparison.table_2(MadeUp(tmp_path, [OURS]))


def matched_row(tmp_path: Path, *made: Evaluated) -> list[runs.Run]:
    rows = comparison.rows_of_table_2(Effort(), MadeUp(tmp_path, [ORIGINAL, *made]), "tiny-arithmetic")
    return [run for run in rows if run.name.startswith(runs.MATCHED)]


def test_des_vote_gets_a_coreset_of_which_as_many_are_used_as_by_dmoe(tmp_path: Path) -> None:
    """A coreset of 25 uses 20 and one of 38 uses 33: 25 should be used of one of 30, and are, once it is 31."""
    known = [evaluated(runs.des_vote(0.10), 9, 20.0), evaluated(runs.des_vote(0.15), 9, 33.0)]
    assert matched_row(tmp_path, *known) == [], "dMoE's own count isn't known"
    (guessed,) = matched_row(tmp_path, OURS, *known)
    assert guessed.routing == {"routing": "des-vote", "des_beta": 30 / 256}
    first = evaluated(guessed, 9, 24.5)
    step = search(MadeUp(tmp_path, [OURS, *known, first]).finder, 256)
    assert step.best == first, "the nearest until there is a better one"
    assert step.following == runs.matched_des_vote(31, 256)
    enough = evaluated(step.following, 9, 25.5)
    assert search(MadeUp(tmp_path, [OURS, *known, first, enough]).finder, 256) == (enough, None)
    assert matched_row(tmp_path, OURS, *known, first, enough) == [enough.run]


@given(st.floats(1, 250), st.floats(0.3, 1.0), st.floats(0, 0.4))
def test_the_search_ends_and_finds_no_fewer_experts_than_dmoe(target: float, share: float, bend: float) -> None:
    """Whatever share of a coreset is used, as long as it rises with the coreset's size."""

    def find(run: runs.Run) -> Evaluated | None:
        if run.name == runs.OURS:
            return evaluated(run, 9, target)
        keep = runs.coreset_of(run.routing["des_beta"], 256)
        asked.append(run.name)
        return evaluated(run, 9, share * keep * (1 - bend * keep / 256))

    asked: list[str] = []
    found = search(find, 256)
    assert found.best is not None
    assert found.following is None
    assert len({name for name in asked if name.startswith(runs.MATCHED)}) <= ATTEMPTS
    possible = share * 256 * (1 - bend)
    if bend == 0 and target <= possible:
        assert found.best.unique >= target - 1e-6
        assert found.best.unique - target < share + 1e-6, "more experts than it takes"


def test_the_lesson_says_which_of_the_two_keeps_more(tmp_path: Path) -> None:
    for right, word in ((10, "which is less"), (15, "as much"), (16, "which is more")):
        made = [ORIGINAL, OURS, evaluated(runs.matched_des_vote(25, 256), right, 25.0)]
        text = comparison.table_2(MadeUp(tmp_path, made)).parts[-1]
        assert f"DES-Vote with 25.0 experts (dMoE: 25.0) keeps {100 * right / 16:.2f} %, {word}" in str(text)


def test_nothing_is_called_saved_that_is_not(tmp_path: Path) -> None:
    more = evaluated(runs.dmoe(0.6), 15, 110.0)
    assert "10.0 % more experts" in str(comparison.table_2(MadeUp(tmp_path, [ORIGINAL, more])).parts[-1])


def test_an_accuracy_of_nothing_keeps_nothing(tmp_path: Path) -> None:
    content = comparison.table_2(MadeUp(tmp_path, [evaluated(runs.original(), 0, 100.0), OURS]))
    assert cells(content, "dMoE (p = 0.6)")["Kept %"] == "–"


def test_expert_memory_is_the_bytes_of_distinct_experts_in_all_layers(tmp_path: Path) -> None:
    content = costs.figure_5a(MadeUp(tmp_path, [ORIGINAL, OURS]))
    assert content.numbers["tiny-arithmetic"] == {"original": 3 * 100 * 1000, "dmoe-p0.6": 3 * 25 * 1000}
    assert cells(content, "dMoE (p = 0.6)") == {"Routing": "dMoE (p = 0.6)", "MB": "0.07", "Change": "−75.0 %"}
    assert isinstance(content.parts[0], Drawn)


def rounds(seconds: list[float], steps: int = 10, moved: int = 4_000_000) -> list[dict[str, float]]:
    keys = ("seconds", "denoise_seconds", "moe_seconds")
    return [{**dict.fromkeys(keys, one), "steps": steps, "tokens": 5, "bytes_moved": moved} for one in seconds]


def test_speed_is_compared_round_by_round(tmp_path: Path) -> None:
    data = MadeUp(tmp_path, [])
    names = [run.name for run in costs.compared(data.study)]
    others = {name: rounds([1.0, 1.0, 1.0]) for name in names}
    one = {"prompts": 2, "slots": 768, "rounds": {**others, "original": rounds([2.0, 4.0, 40.0])}}
    data.results["speed"] = {"whole": one, "tight": {**one, "slots": 77}}
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
        tmp_path,
        [],
        {"moe-latency": {cache: {"slots": 9, "swept": swept, "real": real} for cache in ("whole", "tight")}},
    )
    numbers = latency.moe_latency(data).numbers
    assert numbers["whole-swept"]["slope"] == pytest.approx(0.02), "an outlier moved the median"
    assert numbers["whole-swept"]["intercept"] == pytest.approx(0.5)
    assert numbers["tight-real"]["slope"] == pytest.approx(0.03)


def test_components_are_shares_of_their_total(tmp_path: Path) -> None:
    def bar(cache: str, routing: str, moe: float) -> dict[str, Any]:
        parts = {"moe": moe, "attention": 2.0, "other": 1.0, "total": moe + 3.0}
        return {"cache": cache, "slots": 77, "routing": routing, "block_length": 32, **parts}

    bars = [bar(cache, *one) for cache in ("whole", "tight") for one in (("Original", 7.0), ("dMoE (p = 0.6)", 3.0))]
    content = latency.components(MadeUp(tmp_path, [], {"components": {"bars": bars}}))
    assert cells(content, "a: 32 tokens, Original")["MoE's share"] == "70.0 %"
    assert cells(content, "b: 32 tokens, dMoE (p = 0.6)")["MoE's share"] == "50.0 %"
    assert str(content.parts[0]).startswith("Under the original routing MoE takes 70 % of a denoising step")


@pytest.mark.parametrize(
    ("moe", "said"),
    [
        ((7.0, 7.0), "it does here, too"),
        ((2.0, 3.0), "here it never takes more than half"),
        ((1.0, 9.0), "here it takes more than half in 1 of 2 settings"),
    ],
)
def test_moe_is_said_to_dominate_only_where_it_does(tmp_path: Path, moe: tuple[float, float], said: str) -> None:
    bars = [
        {"cache": cache, "slots": 7, "routing": "Original", "block_length": 32, "moe": one, "total": one + 3.0}
        | {"attention": 2.0, "other": 1.0}
        for cache, one in zip(("whole", "tight"), moe, strict=True)
    ]
    content = latency.components(MadeUp(tmp_path, [], {"components": {"bars": bars}}))
    assert said in str(content.parts[0])


def test_latency_is_said_to_rise_only_where_it_does(tmp_path: Path) -> None:
    rising, falling = ([(unique, 9.0 + sign * 0.01 * unique) for unique in (8, 100, 200)] for sign in (1, -1))
    caches = {"whole": {"slots": 768, "swept": rising, "real": falling}}
    caches["tight"] = {"slots": 77, "swept": falling, "real": falling}
    drawn = latency.moe_latency(MadeUp(tmp_path, [], {"moe-latency": caches})).parts[1]
    assert isinstance(drawn, Drawn)
    assert drawn.alt.count("not rising") == 3
    assert "made-up routings, cache of 768: rising, 10.0 µs per expert" in drawn.alt


def test_a_sweep_of_single_points_is_still_a_sweep(tmp_path: Path) -> None:
    """What is fitted depends on the kind of series, not on how its points look."""
    swept = [(8, 1.0), (100, 2.0), (200, 3.0), (200, 3.0), (200, 99.0)]
    caches = {cache: {"slots": 9, "swept": swept, "real": swept} for cache in ("whole", "tight")}
    numbers = latency.moe_latency(MadeUp(tmp_path, [], {"moe-latency": caches})).numbers
    assert numbers["whole-swept"]["slope"] == pytest.approx(0.0104, abs=1e-4)
    assert numbers["whole-real"]["slope"] > 0.1


@pytest.mark.parametrize(("top_p", "said"), [(0.5, "distilled with p = 0.5"), (None, "doesn't say")])
def test_table_3_says_what_the_checkpoint_says(tmp_path: Path, top_p: float | None, said: str) -> None:
    facts = {**FACTS, "distilled_top_p": top_p}
    data = MadeUp(tmp_path, [ORIGINAL, OURS], {"model": {"base": FACTS, "distilled": facts}})
    assert said in str(ablations.table_3(data).parts[0])


def test_figure_6_counts_the_points_above_the_line(tmp_path: Path) -> None:
    line = [evaluated(runs.des_vote(0.10), 4, 20.0), evaluated(runs.des_vote(0.15), 20, 40.0)]
    ours = [evaluated(runs.dmoe(p), right, unique) for p, right, unique in ((0.6, 9, 25.0), (0.7, 9, 35.0))]
    content = ablations.figure_6(MadeUp(tmp_path, [ORIGINAL, *line, *ours, evaluated(runs.dmoe(0.8), 20, 90.0)]))
    assert content.numbers["tiny-arithmetic"]["dmoe_above"]["DES-V"] == {"above": 1, "of": 2}
    assert "1 of the 2 dMoE settings that fall within DES-V's range" in str(content.parts[0])


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
