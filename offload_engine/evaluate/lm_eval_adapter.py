"""The engine as a model of lm-evaluation-harness (extra `lm-eval`), under the name `offload_engine`.

    python -m offload_engine.evaluate.lm_eval_adapter run --model offload_engine \
        --model_args pretrained=DIR,gpu_mem=8GB,routing=dmoe --tasks gsm8k_cot_zeroshot --apply_chat_template

is lm-eval's own command line, which then knows the engine; a program imports this module before it asks lm-eval for
the model. Model arguments are the fields of `EngineConfig` and `SamplingParams` (the latter's `top_p` is called
`sample_top_p`). Only tasks that generate can be run: a block-diffusion model has no exact likelihood of a given text.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from offload_engine.config import EngineConfig
from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import OffloadError, TokenizerError, UsageError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.text import Message, Tokenizer

logger = logging.getLogger(__name__)

NAME = "offload_engine"
SAMPLING = {"sample_top_p" if field == "top_p" else field: field for field in SamplingParams.model_fields}
"""Model argument -> field of `SamplingParams`."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the longest answer; the first that is given counts."""


@register_model(NAME)
class EngineLM(LM):  # type: ignore[misc]
    """Generates with one engine, one prompt after the other.

    A task's own settings (`until`, the longest answer, temperature) win over the model arguments.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        **options: Any,
    ) -> None:
        """`pretrained` is what `Engine.from_pretrained` takes. Raises `OffloadError`s.

        Batch sizes are lm-eval's to pass and have no effect: the engine answers one prompt at a time. A GPU counts as
        asked for only where there is one: lm-eval passes cuda:0 unless told otherwise.
        """
        super().__init__()
        if str(batch_size or 1) not in ("1", "auto") or (max_batch_size or 1) > 1:
            logger.warning("batch size %s is ignored: the engine answers one prompt at a time", batch_size)
        sampling = {SAMPLING[name]: options.pop(name) for name in list(options) if name in SAMPLING}
        self.params = SamplingParams(**sampling)
        if device is not None and (not device.startswith("cuda") or torch.cuda.is_available()):
            options["device"] = device
        self.engine = Engine.from_pretrained(config=EngineConfig.build(model=pretrained, **options))
        self._rendered: dict[str, list[Message]] = {}
        """Conversations by their text: in the text alone, what a user wrote can't be told from the template's own."""
        self._ignored: set[str] = set()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See `LM`: the answers, each ending before the first of its `until` strings."""
        answers = []
        for request in tqdm(requests, desc="generate_until", disable=disable_tqdm):
            context, settings = request.args
            done = self.engine.generate(self._encode(context), self._params(settings))
            self.cache_hook.add_partial("generate_until", request.args, done.text)
            answers.append(done.text)
        return answers

    def loglikelihood(self, requests: list[Instance]) -> NoReturn:
        """Refused with `UsageError`."""
        raise self._no_likelihood(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> NoReturn:
        """Refused with `UsageError`."""
        raise self._no_likelihood(requests)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation. Raises `UsageError` for one that the answer should continue in mid-turn."""
        if not add_generation_prompt:
            raise UsageError("this task begins the assistant's answer itself (gen_prefix), which isn't supported")
        messages = [Message(role=turn["role"], content=turn["content"]) for turn in chat_history]
        text = self._tokenizer.chat_template.render(messages)
        self._rendered[text] = messages
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Where the template in use is from; lm-eval keeps it beside its results."""
        return self._tokenizer.chat_template.source if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Tells lm-eval's caches of requests apart."""
        return f"{NAME}-{fingerprint(self.engine.directory)}"

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.engine.tokenizer is None:
            raise TokenizerError(f"{self.engine.directory}: has no tokenizer.json, and lm-eval's tasks are text")
        return self.engine.tokenizer

    def _encode(self, context: str) -> list[int]:
        """The ids of a context: of a conversation if `apply_chat_template` made it, else of the text as it stands."""
        messages = self._rendered.get(context)
        return self._tokenizer.encode_text(context) if messages is None else self._tokenizer.encode_chat(messages)

    def _params(self, settings: Mapping[str, Any]) -> SamplingParams:
        """The model's sampling parameters, changed as a task wants."""
        given = {name: value for name, value in settings.items() if value is not None}
        changes: dict[str, Any] = {}
        lengths = [given.pop(name) for name in LENGTHS if name in given]
        if lengths:
            changes["max_new_tokens"] = lengths[0]
        until = given.pop("until", ())
        changes["stop"] = (*self.params.stop, *(text for text in _listed(until) if text))
        sampled = given.pop("do_sample", None)
        for name in ("temperature", "top_k", "top_p"):
            if name in given:
                changes[name] = given.pop(name)
        if sampled is False:
            changes["temperature"] = 0.0
        elif sampled and "temperature" not in changes and self.params.temperature == 0:
            changes["temperature"] = 1.0  # what sampling means to those who name no temperature
        for name in given.keys() - self._ignored:
            self._ignored.add(name)
            logger.warning("the task's setting %s=%r has no counterpart here and is ignored", name, given[name])
        return SamplingParams(**self.params.model_dump() | changes)

    def _no_likelihood(self, requests: Sequence[Instance]) -> UsageError:
        task = requests[0].task_name if requests else None
        return UsageError(
            f"task {task!r} asks for the likelihood of given texts, which a block-diffusion model doesn't have; choose "
            "a variant of the task that generates its answer (output_type generate_until)"
        )


def _listed(until: str | Sequence[str]) -> Sequence[str]:
    return (until,) if isinstance(until, str) else until


def main() -> None:
    """lm-eval's command line, with this model registered; our own errors are one line and an exit code."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except OffloadError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
