from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload_engine.errors import CheckpointError
from offload_engine.model.config import ModelConfig
from tests.checkpoints import tiny_config
from tests.mini_config import RAW

REQUIRED = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
]


def test_the_published_config() -> None:
    config = ModelConfig.from_dict(RAW)
    assert config.moe_layers == range(1, 20)
    assert config.rotary == 64
    assert config.shared_intermediate_size == 512
    assert (config.router.num_experts, config.router.top_k, config.router.n_group, config.router.topk_group) == (
        256,
        8,
        8,
        4,
    )
    assert config.router.routed_scaling_factor == 2.5
    assert config.distilled_top_p is None


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    raw = tiny_config()
    del raw[key]
    with pytest.raises(CheckpointError, match=f"here: key '{key}' is missing"):
        ModelConfig.from_dict(raw, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', but this engine runs llada2_moe and llada2_moe_veomni"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": "32"}, "key 'hidden_size' is '32'"),
        ({"hidden_size": 0}, "key 'hidden_size' is 0"),
        ({"hidden_size": True}, "key 'hidden_size' is True"),
        ({"vocab_size": 10**12}, "key 'vocab_size' is 1000000000000"),
        ({"num_hidden_layers": 10**6}, "key 'num_hidden_layers'"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) is no multiple of num_key_value_heads \(3\)"),
        ({"n_group": 3}, r"num_experts \(16\) is no multiple of n_group \(3\)"),
        ({"topk_group": 9}, r"topk_group \(9\) exceeds n_group \(4\)"),
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) exceeds the experts in topk_group groups \(8\)"),
        ({"num_key_value_heads": 0}, "key 'num_key_value_heads' is 0: "),
        ({"num_attention_heads": 0, "num_key_value_heads": None}, "key 'num_attention_heads' is 0: "),
        ({"num_attention_heads": 64, "head_dim": None}, "key 'head_dim' is 0: "),
        ({"n_group": 0}, "key 'n_group' is 0: "),
        ({"rope_theta": 10**400}, "key 'rope_theta' is 1000"),
        ({"hidden_size": 10**400}, "key 'hidden_size' is 10{79}…: "),
        ({"eos_token_id": ["two"]}, r"key 'eos_token_id' is \['two'\]: "),
        ({"eos_token_id": ["x"] * 10**4}, "key 'eos_token_id' is .{80}…: "),
        ({"hidden_act": "gelu"}, "key 'hidden_act' is 'gelu'"),
        ({"score_function": "softmax"}, "key 'score_function' is 'softmax'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "key 'rope_scaling'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "key 'rope_scaling'"),
        ({"use_sliding_window": True}, "key 'use_sliding_window'"),
        ({"partial_rotary_factor": 1.5}, "key 'partial_rotary_factor'"),
        ({"rms_norm_eps": "tiny"}, "key 'rms_norm_eps'"),
        ({"routed_scaling_factor": float("nan")}, "key 'routed_scaling_factor'"),
        ({"rotary_dim": 7, "partial_rotary_factor": None}, "rotary dimensions"),
        ({"topk_group": None}, "key 'topk_group' is missing, and n_group is 4"),
        ({"first_k_dense_replace": 9}, "first_k_dense_replace"),
        ({"core_threshold": 1.5, "mode": "aggregate"}, "key 'core_threshold'"),
        ({"core_min_experts": 0, "mode": "aggregate"}, "key 'core_min_experts' is 0"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        ModelConfig.from_dict(tiny_config(**change), "here")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'"x"', b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        ModelConfig.from_file(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: not found"):
        ModelConfig.from_file(tmp_path / "config.json")


def test_defaults_and_other_spellings() -> None:
    raw = tiny_config(n_group=None, topk_group=None, rope_theta=None, head_dim=None, num_key_value_heads=None)
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.25}
    del raw["partial_rotary_factor"]
    config = ModelConfig.from_dict(raw)
    assert (config.n_group, config.topk_group) == (1, 1)
    assert config.rope_theta == 10000.0
    assert config.rotary == 2
    assert config.head_dim == 8
    assert config.num_key_value_heads == 4


def test_the_rotary_factor_wins_over_the_dimension_beside_it() -> None:
    assert ModelConfig.from_dict(tiny_config(partial_rotary_factor=1.0, rotary_dim=4)).rotary == 8
    raw = tiny_config(rotary_dim=2)
    del raw["partial_rotary_factor"]
    assert ModelConfig.from_dict(raw).rotary == 2


def test_a_distilled_checkpoint_says_its_p() -> None:
    assert ModelConfig.from_dict(tiny_config(mode="aggregate", core_threshold=0.6)).distilled_top_p == 0.6
    assert ModelConfig.from_dict(tiny_config(mode="aggregate")).distilled_top_p == 0.6
    assert ModelConfig.from_dict(tiny_config(core_threshold=0.6)).distilled_top_p is None


def test_a_checkpoint_that_routes_by_block_says_its_capacity() -> None:
    assert ModelConfig.from_dict(tiny_config(expert_capacity=48)).expert_capacity == 48
    assert ModelConfig.from_dict(tiny_config(expert_capacity=None)).expert_capacity is None
    with pytest.raises(CheckpointError, match="key 'expert_capacity' is 0"):
        ModelConfig.from_dict(tiny_config(expert_capacity=0))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from(sorted(tiny_config())), json_values)
def test_any_value_of_any_key_is_taken_or_refused_with_one_line(key: str, value: Any) -> None:
    raw = json.loads(json.dumps(tiny_config() | {key: value}))
    complaint = ""
    try:
        ModelConfig.from_dict(raw)
    except CheckpointError as error:
        complaint = str(error)
    assert "\n" not in complaint
