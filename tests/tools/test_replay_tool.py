from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from offload_engine.simulate.forwards import forwards
from offload_engine.trace import read_trace
from tools.replay import main as replay
from tools.synthesise_trace import main as synthesise

SMALL = ["--moe-layers", "2", "--blocks", "2", "--steps", "3", "--block-length", "8"]


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "small.jsonl"
    done = CliRunner().invoke(synthesise, [str(path), "--routing", "original", *SMALL], catch_exceptions=False)
    assert done.output == f"{path}: 16 records\n"
    return path


def test_a_synthetic_trace_says_what_it_is(trace: Path) -> None:
    header, records = read_trace(trace)
    assert header.model.startswith("synthetic, of no model: tools/synthesise_trace.py, mask 1.2, ")
    assert header.layers == (1, 2)
    runs = list(forwards(records))
    assert [(str(run.info.phase), run.info.block, run.info.step) for run in runs] == [
        *(("denoise", 0, step) for step in range(3)),
        ("commit", 0, 3),
        *(("denoise", 1, step) for step in range(3)),
        ("commit", 1, 3),
    ]


def test_equal_seeds_give_equal_traces(trace: Path, tmp_path: Path) -> None:
    texts = []
    for seed in ("0", "1"):
        path = tmp_path / f"{seed}.jsonl"
        arguments = [str(path), "--routing", "original", *SMALL, "--seed", seed]
        CliRunner().invoke(synthesise, arguments, catch_exceptions=False)
        texts.append(path.read_text().splitlines()[1:])
    assert texts[0] == trace.read_text().splitlines()[1:]
    assert texts[0] != texts[1]


def test_adjacent_steps_are_alike_and_drift_makes_them_less_so(tmp_path: Path) -> None:
    shares = []
    for drift in ("0.2", "2"):
        path = tmp_path / f"{drift}.jsonl"
        arguments = [str(path), *SMALL, "--drift", drift, "--persistence", "0.5"]
        CliRunner().invoke(synthesise, arguments, catch_exceptions=False)
        first, second, *_ = forwards(read_trace(path)[1])
        before, after = (set(run.layers[0].experts) for run in (first, second))
        shares.append(len(before & after) / len(after))
    assert shares[0] > shares[1]


def test_the_table_has_a_row_per_combination(trace: Path) -> None:
    arguments = [str(trace), "--slots", "8", "--slots", "256", "--eviction", "lru", "--eviction", "next-use"]
    done = CliRunner().invoke(replay, [*arguments, "--predictor", "block-history"], catch_exceptions=False)
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.output.splitlines() if "│" in line]
    assert [row[:3] for row in rows] == [
        [slots, eviction, "block-history"] for slots in ("8", "256") for eviction in ("lru", "next-use")
    ]
    distinct = {
        (layer.layer, expert)
        for run in forwards(read_trace(trace)[1])
        for layer in run.layers
        for expert in layer.experts
    }
    assert rows[2][3] == rows[3][3] == str(len(distinct)), "with a slot for every expert each is missed once"


def test_what_is_no_trace_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "no.jsonl"
    path.write_text("nonsense\n")
    done = CliRunner().invoke(replay, [str(path)])
    assert done.exit_code == 1
    assert done.output.startswith(f"Error: {path}: no routing trace")
    assert len(done.output.splitlines()) == 1


def test_a_trace_without_records_is_refused(trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(trace.read_text().splitlines(keepends=True)[0])
    done = CliRunner().invoke(replay, [str(path)])
    assert (done.exit_code, done.output) == (1, f"Error: {path}: holds no records, so there is nothing to replay\n")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [(["new", "--routing", "roulette"], 2, "routing is 'roulette'"), (["far/off"], 1, "can't be opened for a trace")],
)
def test_what_cannot_be_synthesised_is_refused(tmp_path: Path, arguments: list[str], code: int, told: str) -> None:
    done = CliRunner().invoke(synthesise, [str(tmp_path / arguments[0]), *arguments[1:], *SMALL])
    assert done.exit_code == code
    assert told in done.output.splitlines()[-1]
