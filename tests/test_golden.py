"""The engine against the reference implementation, offloading all the while."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from tests.checkpoints import GOLDEN, needs_golden
from tests.golden_cases import cases, generate_name, routing_options, tensors

pytestmark = needs_golden

FORWARD = sorted({name.removeprefix("logits_") for name in tensors() if name.startswith("logits_")})
ROUTINGS = ["original", "dmoe_0.5", "dmoe_0.6", "dmoe_0.8"]
FEW_SLOTS = 20 * 32768


@pytest.fixture(scope="module")
def engines() -> Iterator[dict[str, Engine]]:
    """One engine per routing, each with a tenth of the experts in memory."""
    opened = {
        routing: Engine.from_pretrained(GOLDEN, gpu_mem="3GB", expert_mem=FEW_SLOTS, **routing_options(routing))
        for routing in ROUTINGS
    }
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.mark.parametrize("name", FORWARD)
def test_forward(engines: dict[str, Engine], name: str) -> None:
    length, _, routing = name.partition("_")
    engine = engines[routing]
    ids = tensors()[f"ids_{length}"].tolist()
    torch.testing.assert_close(engine.logits(ids), tensors()[f"logits_{name}"], rtol=0, atol=1e-4)
    for layer, routed in enumerate(engine.routing(ids)):
        expected = tensors()[f"topk_{name}"][layer].sort(-1).values
        assert torch.equal(routed.experts.sort(-1).values, expected)
        torch.testing.assert_close(routed.weights.sum(-1), torch.full((len(ids),), 2.5))


@pytest.mark.parametrize("case", cases()["forward"], ids=lambda case: f"{case['L']}-{case['routing']}-{case.get('p')}")
def test_unique_experts_per_block(engines: dict[str, Engine], case: dict[str, Any]) -> None:
    routing = case["routing"] if "p" not in case else f"{case['routing']}_{case['p']}"
    ids = tensors()[f"ids_{case['L']}"].tolist()
    found = [[block.unique().numel() for block in layer.experts.split(32)] for layer in engines[routing].routing(ids)]
    assert found == case["unique"]


@pytest.fixture(scope="module")
def batches() -> Iterator[dict[str, Engine]]:
    """As `engines`, for three prompts at a time whose prefill goes in pieces of one block."""
    options: dict[str, Any] = {"gpu_mem": "3GB", "expert_mem": FEW_SLOTS, "batch_size": 3, "prefill_chunk": 32}
    opened = {routing: Engine.from_pretrained(GOLDEN, **options, **routing_options(routing)) for routing in ROUTINGS}
    yield opened
    for engine in opened.values():
        engine.close()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", cases()["generate"], ids=generate_name)
def test_generate_in_every_split_of_the_work(batches: dict[str, Engine], case: dict[str, Any], fused: bool) -> None:
    """Commits alone or fused, prefill in pieces, and other prompts in the same forwards: the same ids."""
    engine = batches[case["routing"]]
    engine._decoder.eos_token_id = case.get("eos_id", cases()["eos_id"])
    engine._decoder.fused_commit = fused
    prompts = sorted({one["P"] for one in cases()["generate"]})
    params = SamplingParams(max_new_tokens=64, threshold=case["threshold"])
    for batch_size in (1, 3):
        done = engine.generate(
            [tensors()[f"prompt_{length}"].tolist() for length in prompts], params, batch_size=batch_size
        )[prompts.index(case["P"])]
        assert done.token_ids == tensors()[generate_name(case)].tolist()
        assert done.finish_reason == ("eos" if case["eos"] else "length")


@pytest.mark.parametrize("case", cases()["generate"], ids=generate_name)
def test_generate(engines: dict[str, Engine], case: dict[str, Any]) -> None:
    engine = engines[case["routing"]]
    engine._decoder.eos_token_id = case.get("eos_id", cases()["eos_id"])
    prompt = tensors()[f"prompt_{case['P']}"].tolist()
    done = engine.generate(prompt, SamplingParams(max_new_tokens=64, threshold=case["threshold"]))
    assert done.token_ids == tensors()[generate_name(case)].tolist()
    assert done.finish_reason == ("eos" if case["eos"] else "length")
    assert cases()["mask_id"] not in done.token_ids
    if not case["eos"]:  # the reference stops a step later or earlier than REFERENCE §2 where an eos ends the answer
        assert done.stats.unique_experts == pytest.approx(case["avg_unique"])
