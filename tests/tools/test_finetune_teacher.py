"""Learning from the teacher's distributions: the divergence, its place in the loss, and the range of the noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.routing import Coreset, RoutingOptions
from tests.checkpoints import tiny_config, write_checkpoint
from tools.finetuning.batches import Batches
from tools.finetuning.dataset import Dataset, Overlong, Shape
from tools.finetuning.parallel import ALONE
from tools.finetuning.tuner import Optimisation, Teacher, Tuner
from tools.finetuning.weights import load_network
from tools.training.diffusion import Batch
from tools.training.routing import training_policy
from tools.training.trainer import Network

BLOCK, LENGTH, EOS, MASK = 8, 32, 94, 95
CONFIG = ModelConfig.from_dict(tiny_config())
ORIGINAL = training_policy("original", CONFIG, RoutingOptions())
DMOE = Coreset(CONFIG.router, top_p=0.3, min_experts=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("teacher"), tiny_config(), dtype=torch.bfloat16)


def network_of(source: Path) -> Network:
    return load_network(CONFIG, Checkpoint.open(source), ALONE)


def student(source: Path, share: float | None) -> Tuner:
    rates = Optimisation(steps=40, lr=3e-3, final_lr=3e-3)
    tuner = Tuner(network_of(source), DMOE, rates, block_length=BLOCK, dtype=torch.float32)
    if share is not None:
        tuner.learn_from(Teacher(network_of(source).requires_grad_(False), ORIGINAL, share))
    return tuner


def batches(**changes: object) -> Batches:
    rng = np.random.default_rng(0)
    data = Dataset(Shape(LENGTH, CONFIG.vocab_size, EOS, MASK))
    for _ in range(6):
        prompt, answer = (rng.integers(0, EOS, rng.integers(1, 16)).tolist() for _ in range(2))
        data.add(prompt, [*answer, EOS], Overlong.CUT, "here")
    return Batches(data, seed=1, batch=6, micro_batch=6, block_length=BLOCK, **changes)  # type: ignore[arg-type]


def log_shares(network: Network, batch: Batch, policy: object) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(batch, policy, BLOCK)
    return logits.double().log_softmax(dim=-1)


def test_loss_is_divergence_at_the_teachers_share_and_cross_entropy_for_the_rest(source: Path) -> None:
    (batch,) = batches().of_step(0)
    tuner = student(source, 0.7)
    wanted, mine = log_shares(network_of(source), batch, ORIGINAL), log_shares(tuner.network, batch, DMOE)
    divergence = (wanted.exp() * (wanted - mine)).sum()
    entropy = -mine[torch.arange(len(batch.targets)), torch.from_numpy(batch.targets)].sum()
    assert divergence > 0.01  # the two routings do differ here
    found = float(tuner._accumulate(batch, DMOE, 1.0)[0])
    assert found == pytest.approx(float(0.7 * divergence + 0.3 * entropy), rel=1e-4)


def test_a_student_that_is_the_teacher_has_nothing_to_learn(source: Path) -> None:
    (batch,) = batches().of_step(0)
    report = student(source, 1.0).step([batch], [ORIGINAL])
    assert report.loss == pytest.approx(0, abs=1e-6)
    assert report.norm == pytest.approx(0, abs=1e-4)


def test_the_student_comes_nearer_and_the_teacher_stays(source: Path) -> None:
    tuner = student(source, 1.0)
    assert tuner.teacher is not None
    before = [weight.clone() for _, weight in tuner.teacher.network.named_weights()]
    made = batches()
    losses = [tuner.step(made.of_step(0), [DMOE]).loss for _ in range(25)]
    assert losses[-1] < 0.5 * losses[0]
    for weight, (_, now) in zip(before, tuner.teacher.network.named_weights(), strict=True):
        assert torch.equal(weight, now)


def test_noisings_share_one_clean_half_and_sigma_stays_in_its_range() -> None:
    (once,) = batches().of_step(0)
    (twice,) = batches(noisings=2).of_step(0)
    assert len(twice.noisy) == 2 * len(once.noisy)
    assert len(twice.tokens) - len(once.tokens) == len(once.noisy)
    (all_masked,) = batches(sigma=(1.0, 1.0)).of_step(0)
    maskable = sum(int(batches().dataset.example(index).maskable.sum()) for index in range(6))
    assert len(all_masked.masked) == maskable
