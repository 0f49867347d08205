"""What the streams did, by the device's own clock; the numbers are printed, for they depend on the card."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from offload_engine.engine.engine import Engine
from tests.checkpoints import tiny_config, write_checkpoint
from tools.gpu_timeline import KINDS, Stretch, drawing, measure, summarise

pytest.importorskip("offload_engine.experts.transfer.cuda")

WIDE = tiny_config(
    hidden_size=1024,
    intermediate_size=2048,
    num_experts=64,
    num_experts_per_tok=8,
    moe_intermediate_size=512,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=64,
    num_hidden_layers=5,
    n_group=8,
    topk_group=4,
)
"""256 experts of 3 MB, half of LLaDA2.0-mini's size, and as many attention heads."""
SLOTS = 96
TICK = 0.002
"""Milliseconds, four times what events tell apart."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("wide"), WIDE, dtype=torch.bfloat16)


def in_order(stretches: list[Stretch]) -> bool:
    rising = sorted(stretches, key=lambda one: one.began)
    return all(one.ended <= other.began + TICK for one, other in pairwise(rising))


def test_timeline_of_an_offloaded_answer(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slab = 3 * 2**20 + 4 * 4096
    with Engine.from_pretrained(directory, device="cuda", gpu_mem="3GB", expert_mem=SLOTS * slab) as engine:
        loads = engine.stats.loads
        stretches = measure(engine, blocks=2, prompt_tokens=64)
        loads = engine.stats.loads - loads
        assert engine.plan.slots < engine.plan.all_experts
    summary = summarise(stretches)
    with capsys.disabled():
        sys.stdout.write("\n".join(("", *summary.lines(), *drawing(stretches), "")))
    assert all(one.began <= one.ended for one in stretches)
    for kind in KINDS:
        assert in_order([one for one in stretches if one.kind == kind]), "a stream does one thing after the other"
    copies = [one for one in stretches if one.kind == "copy"]
    assert 0 < len(copies) <= loads
    assert all(0 < one.nbytes <= engine.plan.slab_bytes for one in copies)
    assert summary.copy_beside_attention_ms <= min(summary.copy_ms, summary.attention_ms)
    assert 0 < summary.copy_beside_compute_ms <= summary.copy_ms <= summary.wall_ms
