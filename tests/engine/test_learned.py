"""What `dmoe tune` found: kept by device and routing, recalled whole or not at all, and what a run makes of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from offload_engine import Engine, SamplingParams
from offload_engine.config import EngineConfig
from offload_engine.engine import learned
from offload_engine.engine.learned import FILE, Learned, device_name, recall_tuning, remember_tuning, routing_settings
from offload_engine.routing import RoutingOptions
from tests.checkpoints import tiny_config, write_checkpoint

KNOBS: dict[str, str | float | int] = {"eviction": "lru", "predictor": "none", "prefetch_depth": 0}
CARD = "NVIDIA GeForce RTX 4060"


def finding(**changed: Any) -> Learned:
    values = {"device": device_name(None), "routing": {"routing": "original"}, "batch_size": 1, "slots": 9}
    return Learned(**{**values, "knobs": KNOBS, **changed})


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_checkpoint(tmp_path / "model", tiny_config(), dtype=torch.float32)


def test_findings_are_kept_by_device_and_routing(directory: Path) -> None:
    assert recall_tuning(directory) == []
    one, other = finding(), finding(device=CARD)
    dmoe = finding(routing=routing_settings("dmoe", RoutingOptions(top_p=0.7)))
    for each in (one, other, dmoe):
        assert remember_tuning(directory, each) == directory / FILE
    assert recall_tuning(directory) == [one, other, dmoe]
    anew = finding(slots=5)
    remember_tuning(directory, anew)
    assert recall_tuning(directory) == [other, dmoe, anew]


def test_where_the_checkpoint_is_read_only_the_users_cache_serves(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = learned.write_aside

    def refused(path: Path, content: bytes) -> None:
        if path.parent == directory:
            raise PermissionError(13, "read-only")
        write(path, content)

    monkeypatch.setattr(learned, "write_aside", refused)
    path = remember_tuning(directory, finding())
    assert path is not None
    assert path.is_relative_to(tmp_path / "cache" / "offload_engine" / "tuned")
    assert recall_tuning(directory) == [finding()]
    monkeypatch.setattr(learned, "write_aside", lambda *_given: (_ for _ in ()).throw(OSError(28, "full")))
    assert remember_tuning(directory, finding()) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"{",
        lambda data: data.replace(b'"slots": 9', b'"slots": 0'),
        lambda data: data.replace(b'"slots": 9', b'"slots": 9, "more": 1'),
        lambda data: data.replace(b'"lru"', b'"belady"'),
        lambda data: data.replace(b'"eviction"', b'"gpu_mem"'),
        lambda data: data.replace(b'"version": 1', b'"version": 2'),
        lambda data: data.replace(b'"checkpoint": "', b'"checkpoint": "0'),
    ],
)
def test_what_makes_no_sense_is_no_finding(directory: Path, damage: Any) -> None:
    remember_tuning(directory, finding())
    file = directory / FILE
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    assert not recall_tuning(directory)


@pytest.mark.parametrize(
    ("changes", "device", "routing", "serves"),
    [
        ({}, CARD, "original", True),
        ({"gpu_mem": "1GB"}, CARD, "original", False),
        ({"expert_mem": "1MB"}, CARD, "original", False),
        ({"batch_size": 2}, CARD, "original", False),
        ({}, "another", "original", False),
        ({}, CARD, "top-k", False),
    ],
)
def test_a_finding_serves_only_what_was_tuned_and_left_to_it(
    changes: dict[str, Any], device: str, routing: str, serves: bool
) -> None:
    settings = routing_settings(routing, RoutingOptions())
    assert finding(device=CARD).serves(EngineConfig(**changes), device, settings) == serves


def test_options_that_somebody_set_stay() -> None:
    config = finding().applied(EngineConfig(predictor="combined", device="cpu"))
    assert (config.eviction, config.predictor, config.prefetch_depth, config.device) == ("lru", "combined", 0, "cpu")
    notice = finding().notice(9, 10**9, EngineConfig(predictor="combined"))
    assert notice.startswith("gpu_mem auto: 1.00 GB for 9 expert slots, eviction lru, prefetch_depth 0, as dmoe tune")
    assert "free memory for more" not in notice
    assert "it found 9 slots worth having: free memory for more" in finding().notice(5, 10**9, config)


def test_a_card_is_known_by_its_name_with_or_without_its_memory() -> None:
    assert device_name(f"{CARD} 8 GB") == device_name(CARD) == CARD
    assert device_name("NVIDIA H100 80GB HBM3") == "NVIDIA H100 80GB HBM3"
    assert device_name(None).endswith(" cores")


def test_what_routes_alike_wants_alike() -> None:
    assert routing_settings("original", RoutingOptions(top_p=0.3)) == {"routing": "original"}
    assert routing_settings("dmoe", RoutingOptions(top_p=0.3)) != routing_settings("dmoe", RoutingOptions(top_p=0.4))


def opened(directory: Path, **options: Any) -> Engine:
    return Engine.from_pretrained(directory, device="cpu", max_context=256, mask_token_id=1, eos_token_id=2, **options)


def test_auto_takes_what_was_found_and_says_so(directory: Path) -> None:
    params = SamplingParams(max_new_tokens=32, steps=4)
    with opened(directory) as engine:
        whole, answer = engine.plan, engine.generate([5, 6, 7], params).token_ids
        assert whole.slots == whole.all_experts > 9
        assert not any("dmoe tune" in notice for notice in engine.notices)
    remember_tuning(directory, finding())
    with opened(directory) as engine:
        assert engine.plan.slots == 9
        assert engine.plan.context == whole.context
        assert engine.plan.total <= whole.total - (whole.slots - 9) * whole.slab_bytes + 2**26
        assert engine.plan.spare == 0
        assert engine._parts.experts.prefetch_depth == 0
        (notice,) = [one for one in engine.notices if "dmoe tune" in one]
        assert "for 9 expert slots, eviction lru, predictor none, prefetch_depth 0" in notice
        assert engine.generate([5, 6, 7], params).token_ids == answer
    for options in ({"tuned": "off"}, {"routing": "dmoe"}, {"gpu_mem": "2GB"}, {"batch_size": 2}):
        with opened(directory, **options) as engine:
            assert engine.plan.slots == whole.slots, options
    remember_tuning(directory, finding(slots=10**6))
    with opened(directory) as engine:
        assert engine.plan.slots == whole.slots, "no more than there is"
    assert json.loads((directory / FILE).read_text())["found"][0]["slots"] == 10**6
    assert os.listdir(directory).count(FILE) == 1  # noqa: PTH208 (hidden files too)
