"""From made-up runs to figures, bars and tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from offload_engine.bench.bars import Bar, bars
from offload_engine.bench.report import Findings, prepare, ratios, save
from offload_engine.bench.spec import Measured, Run
from offload_engine.bench.summary import disagreements, figures, quartiles
from offload_engine.errors import OffloadError, UsageError
from tests.bench.bench_data import BANDWIDTH, MACHINE, conditions, measured, ours, run


def everyone() -> list[Run]:
    return [
        run("bandwidth", BANDWIDTH),
        run("engine/dmoe", ours(1.0), group_peak=700, limit=1000),
        run("mmap/dmoe", measured(4.0)),
        run("mmap-random/dmoe", measured(3.5)),
        run("torch/dmoe", measured(3.9, answer="rounded otherwise")),
        run("unlimited/dmoe", ours(0.5, loads=0, bytes_moved=0, missed_bytes=0, belady_misses=0)),
        run("accelerate/dmoe", "killed by the kernel"),
        run("engine/dmoe", ours(2.0, peak_bytes=990), number=2, group_peak=800, limit=1000),
    ]


def test_rounds_are_pooled() -> None:
    one = figures(everyone())["engine/dmoe"]
    assert one.rounds == 2
    assert one.step == pytest.approx(1.4)  # of 0.8 1.0 1.0 1.2 1.6 2.0 2.0 2.4
    assert one.quartiles == pytest.approx((1.0, 2.0))
    assert one.tokens_per_second == pytest.approx(64 / 15)
    assert one.moved == pytest.approx(10_000)
    assert one.over_belady == pytest.approx(2.0)
    assert one.reads == pytest.approx(1.01)
    assert one.early == pytest.approx(0.25)
    assert one.hidden == pytest.approx(0.75)
    assert one.stall == pytest.approx(0.1)
    assert one.overhead == pytest.approx(1 - 0.5 - 0.1 - 0.2 - 0.05 - 0.1)
    assert (one.peak, one.group_peak) == (990, 800)
    assert one.over_plan == pytest.approx(0.99)


def test_the_bound_is_the_slowest_of_disk_memory_and_arithmetic() -> None:
    runs = everyone()
    assert figures(runs)["engine/dmoe"].bound == pytest.approx(0.2)  # 2e8 operations at 1e9 per second
    slow = BANDWIDTH.model_copy(update={"disk": {1: 1e4, 4: 2e4}})
    assert figures([run("bandwidth", slow), *runs[1:]])["engine/dmoe"].bound == pytest.approx(5000 / 2e4)
    assert figures(runs)["mmap/dmoe"].bound is None
    assert figures(runs[1:])["engine/dmoe"].bound is None


def test_what_has_no_executor_of_ours_moves_what_the_kernel_fetched() -> None:
    one = figures(everyone())["mmap/dmoe"]
    assert one.moved == pytest.approx(10_100)
    assert one.belady is one.stall is one.overhead is one.hidden is one.planned is None


def test_quartiles() -> None:
    assert quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_bars_hold_or_not_by_what_was_measured() -> None:
    found = {bar.what: bar for bar in bars(figures(everyone()), BANDWIDTH)}
    faster = found["dmoe: times faster than mmap"]
    assert faster.measured == pytest.approx(3.5 / 1.4)  # the better of the two
    assert faster.holds is True  # faster than what nobody else has is all that is wanted
    beside_torch = found["dmoe: times faster than torch"]
    assert beside_torch.measured == pytest.approx(3.9 / 1.4)
    assert beside_torch.holds is False
    assert found["original: times faster than torch"].holds is None
    assert found["dmoe: step time over that of an unlimited budget"].measured == pytest.approx(2.8)
    assert found["dmoe: missed bytes hidden behind compute"].holds is False
    assert found["dmoe: stalls, of step time"].holds is True
    assert found["dmoe: measured peak over planned"].holds is True
    assert found["dmoe: scheduling and Python, of step time"].holds is True
    start = found["dmoe: start to the first kernel"]
    assert start.most == pytest.approx(4e6 / 2e6 + 2)
    assert start.holds is True


def test_a_bar_with_two_sides_and_its_words() -> None:
    assert Bar("peak", 0.95, 0.9, 1.0).holds
    assert not Bar("peak", 1.01, 0.9, 1.0).holds
    assert not Bar("peak", 0.89, 0.9, 1.0).holds
    assert Bar("peak", None, 0.9, 1.0).wanted == "0.9 to 1"
    assert Bar("share", 0.123, most=0.5, unit="%").show(0.123) == "12.3 %"
    assert Bar("share", None, most=0.5, unit="%").show(None) == "not measured"


def test_answers_that_differ_from_the_engines_are_told() -> None:
    runs = [run("engine/dmoe", ours()), run("mmap/dmoe", measured(answer="other"))]
    runs += [run("accelerate/dmoe", measured(answer="rounded")), run("engine/dmoe+int4", ours(answer="coarse"))]
    runs += [run("engine/original", ours()), run("mlx-unlimited/original", measured(answer="rounded"))]
    runs += [run("engine/dmoe@2.00GB", ours(answer="wrong"))]
    assert disagreements(figures(runs)) == [
        "mmap/dmoe answers otherwise than engine/dmoe",
        "engine/dmoe@2.00GB answers otherwise than engine/dmoe",
    ]


def test_an_answer_cut_short_is_compared_with_none() -> None:
    runs = [run("engine/dmoe", ours()), run("mmap/dmoe", measured(answer="begun", cut_short=True))]
    assert disagreements(figures(runs)) == []
    assert disagreements(figures([run("engine/dmoe", ours(answer="begun", cut_short=True)), *runs[1:]])) == []
    whole = run("mmap/dmoe", measured(answer="other"), number=2)
    assert disagreements(figures([*runs, whole])) == ["mmap/dmoe answers otherwise than engine/dmoe"]


def test_a_contender_that_disagrees_with_itself_is_told() -> None:
    runs = [run("accelerate/dmoe", measured(answer="one")), run("accelerate/dmoe", measured(answer="two"), number=2)]
    assert disagreements(figures(runs)) == ["accelerate/dmoe answers otherwise from round to round"]
    runs = [run("engine/dmoe", ours()), run("engine/dmoe", ours(answer="other"), number=2)]
    told = disagreements(figures([*runs, run("mmap/dmoe", measured())]))
    assert told == ["engine/dmoe answers otherwise from round to round"]


def test_an_unlimited_budget_that_moved_experts_judges_nobody() -> None:
    runs = [run("engine/dmoe", ours()), run("unlimited/dmoe", ours(loads=7, bytes_moved=7000))]
    found = {bar.what: bar for bar in bars(figures(runs), BANDWIDTH)}
    assert found["dmoe: step time over that of an unlimited budget"].holds is None


def test_ratios_are_to_the_engine_of_the_same_routing() -> None:
    found = ratios(figures(everyone()))
    assert found["mmap/dmoe : engine/dmoe"] == pytest.approx(4 / 1.4)
    assert "engine/dmoe : engine/dmoe" not in found


def test_what_a_foreign_decoder_does_not_tell_apart_is_left_blank() -> None:
    foreign = Measured(
        step_seconds=[2.0],
        seconds={},
        window_seconds=2.5,
        tokens=4,
        disk_bytes=None,
        peak_bytes=950,
        answer="x",
        startup_seconds=1.0,
    )
    runs = [run("mlx/original", foreign), run("engine/original", ours())]
    found = figures(runs)["mlx/original"]
    assert (found.step, found.components, found.stall, found.bound, found.unique_experts) == (2.0, {}, None, None, None)
    details = Findings(conditions(), runs).markdown().split("\n\n")[3]
    row = next(line for line in details.splitlines() if line.startswith("| mlx/original"))
    assert [cell.strip() for cell in row.split("|")[2:-1]] == ["-"] * 11 + ["1", "-", "-"]


def test_the_tables_name_every_contender_and_every_failure() -> None:
    findings = Findings(conditions(absent={"peer": "not here"}, unlimited_because="no groups"), everyone())
    text = findings.markdown()
    for needle in ("| engine/dmoe ", "| mmap-random/dmoe ", "accelerate/dmoe failed: killed by the kernel", "Abacus 9"):
        assert needle in text
    assert "peer left out: not here" in text
    assert "no memory limit was in force: no groups" in text
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    assert "first time" not in text
    fresh = BANDWIDTH.model_copy(update={"fresh": 2.8e8})
    assert "memory touched for the first time 0.28 GB/s" in Findings(conditions(), [run("bandwidth", fresh)]).markdown()
    assert all(len({len(line) for line in table}) == 1 for table in tables), "columns are aligned"


def test_a_benchmark_in_which_nothing_was_measured_still_has_tables() -> None:
    findings = Findings(conditions(interrupted=True), [])
    assert "interrupted" in findings.markdown()
    assert json.loads(json.dumps(findings.as_dict()))["contenders"] == {}


def test_an_unlimited_budget_that_did_not_hold_everything_is_told() -> None:
    notes = Findings(conditions(), [run("unlimited/dmoe", ours(loads=7))]).notes
    assert notes == ["unlimited/dmoe: its budget did not hold everything; 7 experts were loaded"]


def test_a_busy_machine_is_told() -> None:
    machine = MACHINE | {"load_average": 3.5}
    notes = Findings(conditions(machine=machine), []).notes
    assert notes == ["the machine was busy when this began: load average 3.5 on 2 cores"]


def test_what_is_saved_can_be_read_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = save(Findings(conditions(), everyone()), tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    saved = json.loads((folder / "bench.json").read_text())
    assert saved["contenders"]["engine/dmoe"]["over_belady"] == pytest.approx(2.0)
    assert [Run.model_validate(one) for one in saved["runs"]] == everyone()
    assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert "bench.png" in told[0]


def test_without_matplotlib_there_is_no_plot_and_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "offload_engine.bench.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = save(Findings(conditions(), everyone()), tmp_path)
    assert "for want of matplotlib" in told[0]
    assert not (tmp_path / "bench.png").exists()


def test_a_plot_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "bench.png").mkdir()
    with pytest.raises(OffloadError, match=r"--out .*: can't be written \(Is a directory\)"):
        save(Findings(conditions(), everyone()), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md", "bench.png"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out .*file: is a file"):
        prepare(tmp_path / "file")
    with pytest.raises(OffloadError, match=r"--out .*below: can't be written"):
        prepare(tmp_path / "file" / "below")
    with pytest.raises(OffloadError, match=r"--out .*file"):
        save(Findings(conditions(), everyone()), tmp_path / "file")
