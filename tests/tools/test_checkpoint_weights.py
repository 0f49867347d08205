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
from tools.checkpoint_maker.weights import (
    AGREED,
    BRANCH_GAIN,
    CHUNK,
    DISTANCES,
    TOPIC_DISTANCE,
    TOPIC_WIDTH,
    TURN,
    RoutingStatistics,
    Weights,
)
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


@pytest.mark.parametrize(("similarity", "topic"), [(0.1, 0.75), (0.5, 0.0), (0.95, 0.95)])
def test_embeddings_share_a_direction(similarity: float, topic: float) -> None:
    rows = drawn("model.word_embeddings.weight", RoutingStatistics(similarity=similarity, topic=topic))
    shared = rows.mean(dim=0)
    assert float(shared.pow(2).mean()) == pytest.approx(AGREED * (1 - topic), rel=0.02)
    own = (1 - AGREED) * (1 - similarity)
    assert float((rows - shared).pow(2).mean()) == pytest.approx(own, rel=0.02)
    assert NANO.mask_token_id is not None
    mask = rows[NANO.mask_token_id]
    assert float(F.cosine_similarity(mask, shared, dim=0)) > 0.99, "a mask carries nothing else"
    assert float(mask.norm()) == pytest.approx(float(shared.norm()), rel=0.02)


def test_the_head_sees_no_eos_no_topic_and_nothing_that_embeddings_have_in_common() -> None:
    head = drawn("lm_head.weight")
    embeddings = drawn("model.word_embeddings.weight")
    common = embeddings.mean(dim=0)
    assert float((head @ common).abs().max()) < 0.15 * float((head @ embeddings[5]).abs().max())
    assert float(head[NANO.eos_token_id].abs().max()) == 0.0
    assert int((head == 0).all(dim=1).sum()) == 1
    dense = drawn(f"{FIRST}dense.weight")
    broad = dense.unflatten(1, (-1, NANO.head_dim))[:, TURN - 1 :: TURN]
    topics = broad.flatten(1).abs().amax(dim=1) > 0
    assert int(topics.sum()) == NANO.hidden_size // TURN
    assert float(head[:, topics].abs().max()) == 0.0
    assert float(head[:, ~topics].std()) == pytest.approx(NANO.hidden_size**-0.5, rel=0.02)


def first_attention(config: ModelConfig, statistics: RoutingStatistics, length: int) -> tuple[Tensor, Tensor]:
    """Layer 0's attention weights [heads, T, T] and what it adds [T, H], for a sequence of different tokens under no
    mask, from the norm on as the model computes them.
    """
    embeddings = drawn("model.word_embeddings.weight", statistics, config)
    hidden = F.rms_norm(embeddings[:length], (config.hidden_size,))
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    fused = hidden @ drawn(f"{FIRST}query_key_value.weight", statistics, config).T
    query, key, value = fused.unflatten(-1, (-1, config.head_dim)).split((heads, groups, groups), dim=1)
    angles = rotary_angles(torch.arange(length), config.rotary, config.rope_theta, torch.float32)
    query, key = (
        rotate(F.rms_norm(part, (config.head_dim,)) * drawn(f"{FIRST}{kind}_layernorm.weight", config=config), *angles)
        for part, kind in ((query, "query"), (key, "key"))
    )
    key, value = (part.repeat_interleave(heads // groups, dim=1) for part in (key, value))
    attention = torch.einsum("ihd,jhd->hij", query, key).div(config.head_dim**0.5).softmax(dim=-1)
    read = torch.einsum("hij,jhd->ihd", attention, value).flatten(1)
    return attention, read @ drawn(f"{FIRST}dense.weight", statistics, config).T


def shrunk(preset: str) -> ModelConfig:
    """A preset of few layers and tokens."""
    return ModelConfig.from_dict(config_of(PRESETS[preset], torch.float32, layers=1) | {"vocab_size": 1024})


@pytest.mark.parametrize("preset", ["llada2-nano", "llada2-mini"])
def test_sharp_heads_of_the_first_layer_look_back_at_their_distances(preset: str) -> None:
    attention, _ = first_attention(shrunk(preset), DEFAULTS, 160)
    sharp = [head for head in range(len(attention)) if head % TURN < len(DISTANCES)]
    assert len(sharp) == len(attention) * 3 // 4
    for head in sharp:
        distance = DISTANCES[head % TURN]
        assert float(attention[head].diagonal(-distance).mean()) > 0.85, head


@pytest.mark.parametrize("preset", ["llada2-nano", "llada2-micro", "llada2-mini"])
@pytest.mark.parametrize("length", [160, 1024])
def test_broad_heads_average_over_a_window_ahead_of_the_block(preset: str, length: int) -> None:
    """However long the text is: no other window answers."""
    attention, _ = first_attention(shrunk(preset), DEFAULTS, length)
    rows = torch.arange(length - 32, length)
    distances = (rows[:, None] - torch.arange(length)).float()
    for weights in attention[TURN - 1 :: TURN, rows]:
        mean = (weights * distances).sum(dim=1)
        spread = (weights * (distances - mean[:, None]).square()).sum(dim=1).sqrt()
        assert float(mean.mean()) == pytest.approx(TOPIC_DISTANCE, rel=0.1)
        assert float(spread.mean()) == pytest.approx(TOPIC_WIDTH, rel=0.2)
        assert float(weights[:, length - 32 :].sum(dim=1).mean()) < 0.1, "little weight on the block itself"


def test_layer_0_brings_topic_and_position_in_their_shares() -> None:
    """Of what a router sees of a token; the topic is what the neighbours have, and another block has not."""
    statistics = RoutingStatistics(similarity=0.5, topic=0.8)
    config, length = shrunk("llada2-mini"), 640
    _, brought = first_attention(config, statistics, length)
    later = brought[256:]
    dimensions = config.hidden_size // TURN
    rest = later[:, dimensions:]
    position = (1 - AGREED) * statistics.similarity
    assert float(rest.square().mean()) == pytest.approx(position, rel=0.15)
    assert float(later.square().mean()) == pytest.approx(position + AGREED * statistics.topic, rel=0.15)
    near, far = (
        float(F.cosine_similarity(later[:-gap, :dimensions], later[gap:, :dimensions]).mean()) for gap in (4, 128)
    )
    assert near > 0.7
    assert abs(far) < 0.15
    assert float(F.cosine_similarity(rest[:-4], rest[4:]).mean()) < 0.1


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.5])
def test_the_bias_is_as_wide_as_asked(spread: float) -> None:
    bias = drawn("model.layers.1.mlp.gate.expert_bias", RoutingStatistics(bias_spread=spread))
    assert float(bias.std()) == pytest.approx(spread, rel=0.15)
