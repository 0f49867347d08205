from __future__ import annotations

import json

import pytest

from offload_engine.cli import doctor as doctor_module
from offload_engine.doctor import device_kernels, disk, graphics
from offload_engine.doctor.graphics import Card, Graphics
from offload_engine.kernels import grouped
from offload_engine.simulate.profile import load_profile
from tests.cli.command_line import ROOT, complaint, dmoe_command


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(disk, "LEAST_SAMPLE", 2**20)
    monkeypatch.setattr(graphics, "read_graphics", lambda: Graphics(absent="no NVIDIA driver"))


def findings(*arguments):
    done = dmoe_command("doctor", "--json", *arguments)
    found = json.loads(done.stdout)
    return done.exit_code, found["level"], {check["check"]: check for check in found["checks"]}


def test_a_line_for_everything_and_an_exit_code():
    done = dmoe_command("doctor", "--gpu-mem", "4GB")
    for check in (
        "driver",
        "torch",
        "processor",
        "CPU kernels",
        "threads",
        "RAM",
        "control groups",
        "ulimits",
        "pinned memory",
        "huge pages",
        "plan",
        "free space",
        "direct reads",
        "disk speed",
    ):
        assert f"  {check} " in done.stdout
    levels = {line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ") and "  " in line}
    assert done.exit_code == (6 if "problem" in levels else 5 if "warning" in levels else 0)


def test_json_says_the_same():
    code, level, checks = findings("--gpu-mem", "4GB")
    assert code == {"ok": 0, "warning": 5, "problem": 6}[level]
    assert checks["plan"]["found"].endswith("768 of 768 expert slots")
    assert all(set(check) == {"check", "level", "found", "way_out"} for check in checks.values())


def test_a_gpu_that_is_not_there_is_a_problem():
    code, level, checks = findings("--device", "cuda", "--gpu-mem", "8GB")
    assert (code, level, checks["driver"]["level"]) == (6, "problem", "problem")
    assert checks["plan"]["level"] == "ok", "a plan for a card that isn't there"


def test_a_gpu_without_a_torch_for_it(monkeypatch):
    card = Card("RTX 4060", 8 * 10**9, 7 * 10**9, (8, 9), 8, 8, 4)
    monkeypatch.setattr(graphics, "read_graphics", lambda: Graphics(driver="570", cuda=(12, 8), cards=(card,)))
    monkeypatch.setattr(doctor_module.torch.version, "cuda", None)
    monkeypatch.setattr(device_kernels, "read_cuda_kernels", lambda _card: (False, "l.so: run `make cuda`"))
    _, _, checks = findings("--device", "cpu", "--gpu-mem", "4GB")
    assert checks["torch"]["level"] == "warning"
    assert checks["GPU 0"]["found"].startswith("RTX 4060")
    assert "l.so: run" in checks["CUDA kernels"]["found"]
    assert "make cuda" in checks["CUDA kernels"]["way_out"]
    assert checks["Triton"]["found"].startswith("torch computes the experts of a GPU one by one: ")


def test_a_bad_choice_of_kernels_is_a_problem_with_its_way_out(monkeypatch):
    monkeypatch.setenv("OFFLOAD_ENGINE_TRITON", "maybe")
    monkeypatch.setattr(device_kernels, "read_cuda_kernels", lambda _card: (True, "built for it"))
    monkeypatch.setattr(doctor_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor_module.torch.cuda, "device_count", lambda: 1)
    grouped.why_not.cache_clear()
    found = list(doctor_module._device_kernels(0))
    assert [one.check for one in found] == ["CUDA kernels", "GPU kernels"]
    assert (found[1].found or found[1].way_out).startswith("OFFLOAD_ENGINE_TRITON='maybe'")
    assert found[1].level.word == "problem"


def test_a_model_that_is_not_there_and_a_budget_too_small(tmp_path):
    code, _, checks = findings("--model", tmp_path / "none")
    assert code == 6
    assert "no such model directory" in checks["model"]["found"]
    _, _, checks = findings("--gpu-mem", "1MB")
    assert "smallest budget" in checks["plan"]["found"]
    assert checks["plan"]["way_out"].startswith("set gpu_mem")


def test_a_config_alone_is_planned_for(monkeypatch):
    monkeypatch.setattr(doctor_module, "available_memory", lambda: 10 * 10**9)
    config = ROOT / "tests" / "data" / "llada2-mini-config.json"
    _, _, checks = findings("--model", config, "--device", "cuda", "--gpu-mem", "8GB", "--host-mem", "1000GB")
    assert "of 4864 expert slots" in checks["plan"]["found"]
    assert checks["plan"]["level"] == "warning", "its host tier takes 30 GB"
    assert "disk speed" in checks


def test_a_measured_profile_is_written(tmp_path, monkeypatch):
    from offload_engine.bench import bandwidth

    monkeypatch.setattr(bandwidth, "DRAM_BYTES", 2**20)
    monkeypatch.setattr(bandwidth, "GEMM_SIZE", 64)
    out = tmp_path / "profile.toml"
    done = dmoe_command("doctor", "--json", "--measure", "--out", out)
    profile = load_profile(str(out))
    assert json.loads(done.stdout)["profile"] == profile.model_dump(exclude_none=True)
    assert profile.disk_bandwidth.value > 0
    assert "--model of a larger one" in done.stderr


def test_out_alone_makes_no_sense(tmp_path):
    done = dmoe_command("doctor", "--out", tmp_path / "x")
    assert done.exit_code == 2
    assert "--measure" in complaint(done)
