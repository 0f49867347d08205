"""The batch evaluator of training against the engine: another decoder, no cache, the same answers."""

from __future__ import annotations

import pytest
import torch

from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import BUILT_IN, choose_policy
from offload_engine.engine.engine import Engine
from offload_engine.evaluate.arithmetic import generate
from tools.evaluate_arithmetic import Decoding, Evaluator, answer_text, boxed, by_length, load_network
from tools.training.data import vocabulary


@pytest.mark.parametrize("routing", ["original", "dmoe"])
def test_it_answers_as_the_engine_does(routing: str) -> None:
    problems = list(generate(2, 20))
    network = load_network(BUILT_IN).cast(torch.float32)  # lossless: stored as bfloat16
    words = vocabulary(str(BUILT_IN / "tokenizer.json"))
    policy, _ = choose_policy(EngineConfig(routing=routing, top_p=0.6), network.model.config)
    evaluator = Evaluator(network, policy, words, Decoding())
    answers: dict[str, tuple[str, int]] = {}
    for length, group in by_length(problems, words).items():
        tokens, steps = evaluator.decode(torch.tensor([ids for _, ids in group]))
        for (problem, _), row, taken in zip(group, tokens[:, length:], steps.tolist(), strict=True):
            answers[problem.question] = answer_text(words, row), taken
    with Engine.from_pretrained(gpu_mem="4GB", max_context=512, routing=routing, top_p=0.6) as engine:
        for problem in problems:
            done = engine.generate(problem.question, SamplingParams(max_new_tokens=128))
            assert (done.text, done.stats.denoise_steps) == answers[problem.question]
            assert (boxed(done.text) == problem.gold) == done.text.endswith(f"\\boxed{{{problem.gold}}}")
        stats = engine.stats
        assert evaluator.unique.forwards == stats.denoise_steps
        assert sum(evaluator.unique.sums.values()) == pytest.approx(stats.unique_experts_sum, rel=1e-3)
