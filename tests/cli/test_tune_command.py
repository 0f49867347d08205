from __future__ import annotations

import gzip
import json

import pytest

from offload_engine.config import load_config
from offload_engine.tune import calibration, search
from tests.cli.command_line import FAST, ROOT, complaint, dmoe_command, dmoe_run

TRACES = ROOT / "tests" / "data" / "traces"
MINI = ROOT / "tests" / "data" / "llada2-mini-config.json"
PROFILE = """name = "x"
device = "cpu"
memory_bandwidth = { value = 33e9, unit = "B/s", source = "made up" }
memory_efficiency = { value = 1, unit = "1", source = "made up" }
compute = { value = 400e9, unit = "FLOP/s", source = "made up" }
compute_efficiency = { value = 1, unit = "1", source = "made up" }
disk_bandwidth = { value = 1.6e9, unit = "B/s", source = "made up" }
"""


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(search, "SHARES", (1.0, 0.4))
    monkeypatch.setattr(search, "CHOICES", {"eviction": ("next-use", "lru"), "prefetch_depth": (2, 0)})
    monkeypatch.setattr(calibration, "STEPS", 4)
    monkeypatch.setattr(calibration, "NEW_TOKENS", 64)


@pytest.fixture
def profile(tmp_path):
    path = tmp_path / "profile.toml"
    path.write_text(PROFILE)
    return path


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


def test_a_recorded_trace_of_a_model_known_by_its_config(tmp_path, profile, traces):
    asked = ["--model", MINI, "--device", "cpu", "--gpu-mem", "8GB", "--max-context", "2048", "--profile", profile]
    once = ["--try-top-p", "0.6", "--try-hold-steps", "1"]
    found, config = tuned(tmp_path / "t.toml", traces["original"], *asked, *once)
    assert found["simulated"] is True
    assert {point["routing"] for point in found["points"]} == {"original, recorded", "dmoe p 0.6"}
    assert found["chosen"]["routing"] == "original, recorded"
    assert (config["gpu_mem"], config["routing"]) == (8 * 10**9, "original")
    assert found["tuned"]["step_seconds"] <= found["default"]["step_seconds"]

    found, config = tuned(tmp_path / "t.toml", traces["original"], *asked, *once, "--least-kept", "0.5")
    assert found["chosen"]["routing"] == "dmoe p 0.6"
    assert (config["routing"], config["top_p"], config["hold_steps"]) == ("dmoe", 0.6, 1)


def test_traces_of_two_routings_show_what_the_other_keeps(tmp_path, profile, traces):
    asked = ["--model", MINI, "--device", "cpu", "--gpu-mem", "8GB", "--profile", profile, "--try-top-p", "0.6"]
    found, _ = tuned(
        tmp_path / "t.toml", traces["dmoe"], traces["original"], *asked, "--routing", "dmoe", "--top-p", "0.6"
    )
    kept = {point["routing"]: point["kept"] for point in found["points"]}
    assert kept["original, recorded"] == 1.0
    assert 0.3 < kept["dmoe, recorded"] < 1.0
    assert found["chosen"]["routing"] == "dmoe, recorded"


def test_a_short_run_serves_where_no_trace_is_given_and_the_config_runs(speaking, tmp_path, profile):
    out = tmp_path / "t.toml"
    done = dmoe_command(
        "tune",
        "--model",
        speaking,
        *FAST,
        "--profile",
        profile,
        "--out",
        out,
        "--try-top-p",
        "0.6",
        "--plot",
        tmp_path / "p.png",
    )
    assert done.exit_code == 0, done.stderr
    assert "original, recorded" in done.stdout
    assert "All times are simulated" in done.stdout
    assert str(out) in done.stdout
    assert (tmp_path / "p.png").stat().st_size > 1000
    ran = dmoe_run("--config", out, "--max-new-tokens", "16", "-p", "hello")
    assert ran.exit_code == 0, ran.stderr


def test_auto_takes_no_more_than_makes_a_difference(speaking, tmp_path, profile):
    found, config = tuned(tmp_path / "t.toml", "--model", speaking, "--max-context", "512", "--profile", profile)
    assert config["gpu_mem"] == found["smallest"]["budget"]


def test_the_trace_of_another_model_is_refused(tmp_path, profile, traces):
    done = dmoe_command("tune", traces["dmoe"], "--profile", profile, "--out", tmp_path / "t")
    assert done.exit_code == 2
    assert "19 MoE layers of 256 experts" in complaint(done)
    assert not (tmp_path / "t").exists()


def test_a_share_of_votes_that_nothing_keeps(tmp_path, profile, traces):
    trace = traces["dmoe"]
    asked = ["--model", MINI, "--device", "cpu", "--gpu-mem", "8GB", "--profile", profile]
    done = dmoe_command("tune", trace, *asked, "--least-kept", "0.9", "--out", tmp_path / "t")
    assert done.exit_code == 2
    assert "no trace of original routing" in done.stderr.splitlines()[-1]


def test_a_config_that_can_not_be_written(tmp_path, profile, traces):
    trace = traces["dmoe"]
    asked = ["--model", MINI, "--device", "cpu", "--gpu-mem", "8GB", "--profile", profile]
    done = dmoe_command("tune", trace, *asked, "--out", tmp_path / "absent" / "t.toml")
    assert done.exit_code == 1
    assert "--out" in complaint(done)
