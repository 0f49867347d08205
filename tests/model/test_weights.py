"""A checkpoint, its resident network, and where its experts lie."""

from __future__ import annotations

import errno
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.errors import CheckpointError, MemoryBudgetError
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import LLaDA2Model
from offload_engine.model.weights import (
    FileSpan,
    TensorInfo,
    all_expert_spans,
    expert_spans,
    load_resident,
    resident_nbytes,
    resident_shapes,
    unexpected_tensors,
)
from tests.checkpoints import GOLDEN, needs_golden, random_tensors, tiny_config, write_checkpoint, write_tensors


def opened(directory: Path, config: dict[str, Any]) -> tuple[ModelConfig, Checkpoint]:
    return ModelConfig.from_dict(config), Checkpoint.open(directory)


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 4))
    kv_heads = draw(st.integers(1, 3))
    return tiny_config(
        vocab_size=draw(st.integers(1, 40)),
        hidden_size=draw(st.integers(1, 24)),
        intermediate_size=draw(st.integers(1, 24)),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8, 12])),
        moe_intermediate_size=draw(st.integers(1, 12)),
        num_shared_experts=draw(st.integers(0, 2)),
        first_k_dense_replace=draw(st.integers(0, layers)),
        moe_router_enable_expert_bias=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        use_qkv_bias=draw(st.booleans()),
        use_qk_norm=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
    )


@given(configs())
@settings(max_examples=60, deadline=None)
def test_resident_shapes_are_the_models(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw)
    with torch.device("meta"):
        state = LLaDA2Model(config).state_dict()
    if config.tie_word_embeddings:
        assert state.pop("lm_head.weight").shape == state["model.word_embeddings.weight"].shape
    assert resident_shapes(config) == {name: tuple(tensor.shape) for name, tensor in state.items()}


@needs_golden
def test_golden_checkpoint_is_read_whole() -> None:
    checkpoint = Checkpoint.open(GOLDEN)
    config = ModelConfig.from_file(GOLDEN / "config.json")
    stored: dict[str, Tensor] = {}
    for shard in GOLDEN.glob("model-*.safetensors"):
        stored |= load_file(shard)
    assert checkpoint.tensors.keys() == stored.keys()
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())
    assert unexpected_tensors(config, checkpoint) == []
    for name in list(stored)[::7]:
        assert torch.equal(checkpoint.read(name), stored[name])
    state = load_resident(config, checkpoint, torch.float32).state_dict()
    assert state.keys() == resident_shapes(config).keys()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in state.items())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_weights_are_cast_but_routers_stay_float32(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    raw = tiny_config(use_bias=True, use_qkv_bias=True)
    directory = write_checkpoint(tmp_path, raw, dtype=stored, shards=2)
    config, checkpoint = opened(directory, raw)
    model = load_resident(config, checkpoint, wanted)
    tensors = random_tensors(raw, dtype=stored, layout="split", seed=0)
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if name.endswith(("mlp.gate.weight", "expert_bias")) else wanted
        assert tensor.dtype == dtype
        assert torch.equal(tensor, tensors[name].to(dtype))
    assert sum(tensor.nbytes for tensor in model.state_dict().values()) == resident_nbytes(config, wanted)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_what_stays_on_the_host_lies_in_one_piece(tmp_path: Path) -> None:
    raw = tiny_config()
    config, checkpoint = opened(write_checkpoint(tmp_path, raw), raw)
    tensors = list(load_resident(config, checkpoint, torch.bfloat16).state_dict().values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    places = sorted((tensor.data_ptr(), tensor.nbytes) for tensor in tensors)
    assert all(first + nbytes <= second for (first, nbytes), (second, _) in itertools.pairwise(places))


def test_memory_that_the_system_refuses_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_nbytes: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    raw = tiny_config()
    config, checkpoint = opened(write_checkpoint(tmp_path, raw), raw)
    monkeypatch.setattr("offload_engine.model.weights.huge_pages", refuse)
    with pytest.raises(MemoryBudgetError, match=r"refused \d+ bytes for the dense weights .*Cannot allocate memory"):
        load_resident(config, checkpoint, torch.float32)


def test_tied_embeddings_are_one_parameter(tmp_path: Path) -> None:
    raw = tiny_config(tie_word_embeddings=True)
    config, checkpoint = opened(write_checkpoint(tmp_path, raw), raw)
    model = load_resident(config, checkpoint, torch.bfloat16)
    assert model.lm_head.weight is model.model.word_embeddings.weight
    assert not model.lm_head.weight.is_meta
    assert resident_nbytes(config, torch.bfloat16) == sum(p.nbytes for p in [*model.parameters(), *model.buffers()])


def test_loading_draws_no_initial_values(tmp_path: Path) -> None:
    """On the meta device that imports sympy: 75 MB that no plan knows of."""
    directory = write_checkpoint(tmp_path, tiny_config())
    code = (
        "import sys, torch; from pathlib import Path; from offload_engine.model.checkpoint import Checkpoint;"
        "from offload_engine.model.config import ModelConfig; from offload_engine.model.weights import load_resident;"
        "folder = Path(sys.argv[1]); config = ModelConfig.from_file(folder / 'config.json');"
        "load_resident(config, Checkpoint.open(folder), torch.float32); print('sympy' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code, directory], cwd=root, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


def test_progress_rises_to_the_total(tmp_path: Path) -> None:
    raw = tiny_config()
    config, checkpoint = opened(write_checkpoint(tmp_path, raw, shards=2), raw)
    seen: list[tuple[int, int]] = []
    load_resident(config, checkpoint, torch.float32, progress=lambda done, total: seen.append((done, total)))
    total = sum(checkpoint.tensors[name].nbytes for name in resident_shapes(config))
    assert len(seen) >= len(resident_shapes(config))
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    assert {row[1] for row in seen} == {total}


def test_shards_may_be_symlinks_as_in_the_hub_cache(tmp_path: Path) -> None:
    raw = tiny_config()
    blobs = write_checkpoint(tmp_path / "blobs", raw, shards=2)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    config, checkpoint = opened(snapshot, raw)
    assert torch.equal(
        load_resident(config, checkpoint, torch.float32).lm_head.weight, checkpoint.read("lm_head.weight")
    )


def test_fingerprint_sees_tensors_not_shards(tmp_path: Path) -> None:
    def fingerprint(name: str, raw: dict[str, Any], **options: Any) -> str:
        return Checkpoint.open(write_checkpoint(tmp_path / name, raw, **options)).fingerprint

    one = fingerprint("one", tiny_config())
    assert one == fingerprint("sharded", tiny_config(), shards=3)
    others = {
        fingerprint("half", tiny_config(), dtype=torch.float16),
        fingerprint("merged", tiny_config(), layout="merged"),
        fingerprint("wide", tiny_config(moe_intermediate_size=8)),
    }
    assert len(others | {one}) == 4


def test_single_file_wins_over_an_index(tmp_path: Path) -> None:
    raw = tiny_config()
    directory = write_checkpoint(tmp_path, raw)
    (directory / "model.safetensors.index.json").write_text("damaged")
    assert "lm_head.weight" in Checkpoint.open(directory).tensors


def test_tensors_an_index_does_not_name_are_no_part_of_the_checkpoint(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(3)}, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["b"]
    index.write_text(json.dumps(content))
    assert set(Checkpoint.open(tmp_path).tensors) == {"a"}


def test_unexpected_tensors_are_ignored_but_listed(tmp_path: Path) -> None:
    raw = tiny_config()
    tensors = random_tensors(raw, dtype=torch.float32, layout="split", seed=0)
    extra = {"model.layers.1.mlp.experts.16.gate_proj.weight", "model.layers.0.mlp.gate.weight", "visual.weight"}
    write_tensors(tmp_path, tensors | {name: torch.zeros(1) for name in extra})
    config, checkpoint = opened(tmp_path, raw)
    assert unexpected_tensors(config, checkpoint) == sorted(extra)
    load_resident(config, checkpoint, torch.float32)


@pytest.mark.parametrize("layout", ["split", "merged"])
@pytest.mark.parametrize("shards", [1, 3])
def test_expert_spans_cover_the_matrices(tmp_path: Path, layout: Any, shards: int) -> None:
    raw = tiny_config()
    config, checkpoint = opened(write_checkpoint(tmp_path, raw, layout=layout, shards=shards), raw)
    spans = all_expert_spans(config, checkpoint)
    wanted = random_tensors(raw, dtype=torch.float32, layout="split", seed=0)
    assert list(spans) == [ExpertKey(layer, expert) for layer in (1, 2) for expert in range(16)]

    def stored(span: FileSpan) -> bytes:
        return span.path.read_bytes()[span.offset : span.offset + span.nbytes]

    for key, found in spans.items():
        prefix = f"model.layers.{key.layer}.mlp.experts.{key.expert}."
        for which in ("gate", "up", "down"):
            assert stored(getattr(found, which)) == wanted[f"{prefix}{which}_proj.weight"].numpy().tobytes()
        assert (found.dtype, found.intermediate, found.hidden) == (torch.float32, 16, 32)


@pytest.mark.parametrize("layout", ["split", "merged"])
def test_experts_must_be_whole(tmp_path: Path, layout: Any) -> None:
    raw = tiny_config()
    tensors = random_tensors(raw, dtype=torch.float32, layout=layout, seed=0)
    dot, end = (".3", ".weight") if layout == "split" else ("", "")
    name = f"model.layers.2.mlp.experts{dot}.up_proj{end}"

    def complaint(**changed: Tensor | None) -> str:
        altered = {key: value for key, value in {**tensors, **changed}.items() if value is not None}
        write_tensors(tmp_path, altered)
        config, checkpoint = opened(tmp_path, raw)
        expert_spans(config, checkpoint, 1, 3)
        with pytest.raises(CheckpointError) as caught:
            all_expert_spans(config, checkpoint)
        assert name in str(caught.value)
        return str(caught.value)

    assert "missing" in complaint(**{name: None})
    flipped = tensors[name].transpose(-1, -2).contiguous()
    message = complaint(**{name: flipped})
    assert str(list(flipped.shape)) in message
    assert str(list(tensors[name].shape)) in message
    message = complaint(**{name: tensors[name].half()})
    assert "float16" in message
    assert "float32" in message
    assert "int32" in complaint(**{name: tensors[name].int()})


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda tensor: None, "missing"),
        (lambda tensor: tensor[:-1].contiguous(), r"\[95, 32\].*\[96, 32\]"),
        (lambda tensor: tensor.double(), "float64.*float32"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), "float8_e4m3fn.*bfloat16"),
    ],
)
def test_resident_tensors_are_checked_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, wanted: str
) -> None:
    raw = tiny_config()
    tensors = random_tensors(raw, dtype=torch.float32, layout="split", seed=0)
    changed = change(tensors["lm_head.weight"])
    kept = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    write_tensors(tmp_path, kept if changed is None else {**kept, "lm_head.weight": changed})
    config, checkpoint = opened(tmp_path, raw)
    monkeypatch.setattr(checkpoint, "read_into", lambda *_given: pytest.fail("something was read"))
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight.*{wanted}"):
        load_resident(config, checkpoint, torch.float32)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    raw = tiny_config()
    directory = write_checkpoint(tmp_path, raw)
    config, checkpoint = opened(directory, tiny_config(num_hidden_layers=4))
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.input_layernorm\.weight' and 10 more are missing"):
        load_resident(config, checkpoint, torch.float32)


@pytest.mark.parametrize("layout", ["split", "merged"])
def test_a_full_size_model_is_checked_in_no_time(layout: str) -> None:
    """256 experts in 19 layers, as LLaDA2.0-mini has; only the names and shapes, no bytes."""
    raw = tiny_config(num_hidden_layers=20, num_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4)
    config = ModelConfig.from_dict(raw)
    tensors = {}
    for layer in config.moe_layers:
        for which, shape in (("gate", (16, 32)), ("up", (16, 32)), ("down", (32, 16))):
            experts = [f".{expert}.{which}_proj.weight" for expert in range(256)] if layout == "split" else []
            for end in experts or [f".{which}_proj"]:
                name = f"model.layers.{layer}.mlp.experts{end}"
                whole = shape if experts else (256, *shape)
                tensors[name] = TensorInfo(name, Path("a"), torch.bfloat16, whole, 0, torch.Size(whole).numel() * 2)
    began = time.process_time()
    assert len(all_expert_spans(config, Checkpoint(Path(), tensors, {}))) == 256 * 19
    assert time.process_time() - began < 1


def test_a_shard_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": torch.zeros(4)})
    checkpoint = Checkpoint.open(tmp_path)
    file = tmp_path / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {size - 1} bytes long, but {size} when opened"):
        checkpoint.read("a")
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not found"):
        checkpoint.read("a")
    with pytest.raises(CheckpointError, match="'b' is missing"):
        checkpoint.read("b")
