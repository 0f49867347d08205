"""Learning from the teacher's distributions: the divergence, its place in the loss, and the range of the noise."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from offload_engine.errors import UsageError
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.routing import Coreset, RoutingOptions
from tests.checkpoints import tiny_config, write_checkpoint
from tools.finetuning.batches import Batches
from tools.finetuning.dataset import Dataset, Overlong, Shape
from tools.finetuning.parallel import ALONE
from tools.finetuning.run import Run, build_run
from tools.finetuning.settings import Settings
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


# --- another checkpoint as the teacher -----------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"complete": true}')
    lines = ({"prompt_ids": [1, 2, number], "answer_ids": [3, number, EOS]} for number in range(4))
    (folder / "shard-00000.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def run_of(source: Path, data: Path, *, resume: bool = False, **changes: Any) -> Run:
    given = {"length": 16, "block_length": BLOCK, "batch": 2, "lr": 1e-3, "steps": 2, "teacher_share": 0.5, **changes}
    settings = Settings(model=str(source), data=data, out=data.parent / "out", **given)
    return build_run(settings, ALONE, resume=resume)


def test_another_teacher_routes_by_its_own_routers_shape(source: Path, data: Path, tmp_path: Path) -> None:
    raw = tiny_config(num_experts=24, num_experts_per_tok=3, n_group=1, topk_group=1)
    other = write_checkpoint(tmp_path / "other", raw, dtype=torch.bfloat16, seed=5)
    run = run_of(source, data, teacher=str(other))
    teacher, theirs = run.tuner.teacher, ModelConfig.from_dict(raw)
    assert teacher is not None
    assert teacher.policy == training_policy("original", theirs, RoutingOptions())
    assert teacher.policy != run.original
    (batch,) = run.batches.of_step(0)
    exact = load_network(theirs, Checkpoint.open(other), ALONE)
    wanted = log_shares(exact, batch, training_policy("original", theirs, RoutingOptions()))
    assert torch.equal(log_shares(teacher.network, batch, teacher.policy), wanted)
    assert not any(weight.requires_grad for weight in teacher.network.parameters())
    run._step()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"vocab_size": 104}, "has a vocabulary of 104, --model 96; wanted the same"),
        ({"eos_token_id": 7, "pad_token_id": 7}, "has eos id 7, --model 94; wanted the same"),
        ({"mask_token_id": 9}, "has mask id 9, --model 95; wanted the same"),
    ],
)
def test_a_teacher_of_other_tokens_is_refused(
    source: Path, data: Path, tmp_path: Path, changes: dict[str, int], complaint: str
) -> None:
    other = write_checkpoint(tmp_path / "other", tiny_config(**changes), dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=re.escape(f"--teacher {other} {complaint}")):
        run_of(source, data, teacher=str(other))


def test_a_run_is_resumed_with_the_model_and_the_teacher_it_began_with(
    source: Path, data: Path, tmp_path: Path
) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    shutil.copytree(source, mine)
    write_checkpoint(other, tiny_config(), dtype=torch.bfloat16, seed=5)
    run = run_of(mine, data, teacher=str(other))
    run._step()
    run.save()
    assert run_of(mine, data, teacher=str(other), resume=True).tuner.steps == 1
    for folder, option in ((other, "teacher"), (mine, "model")):
        kept = (folder / "model.safetensors").read_bytes()
        write_checkpoint(folder, tiny_config(), dtype=torch.bfloat16, seed=6)  # the same name, another model
        with pytest.raises(UsageError, match=f"this run has fingerprint of --{option} '"):
            run_of(mine, data, teacher=str(other), resume=True)
        (folder / "model.safetensors").write_bytes(kept)


def test_noisings_share_one_clean_half_and_sigma_stays_in_its_range() -> None:
    (once,) = batches().of_step(0)
    (twice,) = batches(noisings=2).of_step(0)
    assert len(twice.noisy) == 2 * len(once.noisy)
    assert len(twice.tokens) - len(once.tokens) == len(once.noisy)
    (all_masked,) = batches(sigma=(1.0, 1.0)).of_step(0)
    maskable = sum(int(batches().dataset.example(index).maskable.sum()) for index in range(6))
    assert len(all_masked.masked) == maskable
