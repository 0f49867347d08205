from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest

from offload_engine.cli.simulate_command import simulation
from offload_engine.core import Phase
from offload_engine.memory import Setup, plan_memory
from offload_engine.simulate.profile import load_profile
from offload_engine.trace import TraceHeader, TraceRecord
from tests.checkpoints import tiny_config
from tests.cli.command_line import ROOT, complaint, dmoe_command
from tests.mini_config import mini

RECORDED = ROOT / "tests" / "data" / "traces" / "llada2-mini-dmoe.jsonl.gz"
HEADER = TraceHeader(
    layers=(1, 2), num_experts=16, top_k=4, expert_bytes=3 * 32 * 16 * 2, routing="original", block_length=8
)


def write_trace(path: Path, header: TraceHeader = HEADER, blocks: int = 3) -> Path:
    """Blocks of three steps, whose experts shift by one from step to step."""
    lines = [header.line()]
    for block in range(blocks):
        for step in range(3):
            experts = tuple((block + step + rank) % 16 for rank in range(6))
            for layer in header.layers:
                record = TraceRecord(
                    phase=Phase.DENOISE,
                    sequence=0,
                    block=block,
                    step=step,
                    layer=layer,
                    experts=experts,
                    scores=(6.0, 5.0, 4.0, 3.0, 2.0, 1.0),
                )
                lines.append(record.model_dump_json().encode() + b"\n")
    path.write_bytes(b"".join(lines))
    return path


def test_every_option_is_explained_here_and_in_the_manual() -> None:
    manual = (ROOT / "docs" / "simulation.md").read_text()
    for option in simulation.params:
        if isinstance(option, click.Option):
            assert option.help
            assert f"`{option.opts[-1]}" in manual, f"docs/simulation.md lacks {option.opts[-1]}"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "small.jsonl")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config()))
    return path


def simulated(*arguments: Any) -> dict[str, Any]:
    done = dmoe_command("simulate", "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_combination_is_simulated_and_says_so(trace: Path, model: Path) -> None:
    found = simulated(
        trace,
        *("--model", model, "--gpu", "rtx4060", "--gpu", "rtx3060", "--slots", 12, "--slots", 32),
        *("--eviction", "lru", "--eviction", "next-use", "--predictor", "none", "--predictor", "block-history"),
    )
    assert found["simulated"] is True
    assert len(found["results"]) == 2 * 2 * 2 * 2
    for result in found["results"]:
        figures, bounds = result["simulated"], result["simulated_bounds"]
        assert bounds["infinite"] <= figures["step"] * (1 + 1e-9) <= bounds["on_demand"]
        assert figures["steps"] == 6, "two blocks of three after the one that warms up"
    assert {result["setting"]["slots"] for result in found["results"]} == {12, 32}
    assert set(found["profiles"]) == {"rtx4060-8gb", "rtx3060-12gb"}
    assert found["profiles"]["rtx4060-8gb"]["link_efficiency"]["estimate"] is True


def test_misses_may_be_shared_with_the_cpu(trace: Path, model: Path) -> None:
    arguments = (trace, "--model", model, "--gpu", "rtx4060", "--slots", 12, "--predictor", "none")
    shares = ("--cpu-experts", "off", "--cpu-experts", "Auto", "--cpu-experts", "1")
    found = simulated(*arguments, *shares)["results"]
    assert [one["setting"]["cpu_experts"] for one in found] == ["off", "auto", 1.0]
    off, _auto, whole = (one["simulated"] for one in found)
    assert off["on_cpu"] == 0
    assert whole["on_cpu"] > 0
    table = dmoe_command("simulate", *arguments, *shares).stdout
    assert "CPU experts" in table
    assert "on CPU/step" in table
    assert "CPU experts" not in dmoe_command("simulate", *arguments).stdout


@pytest.mark.parametrize(("gpu", "reason"), [("cpu-disk", "has no GPU"), ("bare.toml", "lacks host_bandwidth and")])
def test_a_profile_that_says_nothing_of_the_cpu_is_refused(
    tmp_path: Path, trace: Path, model: Path, gpu: str, reason: str
) -> None:
    lines = load_profile("rtx4060").toml().splitlines(keepends=True)
    (tmp_path / "bare.toml").write_text("".join(line for line in lines if not line.startswith(("host_b", "host_c"))))
    place = str(tmp_path / gpu) if gpu.endswith(".toml") else gpu
    done = dmoe_command("simulate", trace, "--model", model, "--gpu", place, "--slots", 12, "--cpu-experts", "auto")
    assert done.exit_code == 2
    assert "--cpu-experts is auto, but profile" in done.stderr
    assert reason in done.stderr


def test_slots_come_from_the_planner(trace: Path) -> None:
    arguments = [RECORDED, "--gpu", "rtx4060", "--gpu-mem", "6GB", "--gpu-mem", "8GB", "--host-mem", "9GB"]
    found = simulated(*arguments, "--predictor", "none")
    for result, size in zip(found["results"], (6 * 10**9, 8 * 10**9), strict=True):
        wanted = plan_memory(mini(), Setup(device="cuda"), size, host_mem=9 * 10**9)
        assert (result["setting"]["slots"], result["setting"]["host_slots"]) == (wanted.slots, wanted.host_slots)
        assert result["memory"] == size
    assert found["results"][0]["simulated"]["step"] >= found["results"][1]["simulated"]["step"]
    assert found["model"] == "llada2-mini", "known by its shape"


def test_without_a_budget_the_card_is_filled_to_nine_tenths(trace: Path, model: Path) -> None:
    found = simulated(trace, "--model", model, "--gpu", "rtx4060")["results"][0]
    assert found["memory"] == int(load_profile("rtx4060").memory.value) * 9 // 10
    assert found["setting"]["slots"] == 32, "everything fits"


def test_the_table_says_that_nothing_was_measured(trace: Path, model: Path) -> None:
    done = dmoe_command("simulate", trace, "--model", model, "--gpu", "rtx4060", "--slots", "12")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("SIMULATED: no figure below was measured")
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| sim")] == [
        "simulated",
        "simulated, ms per step",
    ]
    assert lines[-1].startswith("rtx4060-8gb: NVIDIA GeForce RTX 4060 8 GB; estimated: memory_efficiency, ")
    assert done.stderr == ""


def test_a_processor_reads_from_disk(trace: Path, model: Path) -> None:
    found = simulated(trace, "--model", model, "--gpu", "cpu-disk", "--slots", "12")["results"][0]
    assert found["setting"]["host_slots"] is None
    told = complaint(dmoe_command("simulate", trace, "--model", model, "--gpu", "cpu-disk", "--host-mem", "1GB"))
    assert told == "--host-mem is 1GB, but cpu-disk has no host tier; leave it out"


def test_confining_a_trace_of_original_routing(trace: Path, model: Path) -> None:
    arguments = [trace, "--model", model, "--gpu", "rtx4060", "--slots", "32", "--min-experts", "2", "--warm-up", "0"]
    found = simulated(*arguments, "--top-p", "0.4", "--top-p", "1")["results"]
    assert [one["routing"] for one in found] == ["dmoe, p=0.4, estimated", "dmoe, p=1, estimated"]
    assert found[0]["simulated_bounds"]["belady_loads"] < found[1]["simulated_bounds"]["belady_loads"]


def test_a_disk_behind_two_bounce_buffers(trace: Path, model: Path) -> None:
    arguments = [trace, "--model", model, "--gpu", "laptop", "--gpu-mem", "4GB", "--host-mem", "none"]
    assert simulated(*arguments)["results"][0]["setting"]["host_slots"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--gpu", "abacus"], 2, "--gpu 'abacus' is no profile; choose one of cpu-disk, "),
        (["--gpu", "rtx4060", "--gpu-mem", "9GB"], 2, "--gpu-mem is 9000000000 bytes, but rtx4060-8gb has 8589934592"),
        (["--gpu", "rtx4060", "--gpu-mem", "lots"], 2, "--gpu-mem is 'lots', wanted a size"),
        (["--gpu", "rtx4060", "--slots", "8", "--gpu-mem", "8GB"], 2, "--gpu-mem has no effect beside --slots"),
        (["--gpu", "rtx4060", "--slots", "8", "--host-mem", "8GB"], 2, "--host-mem has no effect beside --slots"),
        (["--gpu", "rtx4060", "--slots", "8", "--min-experts", "8"], 2, "--min-experts has no effect without --top-p"),
        (["--gpu", "rtx4060", "--slots", "8", "--top-p", "1.5"], 2, "--top-p is 1.5, wanted more than 0"),
        (["--gpu", "rtx4060", "--slots", "8", "--eviction", "dice"], 2, "eviction"),
        (["--gpu", "rtx4060", "--slots", "8", "--warm-up", "3"], 2, "the trace has 3 blocks, of which 3 are to warm"),
        (["--gpu", "rtx4060", "--gpu-mem", "1MB"], 4, "gpu_mem is 1.00 MB, but the smallest budget"),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    trace: Path, model: Path, arguments: list[str], code: int, told: str
) -> None:
    done = dmoe_command("simulate", trace, "--model", model, *arguments)
    assert done.exit_code == code
    assert told in complaint(done)


def test_a_trace_of_dmoe_is_not_confined_further() -> None:
    done = dmoe_command("simulate", RECORDED, "--gpu", "rtx4060", "--top-p", "0.5")
    assert complaint(done).startswith("--top-p 0.5: the trace was recorded under 'dmoe' routing, and only a trace")


def test_a_model_that_is_not_the_traces_is_refused(trace: Path, model: Path) -> None:
    told = complaint(dmoe_command("simulate", trace, "--gpu", "rtx4060"))
    assert told.startswith("--model is missing: the trace has 2 MoE layers (1 to 2) of 16 experts of 3072 bytes, 4 per")
    told = complaint(dmoe_command("simulate", RECORDED, "--gpu", "rtx4060", "--model", model))
    assert told.endswith("which this model is not")


def test_a_trace_without_steps_is_refused(tmp_path: Path, model: Path) -> None:
    path = write_trace(tmp_path / "empty.jsonl", blocks=0)
    done = dmoe_command("simulate", path, "--gpu", "rtx4060", "--model", model)
    assert done.exit_code == 1
    assert complaint(done) == f"{path}: holds no denoising step, so there is nothing to simulate"


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    done = dmoe_command("simulate", tmp_path / "nowhere.jsonl", "--gpu", "rtx4060")
    assert done.exit_code == 1
    assert "nowhere.jsonl: can't be read as a routing trace" in complaint(done)


def test_an_int8_trace_has_smaller_slots(tmp_path: Path, model: Path) -> None:
    """Slots of one page in place of three: the tiny plan still holds all of them, at half the transfer."""
    half = HEADER.model_copy(update={"expert_bytes": HEADER.expert_bytes // 2})
    whole, stored = (write_trace(tmp_path / f"{number}.jsonl", one) for number, one in enumerate((HEADER, half)))
    steps = [
        simulated(path, "--model", model, "--gpu", "cpu-disk", "--slots", "8")["results"][0]["simulated"]["step"]
        for path in (whole, stored)
    ]
    assert steps[1] < steps[0]
