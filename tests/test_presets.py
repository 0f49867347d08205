"""The presets of configs/ load, and hold LLaDA2.0-mini at their budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_engine.config import EngineConfig, load_config, parse_bytes, presets
from offload_engine.errors import ConfigError
from offload_engine.memory import MemoryPlan, Setup, plan_memory
from tests.mini_config import mini

CONFIGS = Path(__file__).parent.parent / "configs"
MACHINES = ["gpu-6gb", "gpu-8gb", "gpu-12gb", "gpu-16gb", "gpu-24gb", "cpu-8gb", "cpu-16gb", "cpu-32gb"]


def plan_of(name: str) -> tuple[EngineConfig, MemoryPlan]:
    config = EngineConfig.build(CONFIGS / f"{name}.toml")
    assert isinstance(config.gpu_mem, int)
    assert not isinstance(config.host_mem, str) or config.device == "cpu"
    setup = Setup(device="cuda" if name.startswith("gpu") else "cpu", prefill_chunk=config.prefill_chunk)
    host_mem = config.host_mem if isinstance(config.host_mem, int) else None
    return config, plan_memory(mini(), setup, config.gpu_mem, max_context=config.max_context, host_mem=host_mem)


def test_there_is_one_for_every_machine_class_and_no_other() -> None:
    assert sorted(path.stem for path in CONFIGS.iterdir()) == sorted(MACHINES)


@pytest.mark.parametrize("name", MACHINES)
def test_it_holds_llada2_mini(name: str) -> None:
    config, plan = plan_of(name)
    kind, size = name.split("-")
    assert config.device == {"gpu": "auto", "cpu": "cpu"}[kind], "a GPU preset still runs where there is none"
    assert plan.total <= plan.budget < parse_bytes(size)
    assert plan.slots_per_layer >= 20, "a dMoE block wants about 14 experts per layer"
    assert not plan.warnings
    assert (plan.host_slots > 0) == (kind == "gpu")


@pytest.mark.parametrize("name", MACHINES)
def test_every_value_says_why(name: str) -> None:
    paragraphs = (CONFIGS / f"{name}.toml").read_text().strip().split("\n\n")
    explained = [text for text in paragraphs if "=" in text.splitlines()[-1] and text.startswith("# ")]
    assert len(explained) == len(load_config(CONFIGS / f"{name}.toml")) - 1, "only `device` needs no word"


def test_a_larger_machine_holds_more() -> None:
    for kind in ("gpu", "cpu"):
        slots = [plan_of(name)[1].slots for name in MACHINES if name.startswith(kind)]
        assert slots == sorted(slots)
        assert len(set(slots)) == len(slots)


@pytest.mark.parametrize("name", MACHINES)
def test_it_is_found_by_its_name(name: str) -> None:
    assert presets()[name] == CONFIGS / f"{name}.toml"
    assert load_config(Path(name)) == load_config(CONFIGS / f"{name}.toml")


def test_a_file_of_that_name_wins_and_an_unknown_name_is_told_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cpu-8gb").write_text("top_p = 0.25")
    assert load_config(Path("cpu-8gb")) == {"top_p": 0.25}
    with pytest.raises(ConfigError, match=r"cpu-7gb: not found; wanted a TOML file .*, or one of cpu-16gb, .*gpu-8gb$"):
        load_config(Path("cpu-7gb"))
