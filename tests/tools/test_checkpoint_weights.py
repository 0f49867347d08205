"""What `make_checkpoint` draws, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offload_engine.core import ExpertKey
from offload_engine.model.config import ModelConfig
from offload_engine.model.layers import rotary_angles, rotate
from tests.tools.pocket_checkpoint import POCKET, read, write
from tools.checkpoint_maker.presets import PRESETS, config_of
from tools.checkpoint_maker.tensors import blanks, expert_blanks
from tools.checkpoint_maker.weights import BRANCH_GAIN, CHUNK, DISTANCES, SHARED, RoutingStatistics, Weights
from tools.sharded_writer import Blank

NANO = ModelConfig.from_dict(config_of(PRESETS["llada2-nano"], torch.float32))
DEFAULTS = RoutingStatistics()
FIRST = "model.layers.0.attention."


def drawn(name: str, statistics: RoutingStatistics = DEFAULTS, config: ModelConfig = NANO) -> Tensor:
    blank = next(blank for blank in blanks(config, torch.float32) if blank.name == name)
    return torch.cat(list(Weights(config, 0, statistics).draw(blank))).view(blank.shape)


def test_values_have_unit_gain_and_branches_less(tmp_path: Path) -> None:
    write(tmp_path / "made")
    tensors = read(tmp_path / "made")
    for name, tensor in tensors.items():
        if "norm" in name and not name.startswith(FIRST):
            assert torch.equal(tensor, torch.ones_like(tensor)), name
    experts = {"gate_proj": 32**-0.5, "up_proj": 32**-0.5, "down_proj": BRANCH_GAIN * 8**-0.5}
    for matrix, spread in experts.items():
        values = torch.cat(
            [t.flatten() for name, t in tensors.items() if f".{matrix}." in name and ".experts." in name]
        )
        assert float(values.float().std()) == pytest.approx(spread, rel=0.02)
        assert float(values.float().mean()) == pytest.approx(0.0, abs=0.01 * spread)
    assert tensors["model.layers.1.mlp.gate.expert_bias"].dtype is torch.float32


def test_an_experts_matrices_can_be_drawn_alone(tmp_path: Path) -> None:
    write(tmp_path / "made", seed=3)
    tensors = read(tmp_path / "made")
    config = ModelConfig.from_dict(POCKET)
    weights = Weights(config, 3, DEFAULTS)
    for blank in expert_blanks(config, ExpertKey(2, 17), torch.bfloat16):
        assert ".layers.2.mlp.experts.17." in blank.name
        assert torch.equal(torch.cat(list(weights.draw(blank))), tensors[blank.name])


def test_no_more_than_a_piece_of_a_tensor_is_in_memory() -> None:
    width = NANO.hidden_size
    rows = CHUNK // width
    pieces = list(Weights(NANO, 0, DEFAULTS).draw(Blank("x.up_proj.weight", (rows + 5, width), torch.float32)))
    assert [tuple(piece.shape) for piece in pieces] == [(rows, width), (5, width)]


@pytest.mark.parametrize("similarity", [0.1, 0.5, 0.95])
def test_embeddings_share_a_direction(similarity: float) -> None:
    rows = drawn("model.word_embeddings.weight", RoutingStatistics(similarity=similarity))
    shared = rows.mean(dim=0)
    assert float(shared.pow(2).mean()) == pytest.approx(SHARED, rel=0.02)
    own = (1 - SHARED) * (1 - similarity)
    assert float((rows - shared).pow(2).mean()) == pytest.approx(own, rel=0.02)


def test_the_head_sees_no_eos_and_nothing_that_masks_have_in_common() -> None:
    head = drawn("lm_head.weight")
    embeddings = drawn("model.word_embeddings.weight")
    assert NANO.mask_token_id is not None
    for common in (embeddings.mean(dim=0), embeddings[NANO.mask_token_id]):
        assert float((head @ common).abs().max()) < 0.15 * float((head @ embeddings[5]).abs().max())
    assert float(head[NANO.eos_token_id].abs().max()) == 0.0
    assert int((head == 0).all(dim=1).sum()) == 1
    assert float(head.std()) == pytest.approx(NANO.hidden_size**-0.5, rel=0.02)


@pytest.mark.parametrize("preset", ["llada2-nano", "llada2-mini"])
def test_heads_of_the_first_layer_look_back_at_their_distances(preset: str) -> None:
    """Attention of a sequence of different tokens, from the norm to the softmax, as the model computes it."""
    config = ModelConfig.from_dict(config_of(PRESETS[preset], torch.float32, layers=1) | {"vocab_size": 512})
    length, heads = 160, config.num_attention_heads
    hidden = F.rms_norm(drawn("model.word_embeddings.weight", config=config)[:length], (config.hidden_size,))
    fused = (hidden @ drawn(f"{FIRST}query_key_value.weight", config=config).T).unflatten(-1, (-1, config.head_dim))
    angles = rotary_angles(torch.arange(length), config.rotary, config.rope_theta, torch.float32)
    query, key = (
        rotate(F.rms_norm(part, (config.head_dim,)) * drawn(f"{FIRST}{kind}_layernorm.weight", config=config), *angles)
        for part, kind in ((fused[:, :heads], "query"), (fused[:, heads : heads + config.num_key_value_heads], "key"))
    )
    key = key.repeat_interleave(heads // config.num_key_value_heads, dim=1)
    attention = torch.einsum("ihd,jhd->hij", query, key).div(config.head_dim**0.5).softmax(dim=-1)
    for head in range(heads):
        distance = DISTANCES[head % len(DISTANCES)]
        assert float(attention[head].diagonal(-distance).mean()) > 0.85, head


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_the_bias_is_as_wide_as_asked(spread: float) -> None:
    bias = drawn("model.layers.1.mlp.gate.expert_bias", RoutingStatistics(bias_spread=spread))
    assert float(bias.std()) == pytest.approx(spread, rel=0.15)
