"""Who runs, under which name, with which options."""

from __future__ import annotations

from pathlib import Path

import pytest

from offload_engine.bench import lineup
from offload_engine.bench.lineup import Request, default_budget, line_up
from offload_engine.bench.spec import Workload
from offload_engine.config import EngineConfig
from offload_engine.errors import UsageError

GB = 10**9


@pytest.fixture(autouse=True)
def with_every_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineup.importlib.util, "find_spec", lambda name: name in ("accelerate", "mlx_vlm") or None)


def request(limit: int | None = 8 * GB, **changes: object) -> Request:
    config = EngineConfig(model="somewhere", threads=3, **changes.pop("config", {}))  # type: ignore[arg-type]
    return Request(config=config, workload=Workload(), limit=limit, **changes)  # type: ignore[arg-type]


def test_both_routings_meet_every_rival() -> None:
    names = [task.name for task in line_up(request()).tasks]
    kinds = ["engine", "mmap", "mmap-random", "torch", "torch-random", "accelerate"]
    mlx = {"mlx/original", "mlx-unlimited/original"}
    everyone = ["bandwidth", *(f"{kind}/{routing}" for routing in ("original", "dmoe") for kind in kinds)]
    roomy = ["mlx-unlimited/original", "unlimited/original", "unlimited/dmoe"]
    assert [name for name in names if name not in mlx] == [*everyone, *roomy[1:]]
    assert names[-3:] == roomy, "who gives back most comes last"
    assert mlx < set(names)


def test_mlx_runs_without_the_limit_too_where_there_is_one() -> None:
    lined = {task.name: task.limited for task in line_up(request(only=["mlx*"])).tasks}
    assert lined == {"mlx/original": True, "mlx-unlimited/original": False}
    assert [task.name for task in line_up(request(limit=None, only=["mlx*"])).tasks] == ["mlx/original"]


def test_the_engine_gets_what_the_limit_leaves_and_an_unlimited_one_everything() -> None:
    tasks = {task.name: task for task in line_up(request(config={"expert_mem": "1GB"})).tasks}
    engine, unlimited = tasks["engine/dmoe"], tasks["unlimited/dmoe"]
    assert engine.config["gpu_mem"] == default_budget(8 * GB) == 8 * GB - 125_000_000
    assert (engine.limited, unlimited.limited, tasks["mmap/dmoe"].limited, tasks["bandwidth"].limited) == (
        True,
        False,
        True,
        False,
    )
    assert EngineConfig(**unlimited.config).gpu_mem == "auto"
    assert EngineConfig(**unlimited.config).expert_mem is None
    assert all(EngineConfig(**task.config).threads == 3 for task in tasks.values())


def test_small_limits_leave_a_hundred_megabytes() -> None:
    assert default_budget(GB) == 900_000_000
    with pytest.raises(UsageError, match=r"--limit is 50\.0 MB"):
        line_up(request(limit=50_000_000))


def test_budgets_and_formats_have_names_of_their_own() -> None:
    lined = line_up(
        request(budgets=[4 * GB, 2 * GB], packed=[Path("a/int8")], only=["engine/*"], config={"routing": "dmoe"})
    )
    assert [(task.name, task.config["gpu_mem"], task.config["model"]) for task in lined.tasks] == [
        ("engine/dmoe", 4 * GB, "somewhere"),
        ("engine/dmoe@2.00GB", 2 * GB, "somewhere"),
        ("engine/dmoe+int8", 4 * GB, "a/int8"),
    ]


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"packed": [Path("a/int8"), Path("b/int8")]}, r"\+int8"), ({"budgets": [4 * GB, 2 * GB, 2 * GB + 1]}, "@2.00GB")],
)
def test_two_of_one_name_are_refused(changes: dict[str, object], name: str) -> None:
    with pytest.raises(UsageError, match=rf"^engine/original{name}: the name of 2 contenders; wanted"):
        line_up(request(**changes))
    line_up(request(**changes, only=["bandwidth"]))


def test_what_reads_safetensors_files_has_nothing_to_read_in_a_converted_model() -> None:
    lined = line_up(request(config={"routing": "dmoe"}), packed=True)
    assert [task.name for task in lined.tasks] == ["bandwidth", "engine/dmoe", "unlimited/dmoe"]
    assert sorted(lined.absent) == [
        "accelerate/dmoe",
        "mmap-random/dmoe",
        "mmap/dmoe",
        "torch-random/dmoe",
        "torch/dmoe",
    ]
    assert "can't read experts.packed" in lined.absent["mmap/dmoe"]


def test_a_pattern_that_fits_nobody_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError, match=r"--only engines/\*: no contender .* mmap-random/dmoe"):
        line_up(request(only=["engines/*"]))


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineup.importlib.util, "find_spec", lambda name: None)
    lined = line_up(request())
    assert not [task for task in lined.tasks if task.kind in ("accelerate", "mlx")]
    assert sorted(lined.absent) == ["accelerate/dmoe", "accelerate/original", "mlx-unlimited/original", "mlx/original"]
    assert "pip install --no-deps accelerate" in lined.absent["accelerate/dmoe"]
    assert "mlx-vlm is not installed" in lined.absent["mlx/original"]
