from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from offload_engine.config import MAX_BYTES, EngineConfig, format_bytes, load_config, parse_bytes
from offload_engine.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8GB", 8_000_000_000),
        ("8GiB", 8 * 2**30),
        ("1.5GB", 1_500_000_000),
        (".5gib", 2**29),
        ("  640 mb ", 640_000_000),
        ("512MiB", 512 * 2**20),
        ("3KB", 3000),
        ("3kib", 3072),
        ("2TB", 2 * 10**12),
        ("8g", 8_000_000_000),
        ("8Gi", 8 * 2**30),
        ("100B", 100),
        ("12345", 12345),
        ("1.9999B", 1),
        (7, 7),
        (MAX_BYTES, MAX_BYTES),
    ],
)
def test_sizes_are_read(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "GB", "-3GB", "0", "0.4B", "nan", "inf", "8XB", "8 GB RAM", "1e9", "1,5GB", "8_000", "8GBB", "0x10"),
        *("٨GB", "9" * 5000, "2000000TB", b"8GB", 0, -1, True, None, 1.5, math.nan, [8], {"GB": 8}, MAX_BYTES + 1),
        pytest.param(10**5000, id="enormous"),
    ],
)
def test_nonsense_sizes_are_refused_in_one_line(value: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_bytes(value, "gpu_mem")
    message = str(refusal.value)
    assert message.startswith("gpu_mem is ")
    assert "8GB" in message
    assert "\n" not in message
    assert len(message) < 250


def test_a_refused_size_is_shown() -> None:
    with pytest.raises(ConfigError, match=r"^host_mem is 'lots', wanted a size such as 8GB, 1\.5GiB"):
        parse_bytes("lots", "host_mem")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (6_291_456, "6.29 MB"), (999_499, "999 KB")),
        *((999_500, "1.00 MB"), (30_600_000_000, "30.6 GB"), (123_000_000_000, "123 GB"), (-2000, "-2.00 KB")),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_are_printed(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(st.integers(1, MAX_BYTES // 2))
def test_a_printed_size_reads_back_within_half_a_percent(count: int) -> None:
    assert abs(parse_bytes(format_bytes(count)) - count) <= count / 200
    rounded = parse_bytes(format_bytes(count, round_up=True))
    assert count <= rounded <= count * 1.01


def test_defaults() -> None:
    config = EngineConfig()
    assert (config.model, config.device, config.gpu_mem, config.host_mem) == (None, "auto", "auto", "auto")
    assert (config.routing, config.top_p, config.min_experts, config.top_k_experts) == (None, None, None, 4)
    assert (config.prefetch_depth, config.transfers_in_flight, config.reader_threads) == (2, 2, 2)
    assert config.prefill_chunk == 512


def test_it_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        EngineConfig().gpu_mem = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given_as", "kept_as"),
    [
        ({"gpu_mem": "8GB"}, {"gpu_mem": 8_000_000_000}),
        ({"gpu_mem": "AUTO"}, {"gpu_mem": "auto"}),
        ({"host_mem": "none"}, {"host_mem": None}),
        ({"cpu_experts": "Auto"}, {"cpu_experts": "auto"}),
        ({"cpu_experts": "0.25"}, {"cpu_experts": 0.25}),
        ({"cpu_experts": 1}, {"cpu_experts": 1.0}),
        ({"host_mem": None}, {"host_mem": None}),
        ({"expert_mem": 4096}, {"expert_mem": 4096}),
        ({"model": Path("some") / "folder"}, {"model": str(Path("some") / "folder")}),
        ({"device": " CUDA:1\n"}, {"device": "cuda:1"}),
        ({"top_p": 1}, {"top_p": 1.0}),
        ({"routing": "Top_K"}, {"routing": "top-k"}),
        ({"routing": "topk"}, {"routing": "top-k"}),
        ({"routing": "DES_Vote"}, {"routing": "des-vote"}),
        ({"routing": "des-s"}, {"routing": "des-seq"}),
        ({"routing": "DES-V"}, {"routing": "des-vote"}),
        ({"routing": "capacity"}, {"routing": "block-capacity"}),
        ({"routing": "dMoE"}, {"routing": "dmoe"}),
        ({"eviction": "Score_Aware"}, {"eviction": "score-aware"}),
        ({"predictor": "cross_layer_gate"}, {"predictor": "cross-layer-gate"}),
        (
            {"predictor": "Block_History", "eviction": "next_use"},
            {"predictor": "block-history", "eviction": "next-use"},
        ),
        ({"hot_set": "OFF"}, {"hot_set": "off"}),
        ({"prefetch_depth": 1, "predictor": "none"}, {"predictor": "none"}),
        ({"routing": "dmoe", "top_k_experts": 2}, {"top_k_experts": 2}),
        ({"device": "cpu", "host_mem": "none"}, {"host_mem": None}),
        ({"gpu_mem": "2GB", "expert_mem": "2GB"}, {"expert_mem": 2_000_000_000}),
    ],
)
def test_what_is_accepted_is_normalised(given_as: dict[str, Any], kept_as: dict[str, Any]) -> None:
    config = EngineConfig(**given_as)
    assert {key: getattr(config, key) for key in kept_as} == kept_as


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("gpu_mem", "8XB", "8GB, 1.5GiB"),
        ("gpu_mem", None, "8GB"),
        ("gpu_mem", "none", "or 'auto'"),
        ("host_mem", -1, "or 'auto' or 'none'"),
        ("cpu_experts", "on", "wanted 'off', 'auto' or a share of the missing experts from 0 to 1"),
        ("cpu_experts", 1.5, "wanted 'off', 'auto' or a share of the missing experts from 0 to 1"),
        ("cpu_experts", True, "wanted 'off', 'auto' or a share of the missing experts from 0 to 1"),
        ("cpu_experts", float("nan"), "wanted 'off', 'auto' or a share of the missing experts from 0 to 1"),
        ("expert_mem", "auto", "or 'none'"),
        ("device", "gpu", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:x", "auto, cpu, cuda or cuda:N"),
        ("dtype", "int8", "'bfloat16'"),
        ("eviction", "fifo", "'score-aware'"),
        ("hot_set", "maybe", "'on' or 'off'"),
        ("predictor", "oracle", "'previous-step'"),
        ("routing", 3, "string"),
        ("routing", "", "at least 1 character"),
        ("model", "", "a hub id"),
        ("model", 5, "string"),
        ("top_p", 0, "greater than 0"),
        ("top_p", 1.01, "less than or equal to 1"),
        ("top_p", math.nan, ""),
        ("top_p", "0.6", "number"),
        ("top_p", True, "number"),
        ("min_experts", 0, "greater than or equal to 1"),
        ("min_experts", "16", "integer"),
        ("min_experts", 16.0, "integer"),
        ("min_experts", True, "integer"),
        ("top_k_experts", 0, "greater than or equal to 1"),
        ("des_k", 0, "greater than or equal to 1"),
        ("des_beta", 1.5, "less than or equal to 1"),
        ("expert_capacity", 0, "greater than or equal to 1"),
        ("residency_bonus", -0.5, "greater than or equal to 0"),
        ("hold_steps", 0, "greater than or equal to 1"),
        ("prefetch_depth", -1, "greater than or equal to 0"),
        ("transfers_in_flight", 3, "less than or equal to 2"),
        ("reader_threads", 0, "greater than or equal to 1"),
        ("prefill_chunk", 0, "greater than or equal to 1"),
        ("max_context", 0, "greater than or equal to 1"),
        ("threads", 0, "greater than or equal to 1"),
        ("mask_token_id", -1, "greater than or equal to 0"),
        ("eos_token_id", "2", "integer"),
    ],
)
def test_what_is_refused_names_key_value_and_wanted(key: str, value: Any, wanted: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        EngineConfig(**{key: value})
    message = str(refusal.value)
    assert repr(key) in message
    assert repr(value) in message
    assert wanted in message
    assert "\n" not in message
    assert refusal.value.exit_code == 2


def test_an_unknown_key_suggests_the_closest() -> None:
    with pytest.raises(ConfigError, match="unknown key 'gpu_mme'; did you mean 'gpu_mem'"):
        EngineConfig(gpu_mme="8GB")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="did you mean 'host_mem'"):
        EngineConfig(**{"HOST-MEM": "8GB"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="unknown key 'qqq'; known are model, device, "):
        EngineConfig(qqq=1)  # type: ignore[call-arg]


def test_expert_mem_may_not_exceed_gpu_mem() -> None:
    with pytest.raises(ConfigError, match=r"expert_mem is 9\.00 GB, but gpu_mem.* 8\.00 GB"):
        EngineConfig.build(gpu_mem="8GB", expert_mem="9GB")


def test_there_is_no_host_tier_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match="no host tier on a CPU-only machine"):
        EngineConfig.build(device="cpu", host_mem="2GB")


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "preset.toml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_keywords_over_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, 'gpu_mem = "7GB"\nhost_mem = "24GB"\nmax_context = 4096\n')
    config = EngineConfig.build(path, gpu_mem="3GB", max_context=None, host_mem="none")
    assert (config.gpu_mem, config.host_mem, config.max_context) == (3_000_000_000, None, 4096)
    assert config.reader_threads == 2


def test_a_file_is_judged_together_with_the_keywords(tmp_path: Path) -> None:
    path = write(tmp_path, 'gpu_mem = "4GB"\nexpert_mem = "6GB"\n')
    assert EngineConfig.build(path, gpu_mem="8GB").expert_mem == 6_000_000_000
    with pytest.raises(ConfigError, match="expert_mem is"):
        EngineConfig.build(path)


def test_an_unknown_keyword_is_refused_even_if_it_is_none() -> None:
    with pytest.raises(ConfigError, match="unknown key 'gpu_mme'"):
        EngineConfig.build(gpu_mme=None)


def test_a_preset_gives_only_what_it_sets(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == {}
    bom = "\ufeff".encode()
    assert load_config(write(tmp_path, bom + b'gpu_mem = "1GB"\nrouting = "dMoE"')) == {
        "gpu_mem": 1_000_000_000,
        "routing": "dmoe",
    }


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("gpu_mme = 3", "unknown key 'gpu_mme'; did you mean 'gpu_mem'"),
        ("[memory]\ngpu_mem = 3", "unknown key 'memory'"),
        ('min_experts = "16"', "'min_experts': found '16', wanted a valid integer"),
        ("gpu_mem = 1.5", "'gpu_mem': found 1.5, wanted a size"),
        ("device = 1979-05-27", "'device': found datetime.date"),
        ("a = 1\ngpu_mem = \n", "not valid TOML.*line 2"),
        ("gpu_mem = 1\ngpu_mem = 2\n", "not valid TOML.*line 2"),
        ("gpu_mem = 1" + "0" * 5000, "not valid TOML"),
        ("a = " + "[" * 100_000, "not valid TOML"),
        (b"gpu_mem = '\xff'", "byte 11 is not UTF-8"),
    ],
)
def test_a_bad_preset_is_named(tmp_path: Path, content: str | bytes, wanted: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=wanted) as refusal:
        EngineConfig.build(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


def test_a_preset_that_is_not_there_or_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml: not found"):
        load_config(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    write(tmp_path, "")
    with pytest.raises(ConfigError, match=r"can't be read \(Not a directory\)"):
        load_config(tmp_path / "preset.toml" / "deeper")
