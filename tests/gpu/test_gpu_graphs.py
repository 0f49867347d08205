"""Attention and routers replayed from CUDA graphs, on the GPU: the same answers in every bit, within the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from offload_engine import Engine, SamplingParams
from tests.checkpoints import tiny_config, write_checkpoint

PROMPTS = [list(range(3, 50)), list(range(10, 90)), list(range(40, 51)), list(range(3, 50))]
PARAMS = SamplingParams(max_new_tokens=96, threshold=1, steps=8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_answers_are_those_without_graphs(tmp_path: Path, dtype: str, cuda: torch.device) -> None:
    directory = write_checkpoint(tmp_path, tiny_config(), dtype=torch.bfloat16)
    answers = []
    for choice in ("off", "on"):
        with Engine.from_pretrained(
            directory, device=str(cuda), gpu_mem="2GB", expert_mem="100KB", dtype=dtype, cuda_graphs=choice
        ) as engine:
            answers.append([engine.generate(prompt, PARAMS).token_ids for prompt in PROMPTS])
            graphs = engine._parts.graphs
            assert (graphs is not None) == (choice == "on")
            if graphs is not None:
                assert graphs._kept, "something was recorded"
                assert graphs._proven == set(engine.model_config.moe_layers)
            assert engine.stats.measured_peak_bytes <= engine.plan.total
    assert answers[0] == answers[1]
    assert answers[0][0] == answers[0][-1]
