from __future__ import annotations

import gzip
import itertools
import json
import re
import shutil
from types import SimpleNamespace

import pytest

from offload_engine.cli import progress
from offload_engine.config import EngineConfig, load_config
from offload_engine.engine.learned import recall_tuning
from offload_engine.trace import read_trace
from offload_engine.tune import calibration, search
from offload_engine.tune.routing import steps_of
from tests.cli.command_line import FAST, ROOT, complaint, dmoe_command, dmoe_run

TRACES = ROOT / "tests" / "data" / "traces"
MINI = ["--model", ROOT / "tests" / "data" / "llada2-mini-config.json"]
ONE_P = ["--try-top-p", "0.6", "--try-hold-steps", "1"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(search, "SHARES", (1.0, 0.4))
    monkeypatch.setattr(search, "CHOICES", {"eviction": ("next-use", "lru"), "prefetch_depth": (2, 0)})
    monkeypatch.setattr(calibration, "STEPS", 4)
    monkeypatch.setattr(calibration, "NEW_TOKENS", 64)


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """The first forwards of recorded traces, by routing."""
    found = {}
    for routing in ("original", "dmoe"):
        with gzip.open(TRACES / f"llada2-mini-{routing}.jsonl.gz", "rb") as file:
            lines = [next(file) for _ in range(1 + 19 * 4)]
        found[routing] = tmp_path_factory.mktemp("traces") / f"{routing}.jsonl"
        found[routing].write_bytes(b"".join(lines))
    return found


def tuned(out, *arguments):
    done = dmoe_command("tune", "--json", "--out", out, *arguments)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout), load_config(out)


def test_a_recorded_trace_for_a_card_that_is_not_here(tmp_path, traces):
    asked = [traces["original"], *MINI, "--gpu", "rtx4060", "--gpu-mem", "6GB", "--max-context", "2048", *ONE_P]
    found, config = tuned(tmp_path / "t.toml", *asked)
    assert found["simulated"] is True
    assert "RTX 4060" in found["source"]
    assert {point["routing"] for point in found["points"]} == {"original, recorded", "dmoe p=0.6, estimated"}
    assert found["chosen"]["routing"] == "original, recorded"
    assert (config["gpu_mem"], config["routing"], config["max_context"]) == (6 * 10**9, "original", 2048)
    assert found["chosen"]["step"] <= found["chosen"]["default"]["step"]

    found, config = tuned(tmp_path / "t.toml", *asked, "--least-kept", "0.5")
    assert found["chosen"]["routing"] == "dmoe p=0.6, estimated"
    assert (config["routing"], config["top_p"], config["hold_steps"]) == ("dmoe", 0.6, 1)


def test_misses_are_shared_with_the_cpu_where_that_pays(tmp_path, traces):
    asked = [traces["original"], *MINI, "--gpu", "rtx4060", "--gpu-mem", "6GB", "--max-context", "2048", *ONE_P]
    found, config = tuned(tmp_path / "t.toml", *asked, "--host-mem", "33GB")
    chosen = found["chosen"]
    assert (config["cpu_experts"], chosen["cpu_experts"], chosen["knobs"]["cpu_experts"]) == ("auto", "auto", "auto")
    times = {mode: figures["step"] for mode, figures in chosen["by_cpu_experts"].items()}
    assert times["auto"] == chosen["step"] < 0.8 * times["off"]
    assert {point["cpu_experts"] for point in found["points"]} <= {"off", "auto"}
    assert all((point["on_cpu"] > 0) == (point["cpu_experts"] == "auto") for point in found["points"])

    off, config = tuned(tmp_path / "t.toml", *asked, "--host-mem", "33GB", "--cpu-experts", "off")
    assert config["cpu_experts"] == "off", "somebody has said so"
    assert off["chosen"]["step"] == pytest.approx(times["off"], rel=0.01)
    for elsewhere in (["--host-mem", "none"], ["--gpu", "cpu-disk", "--gpu-mem", "8GB"]):
        found, config = tuned(tmp_path / "t.toml", *asked, *elsewhere)
        assert config["cpu_experts"] == "off"
        assert list(found["chosen"]["by_cpu_experts"]) == ["off"]


def test_the_memory_of_a_card_is_its_budget_where_none_is_given(tmp_path, traces):
    found, config = tuned(tmp_path / "t.toml", traces["dmoe"], *MINI, "--gpu", "rtx3060")
    largest = max(point["budget"] for point in found["points"])
    assert 10 * 10**9 < largest < 12 * 2**30
    assert config["gpu_mem"] == found["smallest"]["budget"] == found["chosen"]["budget"], "what makes a difference"


def test_traces_of_two_routings_show_what_the_other_keeps(tmp_path, traces):
    asked = [traces["dmoe"], traces["original"], *MINI, "--gpu", "cpu-disk", "--gpu-mem", "8GB", *ONE_P]
    found, _ = tuned(tmp_path / "t.toml", *asked, "--routing", "original")
    kept = {point["routing"]: point["kept"] for point in found["points"]}
    assert kept["original, recorded"] == pytest.approx(1.0)
    assert 0.3 < kept["dmoe, recorded"] < 1.0
    assert found["chosen"]["routing"] == "original, recorded"
    found, config = tuned(tmp_path / "t.toml", *asked, "--routing", "dmoe", "--top-p", "0.7")
    assert found["chosen"]["routing"] == "dmoe, recorded"
    assert config["top_p"] == 0.7


def test_a_short_run_serves_where_no_trace_is_given_and_the_config_runs(speaking, tmp_path):
    out, picture = tmp_path / "t.toml", tmp_path / "p.png"
    asked = ["--model", speaking, *FAST, "--gpu", "cpu-disk", "--plot", picture, *ONE_P]
    done = dmoe_command("tune", *asked, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert "original, recorded" in done.stdout
    assert "simulated" in done.stdout
    assert str(out) in done.stdout
    assert picture.stat().st_size > 1000
    ran = dmoe_run("--config", out, "--max-new-tokens", "16", "-p", "hello")
    assert ran.exit_code == 0, ran.stderr


def test_everything_that_takes_long_tells_rate_and_time_left(speaking, tmp_path, monkeypatch):
    looks = itertools.count(0.0, 6.0)  # at each look at the clock a line is due
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    asked = ["--model", speaking, *FAST, "--gpu", "cpu-disk", *ONE_P]
    done = dmoe_command("tune", *asked, "--out", tmp_path / "t.toml")
    assert done.exit_code == 0, done.stderr
    rate_and_rest = r"\d+ of \d+, [\d.]+/s, [\d:]+( s)? left$"
    for doing in ("recording, denoising steps", "trying options", "replaying", "trying options once more"):
        assert re.search(rf"^{doing}: {rate_and_rest}", done.stderr, re.MULTILINE), (doing, done.stderr)


def test_how_many_steps_are_recorded_is_told_as_they_are_taken(speaking, tmp_path):
    told = []
    config = EngineConfig.build(None, model=str(speaking), gpu_mem="4GB", max_context=256, routing="dmoe")
    traces = calibration.record(config, tmp_path, lambda *now: told.append(now))
    assert [trace.name for trace in traces] == ["original.jsonl", "dmoe.jsonl"]
    recorded = [steps_of(tuple(read_trace(trace)[1])) for trace in traces]
    assert told[-1] == (sum(recorded), sum(recorded)), "all of them in the end"
    assert (recorded[0], recorded[0] + calibration.STEPS) in told
    assert {done for done, _total in told} == set(range(1, sum(recorded) + 1))
    assert all(done <= total for done, total in told)
    assert [done for done, _total in told] == sorted(done for done, _total in told)


def test_without_a_tokenizer_prompts_are_random_and_this_machine_is_measured(mute, tmp_path, monkeypatch):
    from offload_engine.bench import bandwidth

    monkeypatch.setattr(bandwidth, "DRAM_BYTES", 2**20)
    monkeypatch.setattr(bandwidth, "GEMM_SIZE", 64)
    found, config = tuned(tmp_path / "t.toml", "--model", mute, *FAST, *ONE_P)
    assert config["model"] == str(mute)
    assert "recorded under original routing, replayed on " in found["source"]
    assert all(point["step"] > 0 for point in found["points"])


def test_the_trace_of_another_model_is_refused(tmp_path, traces, speaking):
    done = dmoe_command("tune", traces["dmoe"], "--model", speaking, "--gpu", "cpu-disk", "--out", tmp_path / "t")
    assert done.exit_code == 2
    assert "the trace has 19 MoE layers" in complaint(done)
    assert not (tmp_path / "t").exists()


def test_traces_of_different_models_are_refused(tmp_path, traces):
    other = tmp_path / "other.jsonl"
    other.write_bytes(traces["dmoe"].read_bytes().replace(b'"top_k":8', b'"top_k":4', 1))
    done = dmoe_command("tune", traces["dmoe"], other, "--gpu", "cpu-disk", "--out", tmp_path / "t")
    assert done.exit_code == 2
    assert "has top_k 4" in complaint(done)


def test_a_trace_without_a_step_is_refused(tmp_path, traces):
    lines = traces["dmoe"].read_bytes().splitlines(keepends=True)
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(lines[0] + b"".join(line for line in lines if b"prefill" in line))
    done = dmoe_command("tune", empty, "--gpu", "cpu-disk", "--out", tmp_path / "t")
    assert done.exit_code == 2
    assert "no denoising step" in complaint(done)


def test_a_share_of_votes_that_nothing_keeps(tmp_path, traces):
    asked = [traces["dmoe"], *MINI, "--gpu", "cpu-disk", "--gpu-mem", "8GB", "--least-kept", "0.9"]
    done = dmoe_command("tune", *asked, "--out", tmp_path / "t")
    assert done.exit_code == 2
    assert "no trace of original routing" in complaint(done)


def test_a_config_that_can_not_be_written(tmp_path, traces):
    asked = [traces["dmoe"], *MINI, "--gpu", "cpu-disk", "--gpu-mem", "8GB"]
    done = dmoe_command("tune", *asked, "--out", tmp_path / "absent" / "t.toml")
    assert done.exit_code == 1
    assert "--out" in complaint(done)


def test_what_was_found_for_a_card_is_kept_for_auto(tmp_path, speaking, monkeypatch):
    directory = tmp_path / "model"
    shutil.copytree(speaking, directory)
    asked = ["--model", directory, "--max-context", "256", "--gpu", "rtx4060", *ONE_P]
    found, _ = tuned(tmp_path / "t.toml", *asked)
    assert found["remembered"] == str(directory / ".tuned.json")
    (kept,) = recall_tuning(directory)
    assert kept.device == "NVIDIA GeForce RTX 4060"
    assert kept.slots == found["smallest"]["slots"]
    assert kept.knobs == found["chosen"]["knobs"]
    assert kept.routing == {"routing": found["smallest"]["settings"]["routing"]}
    (directory / ".tuned.json").unlink()
    for changed in (["--gpu", "cpu-disk"], ["--gpu-mem", "4GB"], ["--expert-mem", "1MB"]):
        found, _ = tuned(tmp_path / "t.toml", *asked, *changed)
        assert found["remembered"] is None, changed
    assert not recall_tuning(directory)
