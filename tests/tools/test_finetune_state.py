"""What training keeps, and where: weights for the backward, and an optimiser's state after a resumption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.routing import Coreset
from tests.checkpoints import tiny_config, write_checkpoint
from tools.finetuning.batches import Batches
from tools.finetuning.dataset import Dataset, Overlong, Shape
from tools.finetuning.parallel import ALONE
from tools.finetuning.tuner import Optimisation, Tuner
from tools.finetuning.weights import load_network

BLOCK = 8
CONFIG = ModelConfig.from_dict(tiny_config())
POLICY = Coreset(CONFIG.router, top_p=0.6, min_experts=6)


@pytest.fixture
def tuner(tmp_path: Path) -> Tuner:
    source = write_checkpoint(tmp_path / "base", tiny_config(), dtype=torch.bfloat16)
    network = load_network(CONFIG, Checkpoint.open(source), ALONE)
    return Tuner(network, POLICY, Optimisation(steps=4, lr=1e-3), block_length=BLOCK)


def batches() -> Batches:
    rng = np.random.default_rng(0)
    data = Dataset(Shape(32, CONFIG.vocab_size, 94, 95))
    for _ in range(4):
        data.add(rng.integers(0, 94, 9).tolist(), [*rng.integers(0, 94, 12).tolist(), 94], Overlong.CUT, "here")
    return Batches(data, seed=0, batch=4, micro_batch=4, block_length=BLOCK)


def test_backward_keeps_no_experts_but_the_parameters_themselves(tuner: Tuner) -> None:
    """Under autocast: a copy in bfloat16, or of the experts in use, would live from forward to backward."""
    kept: list[Tensor] = []
    (batch,) = batches().of_step(0)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one), tuner.autocast:  # type: ignore[func-returns-value]
        tuner.network(batch, POLICY, BLOCK)
    experts = tuner.network.experts
    stacks = {one.data_ptr(): one for one in (*experts.gate_up.values(), *experts.down.values())}
    sizes = {tuple(one.shape[1:]) for one in stacks.values()}
    found = [one for one in kept if one.dim() == 3 and tuple(one.shape[1:]) in sizes]
    assert len(found) == len(stacks) == 2 * len(CONFIG.moe_layers)
    for one in found:
        assert torch.equal(one, stacks[one.data_ptr()])


def test_a_resumed_optimisers_state_is_where_its_weights_are(tuner: Tuner) -> None:
    """As fused AdamW wants it, the number of steps included."""
    tuner.step(batches().of_step(0), [POLICY])
    state = tuner.state_dict()
    tuner.network.to("meta")  # a device that every machine has, and where the saved state isn't
    tuner.adam.state.clear()
    tuner.load_state_dict(state)
    found = [
        (weight.device, value.device)
        for _, weight in tuner.network.named_weights()
        for value in tuner.adam.state[weight].values()
    ]
    assert len(found) == 3 * len(list(tuner.network.parameters()))
    assert {str(device) for pair in found for device in pair} == {"meta"}
