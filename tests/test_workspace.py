"""The planned workspace is held against what torch allocates in a real forward."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from offload_engine.core import ForwardInfo, Phase, SamplingParams
from offload_engine.decode.kv_cache import PrefixCache
from offload_engine.decode.sampler import propose
from offload_engine.memory import MemoryPlan, Setup, plan_memory
from offload_engine.memory.footprint import GEMM_SCRATCH_BYTES
from offload_engine.model import attention
from offload_engine.model.config import ModelConfig
from offload_engine.model.llada2 import Forward, LLaDA2Model
from offload_engine.model.moe import ExpertWeights, ResidentExperts
from offload_engine.model.quantized import quantize_int4, quantize_int8
from offload_engine.routing import make_policy
from tests.mini_config import mini

DTYPES = {2: torch.bfloat16, 4: torch.float32}
WIDE = {"hidden_size": 256, "num_attention_heads": 8, "intermediate_size": 512, "moe_intermediate_size": 64}
NARROW = WIDE | {"hidden_size": 64, "num_experts_per_tok": 1, "num_shared_experts": 0, "intermediate_size": 64}
DENSE = WIDE | {"intermediate_size": 2048, "num_experts_per_tok": 1, "moe_intermediate_size": 16}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def model_of(config: ModelConfig, dtype: torch.dtype) -> LLaDA2Model:
    torch.manual_seed(0)
    model = LLaDA2Model(config).requires_grad_(False).to(dtype).eval()
    for block in (layer.mlp for layer in model.model.layers):
        if hasattr(block, "gate"):
            block.gate.float()
    return model


def peak_of(run: Callable[[], object], folder: Path) -> int:
    """Bytes torch allocates at most during `run`, beside what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = [
        event for event in json.loads((folder / "trace.json").read_text())["traceEvents"] if event["name"] == "[memory]"
    ]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def prefill_peak(
    config: ModelConfig, plan: MemoryPlan, dtype: torch.dtype, weights: ExpertWeights, folder: Path
) -> int:
    """Bytes that the longest prefill of `plan` allocates when all experts have these weights."""
    tokens, model = plan.forward_tokens, model_of(config, dtype)
    experts = ResidentExperts(lambda _layer, _expert: weights)
    cache = PrefixCache(config, plan.kv_positions, dtype, torch.device("cpu"))
    info, policy = ForwardInfo(Phase.PREFILL), make_policy("dmoe", config.router)

    def prefill() -> None:
        with torch.inference_mode():
            spans = [cache.span(tokens, 32, start) for start in range(0, plan.kv_positions, tokens)]
            blocks = torch.arange(tokens) // 32
            forwards = [Forward(info, span.positions, blocks, span, policy, experts) for span in spans]
            model.prefill(torch.randint(0, 64, (plan.kv_positions,)), forwards)

    return peak_of(prefill, folder)


@pytest.mark.parametrize("pieces", [1, 8])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shape", [WIDE, NARROW, DENSE], ids=["experts", "attention", "dense"])
def test_prefill_stays_within_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, itemsize: int, shape: dict[str, Any], pieces: int
) -> None:
    monkeypatch.setattr(attention, "kernel_positions", lambda: 0)  # torch attends, which takes more than our kernel
    config = mini(num_hidden_layers=3, vocab_size=64, num_experts=16, **shape)
    setup = Setup(device="cpu", itemsize=itemsize, prefill_chunk=128)
    plan = plan_memory(config, setup, 10**9, max_context=128 * pieces)
    assert plan.kv_positions == pieces * plan.forward_tokens
    wide = torch.zeros(config.moe_intermediate_size, config.hidden_size, dtype=DTYPES[itemsize])
    peak = prefill_peak(config, plan, DTYPES[itemsize], ExpertWeights(wide, wide, wide.T.contiguous()), tmp_path)
    promised = plan.workspace - GEMM_SCRATCH_BYTES["cpu"]
    assert peak <= promised
    assert peak > promised // 3, "a bound that loose would waste slots"


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.usefixtures("torch_computes")
def test_dequantising_stays_within_the_workspace(tmp_path: Path, itemsize: int, bits: int) -> None:
    shape = {"hidden_size": 512, "moe_intermediate_size": 512, "num_attention_heads": 4, "intermediate_size": 64}
    config = mini(num_hidden_layers=3, vocab_size=64, num_experts=16, **shape)
    setup = Setup(device="cpu", itemsize=itemsize, stored_itemsize=1, prefill_chunk=32)
    plan = plan_memory(config, setup, 10**9, max_context=64)
    matrix = torch.randn(512, 512)
    rounded = quantize_int8(matrix) if bits == 8 else quantize_int4(matrix, 32)
    peak = prefill_peak(config, plan, DTYPES[itemsize], ExpertWeights(rounded, rounded, rounded), tmp_path)
    assert 3 * matrix.numel() * itemsize < peak <= plan.workspace - GEMM_SCRATCH_BYTES["cpu"]
    resident = plan_memory(config, replace(setup, stored_itemsize=itemsize), 10**9, max_context=64)
    assert peak > resident.workspace - GEMM_SCRATCH_BYTES["cpu"], "without its share of the plan it would not fit"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drawing_tokens_stays_within_the_workspace(tmp_path: Path, temperature: float) -> None:
    config = mini(hidden_size=64, num_hidden_layers=1, vocab_size=50_000, moe_intermediate_size=16)
    plan = plan_memory(config, Setup(device="cpu", prefill_chunk=32), 10**9, max_context=64)
    model = model_of(config, torch.bfloat16)
    hidden = torch.randn(32, 64, dtype=torch.bfloat16)
    params = SamplingParams(temperature=temperature, top_k=100, top_p=0.9)

    def draw() -> None:
        with torch.inference_mode():
            propose(model.logits(hidden), 3, params, torch.Generator().manual_seed(0))

    peak = peak_of(draw, tmp_path)
    assert peak <= plan.workspace - GEMM_SCRATCH_BYTES["cpu"]
    assert peak > 32 * 50_000 * 4
