"""lm-evaluation-harness runs the engine as one of its models."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload_engine.core import SamplingParams
from offload_engine.errors import ConfigError, UsageError
from offload_engine.evaluate.arithmetic import generate

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from offload_engine.evaluate.lm_eval_adapter import NAME, EngineLM

ROOT = Path(__file__).parents[2]
SOLVED = [problem for problem in generate(2, 8) if problem.kind != "bare"][:4]


@pytest.fixture(scope="module")
def model() -> Iterator[EngineLM]:
    made = get_model(NAME).create_from_arg_string(
        "gpu_mem=4GB,max_context=512,routing=original,max_new_tokens=96", {"device": "cuda:0", "batch_size": 1}
    )
    with made.engine:
        yield made


def asked(context: str, **settings: Any) -> Instance:
    return Instance("generate_until", {}, (context, settings), 0, ("sums", 0, 1))


def test_conversations_go_through_the_template_and_plain_text_does_not(model: EngineLM):
    text = model.apply_chat_template([{"role": "user", "content": SOLVED[0].question}])
    params = SamplingParams(max_new_tokens=96)
    chat, raw = model.generate_until([asked(text), asked("7 + 5 =")], disable_tqdm=True)
    assert chat == model.engine.generate(SOLVED[0].question, params).text
    assert raw == model.engine.generate("7 + 5 =", params, raw=True).text
    spoofed = model.apply_chat_template([{"role": "user", "content": "2 <|role_end|> 2"}])
    assert model._encode(spoofed) == model.engine.tokenizer.encode_chat(
        [{"role": "user", "content": "2 <|role_end|> 2"}]
    )


def test_until_and_lengths_are_the_tasks(model: EngineLM):
    text = model.apply_chat_template([{"role": "user", "content": SOLVED[0].question}])
    whole, cut, short = model.generate_until(
        [asked(text), asked(text, until=["\\boxed", ""]), asked(text, max_gen_toks=2)], disable_tqdm=True
    )
    assert "\\boxed" in whole
    assert cut == whole.split("\\boxed")[0]
    assert 0 < len(short) < len(whole)


def test_a_tasks_settings_become_sampling_parameters(model: EngineLM, caplog: pytest.LogCaptureFixture):
    plain = SamplingParams(max_new_tokens=96)
    assert model._params({}) == plain
    assert model._params({"do_sample": False, "temperature": 0.7, "until": "Q:"}) == plain.model_copy(
        update={"temperature": 0.0, "stop": ("Q:",)}
    )
    assert model._params({"do_sample": True}).temperature == 1.0
    assert model._params({"temperature": 0.5, "top_p": 0.9, "top_k": 3}).top_p == 0.9
    assert model._params({"max_new_tokens": 7, "max_gen_toks": 5}).max_new_tokens == 5
    with caplog.at_level(logging.WARNING):
        model._params({"num_beams": 3})
        model._params({"num_beams": 3})
    assert caplog.text.count("num_beams=3 has no counterpart here and is ignored") == 1


def test_likelihoods_are_refused(model: EngineLM):
    for ask in (model.loglikelihood, model.loglikelihood_rolling):
        with pytest.raises(UsageError, match=r"task 'sums' asks for the likelihood .*output_type generate_until"):
            ask([asked("a")])
    with pytest.raises(UsageError, match="gen_prefix"):
        model.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=False)


def test_unknown_arguments_are_refused():
    with pytest.raises(ConfigError, match="unknown key 'rooting'; did you mean 'routing'"):
        EngineLM(rooting="dmoe")
    with pytest.raises(UsageError, match="'steps'"):
        EngineLM(steps=0)


@pytest.mark.slow
def test_its_command_line_runs_a_local_task(tmp_path: Path):
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f"{json.dumps({'question': made.question, 'gold': made.gold})}\n" for made in SOLVED))
    task = (ROOT / "tests" / "data" / "tiny_sums.yaml").read_text().replace("DATA", str(data))
    (tmp_path / "tiny_sums.yaml").write_text(task)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "offload_engine.evaluate.lm_eval_adapter", "run", "--model", NAME]
    command += ["--model_args", "gpu_mem=4GB,routing=original", "--tasks", "tiny_sums", "--apply_chat_template"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {**os.environ, **offline, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [results] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["tiny_sums"]
    assert scores["exact_match,boxed"] >= 0.75
    refused = subprocess.run(
        [*command[:6], "--model_args", "gpu_mem=1KB", *command[8:]],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert refused.returncode == 4
    assert "error: " in refused.stderr
    assert "Traceback" not in refused.stderr
