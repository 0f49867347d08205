"""Whole runs of `tools.finetune`: exported, resumed exactly, killed while saving, and refused."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

from offload_engine import Engine
from offload_engine.core import ForwardInfo, Phase
from offload_engine.errors import OffloadError, UsageError
from offload_engine.model.attention import MaskedSequence, block_causal_mask
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward
from offload_engine.routing import Coreset
from tests.checkpoints import tiny_config, write_checkpoint
from tools.finetune import main
from tools.finetuning.parallel import ALONE, Processes
from tools.finetuning.run import Run, build_run
from tools.finetuning.saves import Saves
from tools.finetuning.settings import Settings
from tools.finetuning.weights import Published, export, load_network
from tools.training import checkpoint

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("base"), tiny_config(), dtype=torch.bfloat16, shards=3)
    (folder / "generation_config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    (folder / "manifest.json").write_text('{"complete": true}')
    with (folder / "shard-00000.jsonl").open("w") as file:
        for _ in range(20):
            prompt = [rng.randrange(94) for _ in range(rng.randrange(1, 20))]
            answer = [(3 * token + 1) % 94 for token in prompt] + [94]
            file.write(json.dumps({"prompt_ids": prompt, "answer_ids": answer}) + "\n")
    return folder


def options(base: Path, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    given = {"length": 32, "block_length": 8, "batch": 4, "lr": 3e-3, "final_lr": 1e-3, "steps": 6, "min_experts": 6}
    return {"model": str(base), "data": data, "out": out, **given, **changes}


def invoke(base: Path, data: Path, out: Path, *flags: str, **changes: Any) -> Result:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options(base, data, out, **changes).items()]
    return CliRunner().invoke(main, [*arguments, *flags])


def run_of(base: Path, data: Path, out: Path, *, resume: bool = False, **changes: Any) -> Run:
    return build_run(Settings(**options(base, data, out, **changes)), ALONE, resume=resume)


def logged(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines]


# --- from checkpoint to checkpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["split", "merged"])
def test_weights_come_from_either_layout_and_go_out_split_and_unchanged(tmp_path: Path, layout: Any) -> None:
    written = {
        name: load_file(write_checkpoint(tmp_path / name, tiny_config(), dtype=torch.bfloat16, layout=name, seed=4)
                        / "model.safetensors")
        for name in ("split", layout)
    }  # fmt: skip
    config = ModelConfig.from_file(tmp_path / layout / "config.json")
    network = load_network(config, Checkpoint.open(tmp_path / layout), ALONE)
    assert all(weight.dtype == torch.float32 for weight in network.parameters())
    for size in (10**9, 30_000):
        export(tmp_path / "out", Published(network, config), {"a": 1}, tmp_path / layout, size, ALONE)
        again = Checkpoint.open(tmp_path / "out")
        assert set(again.tensors) == set(written["split"])
        for name, tensor in written["split"].items():
            found = again.read(name)
            assert found.dtype == tensor.dtype == (torch.float32 if name.endswith("expert_bias") else torch.bfloat16)
            assert torch.equal(found, tensor)
        assert len(again.file_sizes) == 1 if size == 10**9 else len(again.file_sizes) > 3
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"split", layout, "out"})


def test_engine_loads_the_result_and_computes_what_the_network_does(base: Path, data: Path, tmp_path: Path) -> None:
    run = run_of(base, data, tmp_path, top_p=0.5, min_experts=16, dtype="float32", shard_size="40KB")
    assert run.train() == 0
    assert not (tmp_path / "model" / "model.safetensors").exists()
    assert (tmp_path / "model" / "generation_config.json").read_text() == "{}"
    network = run.tuner.network
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(weight.bfloat16())  # as exported
    tokens = list(range(3, 43))
    with Engine.from_pretrained(str(tmp_path / "model"), dtype="float32") as engine:
        policy = engine._parts.policy
        assert isinstance(policy, Coreset)
        assert policy.top_p == 0.5
        assert any("was distilled for dMoE" in notice for notice in engine._parts.notices)
        logits = engine.logits(tokens, block_length=8)
    positions = torch.arange(len(tokens))
    mask = MaskedSequence(block_causal_mask(positions, 8))
    forward = Forward(ForwardInfo(Phase.SCORE), positions, positions // 8, mask, run.tuner.policy, network.experts)
    with torch.no_grad():
        mine = network.model.logits(network.model(torch.tensor(tokens), forward))
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)


def test_config_names_the_routing_that_was_trained(base: Path, data: Path, tmp_path: Path) -> None:
    for routing, mode in (("dmoe", "aggregate"), ("original", None)):
        out = tmp_path / routing
        assert invoke(base, data, out, steps=1, routing=routing).exit_code == 0
        config = json.loads((out / "model" / "config.json").read_text())
        assert config.get("mode") == mode
        assert config.get("core_threshold") == (0.6 if mode else None)
        assert ModelConfig.from_file(out / "model" / "config.json").distilled_top_p == (0.6 if mode else None)
        assert "core_min_experts" not in config  # the base's is not the result's
    distilled = tmp_path / "dmoe" / "model"
    again = invoke(base, data, tmp_path / "dmoe", "--export", steps=1, routing="dmoe", served_min_experts=9)
    assert again.exit_code == 0, again.output
    assert ModelConfig.from_file(distilled / "config.json").core_min_experts == 9
    assert invoke(distilled, data, tmp_path / "back", steps=1, routing="original").exit_code == 0
    assert "mode" not in json.loads((tmp_path / "back" / "model" / "config.json").read_text())


# --- stopped and gone on with --------------------------------------------------------------------------------------


def test_a_resumed_run_repeats_the_unbroken_one_exactly(base: Path, data: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"epochs": 2, "micro_batch": 2, "original_share": 0.3, "steps": 9}
    assert invoke(base, data, whole, **changes).exit_code == 0
    first = run_of(base, data, parts, **changes)
    for step in range(5):
        report = first._step()
        if step == 2:
            first.save()
        with (parts / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": step, "loss": report.loss + (step > 2)}) + "\n")  # to be done again
    resumed = invoke(base, data, parts, "--resume", **changes)
    assert resumed.exit_code == 0, resumed.output
    assert [line["loss"] for line in logged(parts)] == [line["loss"] for line in logged(whole)]
    assert [line["step"] for line in logged(parts)] == list(range(9))
    mine, theirs = (load_file(out / "model" / "model.safetensors") for out in (parts, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["step-00000009"]


def test_resuming_with_other_settings_is_refused_by_name(base: Path, data: Path, tmp_path: Path) -> None:
    assert invoke(base, data, tmp_path, steps=1).exit_code == 0
    for changes, named in (
        ({"lr": 5e-3}, "lr 0.003, not 0.005"),
        ({"seed": 3}, "seed 0, not 3"),
        ({"limit_samples": 19}, "limit_samples None, not 19"),
        ({"steps": 2}, "steps 1, not 2"),
    ):
        result = invoke(base, data, tmp_path, "--resume", **{"steps": 1, **changes})
        assert result.exit_code == 2
        assert f"this run has {named}; resume it with" in result.output
        assert len([line for line in result.output.strip().splitlines() if not line.startswith("reading ")]) == 1
    other = tmp_path / "other"
    other.mkdir()
    for path in data.iterdir():
        (other / path.name).write_text(path.read_text().replace("[1, ", "[2, ").replace(", 5,", ", 6,"))
    assert "this run has content of the data" in invoke(base, other, tmp_path, "--resume", steps=1).output
    assert "a run is here already; continue it with --resume" in invoke(base, data, tmp_path, steps=1).output
    fresh = invoke(base, data, tmp_path / "none", "--resume")
    assert (fresh.exit_code, "holds no checkpoint to resume" in fresh.output) == (2, True)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from tools.training import checkpoint
from tools.finetuning.parallel import ALONE, Processes
from tools.finetuning.run import build_run
from tools.finetuning.settings import Settings
torch.set_num_threads(1)
run = build_run(Settings(model=sys.argv[1], data=Path(sys.argv[2]), out=Path(sys.argv[3]), length=32, block_length=8,
                         lr=3e-3, final_lr=1e-3, steps=6, min_experts=6), ALONE, resume=False)
run._step()
run.save()
run._step()
def torn(state, file):
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = torn
run.save()
"""


def test_a_kill_while_saving_leaves_the_previous_checkpoint_whole(base: Path, data: Path, tmp_path: Path) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(base), str(data), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    leftovers = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert leftovers == {"step-00000001", ".step-00000002.part"}
    resumed = invoke(base, data, tmp_path, "--resume", batch=4)
    assert resumed.exit_code == 0, resumed.output
    assert [line["step"] for line in logged(tmp_path)][-1] == 5
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-00000006"}


def test_ctrl_c_saves_after_the_step_under_way(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Run._step

    def interrupted(run: Run) -> Any:
        report = step(run)
        if run.tuner.steps == 2:
            signal.raise_signal(signal.SIGINT)
        return report

    monkeypatch.setattr(Run, "_step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is started to ignore it
    try:
        result = invoke(base, data, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130
    assert "saved after 2 steps; go on with --resume" in result.output
    monkeypatch.undo()
    assert invoke(base, data, tmp_path, "--resume").exit_code == 0
    assert [line["step"] for line in logged(tmp_path)] == list(range(6))


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(
    base: Path, data: Path, tmp_path: Path
) -> None:
    run = run_of(base, data, tmp_path)
    run._step()
    run.save()
    path = tmp_path / "checkpoints" / "step-00000001" / "rank-0.pt"
    state = checkpoint.load(path)
    state["state"]["weights"]["model.lm_head.weight"][:] = torch.inf
    checkpoint.save(path, state)
    broken = invoke(base, data, tmp_path, "--resume")
    assert broken.exit_code == 1
    assert "step 1: the loss is nan, so the run stops before that update; the last good checkpoint is" in broken.output
    assert checkpoint.load(path)["state"]["steps"] == 1
    assert not (tmp_path / "model").exists()


def test_a_damaged_checkpoint_is_named(base: Path, data: Path, tmp_path: Path) -> None:
    assert invoke(base, data, tmp_path, steps=1).exit_code == 0
    (tmp_path / "checkpoints" / "step-00000001" / "rank-0.pt").write_bytes(b"nothing")
    result = invoke(base, data, tmp_path, "--resume", steps=1)
    assert result.exit_code == 2
    assert "step-00000001: not a whole checkpoint" in result.output


@pytest.mark.parametrize(
    ("changes", "complaint", "code"),
    [
        ({"length": 30}, "--length is 30, no multiple of --block-length 8; 32 is", 2),
        ({"final_lr": 1.0}, "--final-lr is 1, above --lr 0.003", 2),
        ({"batch": 100, "steps": None}, "--epochs 2 over 20 samples makes no whole batch of 100", 2),
        ({"routing": "best"}, "routing is 'best'; choose one of original, ", 2),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all: no such model directory", 3),
    ],
)
def test_settings_that_cannot_be_are_one_line(
    base: Path, data: Path, tmp_path: Path, changes: dict[str, Any], complaint: str, code: int
) -> None:
    given = {name: value for name, value in options(base, data, tmp_path, **changes).items() if value is not None}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code, result.output
    assert complaint in result.output
    assert len([line for line in result.output.strip().splitlines() if not line.startswith("reading ")]) == 1


def test_steps_visit_every_sample_once_an_epoch_in_another_order(base: Path, data: Path, tmp_path: Path) -> None:
    batches = run_of(base, data, tmp_path).batches
    visits = [[batches.sample(step, place) for step in range(5 * e, 5 * e + 5) for place in range(4)] for e in (0, 1)]
    assert [sorted(epoch) for epoch in visits] == [list(range(20))] * 2
    assert visits[0] != visits[1]
    assert batches.steps(2) == 10
    assert run_of(base, data, tmp_path, seed=1).batches.sample(0, 0) != batches.sample(0, 0)


def test_saves_know_only_whole_checkpoints(tmp_path: Path) -> None:
    saves = Saves(tmp_path / "c", ALONE)
    assert saves.last() is None
    saves.save(9, {"x": 1}, {})
    saves.save(10, {"x": 2}, {})
    (tmp_path / "c" / ".step-00000011.part").mkdir()
    assert saves.last() == tmp_path / "c" / "step-00000010"
    assert saves.load(tmp_path / "c" / "step-00000010", {}) == {"x": 2}


def test_a_full_disk_is_named_and_keeps_the_previous_checkpoint(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of(base, data, tmp_path)
    run._step()
    run.save()
    run._step()

    def full(state: Any, file: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OffloadError, match=r"after 2 steps can't be written \(No space .* is .*step-00000001; free"):
        run.save()
    monkeypatch.undo()
    assert run.saves.last() == tmp_path / "checkpoints" / "step-00000001"
    run.save()
    assert run.saves.last() == tmp_path / "checkpoints" / "step-00000002"


def test_a_batch_that_processes_cannot_share_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    settings = Settings(**options(base, data, tmp_path, batch=5))
    settings.check(ALONE)
    with pytest.raises(UsageError, match="--batch is 5, no multiple of the 2 processes"):
        settings.check(Processes(rank=1, count=2))


def test_a_share_of_micro_batches_keeps_the_original_routing(base: Path, data: Path, tmp_path: Path) -> None:
    run = run_of(base, data, tmp_path, original_share=0.25, micro_batch=2)
    used = [policy.name for step in range(6) for policy in run._policies(step)]
    assert used == (["dmoe"] * 3 + ["original"]) * 3
    never = run_of(base, data, tmp_path)
    assert {policy.name for step in range(6) for policy in never._policies(step)} == {"dmoe"}
    always = run_of(base, data, tmp_path, original_share=1.0)
    assert {policy.name for policy in always._policies(0)} == {"original"}
    assert always._step().loss != never._step().loss
