from __future__ import annotations

import json
from contextlib import closing

import pytest

from offload_engine import EngineConfig, MemoryBudgetError
from offload_engine.cli import plan as plan_module
from offload_engine.experts.storage.store import SafetensorsStore
from offload_engine.memory import Setup, plan_memory
from offload_engine.model.checkpoint import Checkpoint
from tests.cli.command_line import ROOT, complaint, dmoe_command
from tests.mini_config import mini

MINI = ROOT / "tests" / "data" / "llada2-mini-config.json"


def planned(*arguments):
    done = dmoe_command("plan", "--json", *arguments)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("size", ["6GB", "8GB", "12GB", "16GB"])
def test_llada2_mini_on_a_gpu_from_its_config_alone(size):
    found = planned("--model", MINI, "--gpu-mem", size, "--device", "cuda", "--host-mem", "20GB")
    budget = int(size[:-2]) * 10**9
    wanted = plan_memory(mini(), Setup(device="cuda", step_graphs=True), budget, host_mem=20 * 10**9)
    assert found["plan"] == wanted.as_dict()
    assert (found["dtype"], found["stored_dtype"]) == ("bfloat16", "bfloat16")


def test_the_table_is_the_answer():
    arguments = ["--model", MINI, "--gpu-mem", "8GB", "--device", "cpu", "--max-context", "2048", "--expert-mem", "1GB"]
    done = dmoe_command("plan", *arguments)
    wanted = plan_memory(mini(), Setup(device="cpu"), 8 * 10**9, max_context=2048, expert_mem=10**9)
    assert done.stdout.endswith(wanted.table() + "\n")
    assert done.stdout.startswith(f"{MINI} on cpu, bfloat16, experts stored as bfloat16, without weights")
    assert done.stderr == ""


def test_none_means_no_host_tier():
    arguments = ["--model", MINI, "--gpu-mem", "8GB", "--device", "cuda"]
    assert planned(*arguments, "--host-mem", "none")["plan"]["host_slots"] == 0
    assert planned(*arguments, "--host-mem", "9GB")["plan"]["host_slots"] > 1000


def test_a_directory_with_only_a_config(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(MINI.read_text()) | {"torch_dtype": "float32"}))
    found = planned("--model", tmp_path, "--gpu-mem", "9GB", "--device", "cpu", "--dtype", "bfloat16")
    wanted = plan_memory(mini(), Setup(device="cpu", itemsize=2, stored_itemsize=4), 9 * 10**9)
    assert found["plan"] == wanted.as_dict()
    assert (found["dtype"], found["stored_dtype"]) == ("bfloat16", "float32")


def test_weights_give_their_own_slot_size_and_dtype_and_are_not_loaded(speaking, monkeypatch):
    with closing(SafetensorsStore(plan_module.describe(str(speaking)).config, Checkpoint.open(speaking))) as store:
        slab_bytes = store.slab_bytes
    monkeypatch.setattr(Checkpoint, "read", None)
    monkeypatch.setattr(SafetensorsStore, "read", None)
    found = planned("--model", speaking, "--gpu-mem", "2GB", "--device", "cpu")
    assert (found["stored_dtype"], found["dtype"]) == ("float32", "float32")
    assert found["plan"]["slab_bytes"] == slab_bytes
    config_alone = planned("--model", speaking / "config.json", "--gpu-mem", "2GB", "--device", "cpu")
    assert config_alone["stored_dtype"] == "bfloat16"


def test_a_preset_plans_as_it_runs():
    preset = ROOT / "configs" / "gpu-8gb.toml"
    found = planned("--config", preset, "--model", MINI, "--device", "cuda")["plan"]
    config = EngineConfig.build(preset)
    assert (found["device"], found["budget"], found["host_budget"]) == ("cuda", config.gpu_mem, config.host_mem)
    assert found["context"] == config.max_context


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    monkeypatch.setattr(plan_module, "_free_vram", lambda index: 10 * 10**9 if index == 0 else None)
    found = planned("--model", MINI, "--host-mem", "none")["plan"]
    assert (found["device"], found["budget"]) == ("cuda", 9 * 10**9)
    other = dmoe_command("plan", "--model", MINI, "--device", "cuda:1")
    assert "'cuda:1'" in complaint(other)
    assert other.exit_code == 4
    monkeypatch.setattr(plan_module, "_free_vram", lambda index: None)
    assert planned("--model", MINI, "--gpu-mem", "8GB")["plan"]["device"] == "cpu"


def test_a_hidden_gpu_is_none(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert plan_module.device_kind("auto") == "cpu"


def test_fp16_is_computed_in_float32_on_a_cpu_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads(MINI.read_text()) | {"dtype": "float16"}))
    arguments = ["--model", tmp_path, "--gpu-mem", "12GB", "--host-mem", "none"]
    assert planned(*arguments, "--device", "cpu")["dtype"] == "float32"
    assert planned(*arguments, "--device", "cuda")["dtype"] == "float16"


def test_only_the_config_of_a_hub_id_is_asked_for(monkeypatch, tmp_path):
    asked = []
    (tmp_path / "config.json").write_text(MINI.read_text())

    def resolve(model, *, files):
        asked.append((model, tuple(files)))
        return tmp_path

    monkeypatch.setattr(plan_module, "resolve_model", resolve)
    found = planned("--model", "owner/name", "--gpu-mem", "8GB", "--device", "cpu")
    assert found["model"] == "owner/name"
    assert asked == [("owner/name", ("config.json",))]


def test_a_refusal_shows_the_table_and_the_smallest_budget():
    arguments = ["--model", MINI, "--device", "cpu", "--gpu-mem"]
    done = dmoe_command("plan", *arguments, "1GB")
    message = complaint(done)
    assert done.exit_code == 4
    assert "short by" in done.stderr
    smallest = int(message.split("(")[1].split(" bytes")[0])
    assert dmoe_command("plan", *arguments, smallest).exit_code == 0
    assert dmoe_command("plan", *arguments, smallest - 1).exit_code == 4
    with pytest.raises(MemoryBudgetError, match="smallest budget"):
        plan_memory(mini(), Setup(device="cpu"), smallest - 1)


def test_models_that_cannot_be_planned(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "notes.json").write_text("[1]")
    for model in (tmp_path, tmp_path / "missing", tmp_path / "notes.json"):
        done = dmoe_command("plan", "--model", model, "--gpu-mem", "8GB")
        assert str(model) in complaint(done)
        assert done.exit_code == 3


def test_what_sharing_with_the_cpu_takes_is_planned():
    asked = ["--model", MINI, "--gpu-mem", "8GB", "--device", "cuda", "--host-mem", "20GB"]
    off, auto = planned(*asked)["plan"], planned(*asked, "--cpu-experts", "auto")["plan"]
    assert auto["staging"] > off["staging"]
    assert auto["host_staging"] >= off["host_staging"] + off["slab_bytes"]
    none = ["--model", MINI, "--gpu-mem", "8GB", "--device", "cuda", "--host-mem", "none", "--cpu-experts"]
    assert planned(*none, "auto") == planned(*none, "off"), "there is nothing to compute from"
