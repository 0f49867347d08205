"""Puts a task's questions to an engine, one after the other, and keeps what came of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import offload_engine
from offload_engine.core import Completion, Phase, SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.errors import PromptError
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.evaluate.records import Memory, Record, Recorder
from offload_engine.evaluate.sample import Sample
from offload_engine.evaluate.summary import middle_layer
from offload_engine.evaluate.tasks import Task
from offload_engine.routing import described

CANCELLED = "cancelled"


def evaluate(
    engine: Engine,
    task: Task,
    params: SamplingParams,
    recorder: Recorder | None = None,
    *,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Record]:
    """Answer, one by one, the samples that `recorder` has no record of; yields each record once it is kept.

    `cancelled` is asked after every denoising step; an answer it cuts off is not kept. With a temperature, sample
    number i is drawn with seed `params.seed` + i, so that a run taken up again goes on as it would have.

    Raises `PromptError` before the first answer where one of these samples can't be asked, naming its place.
    """
    recorder = recorder or Memory()
    for sample in task.samples:
        if sample.id not in recorder.done:
            _check(engine, sample, params)
    for index, sample in enumerate(task.samples):
        if cancelled():
            return
        if sample.id in recorder.done:
            continue
        answer = _answer(engine, sample, _params_of(params, index), cancelled)
        if answer is None:
            return
        record = {"index": index, **answer, **task.grade(answer["generation"], sample.gold, sample.labels)._asdict()}
        recorder.append(record)
        yield record


def run_folder_settings(engine: Engine, task: Task, params: SamplingParams) -> dict[str, Any]:
    """Everything that decides what a run measures: two runs with equal settings may be continued as one."""
    return {
        **task.settings,
        "model": engine.config.model or "built-in",
        "fingerprint": fingerprint(engine.directory),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "routing": described(engine.policy),
        "sampling": params.model_dump(),
        "engine": engine.config.model_dump(exclude={"model"}),
    }


def about(engine: Engine) -> dict[str, Any]:
    """Facts worth keeping beside a run's records: the memory plan, the layers, the versions."""
    return {
        "moe_layers": list(engine.model_config.moe_layers),
        "num_experts": engine.model_config.num_experts,
        "plan": engine.plan.as_dict(),
        "versions": {"offload-engine": offload_engine.__version__, "torch": str(torch.__version__)},
    }


def _check(engine: Engine, sample: Sample, params: SamplingParams) -> None:
    try:
        engine.prepare(sample.prompt, params)
    except PromptError as error:
        if sample.where is None:
            raise PromptError(f"sample {sample.id}: {error}") from None
        raise PromptError(f"{sample.where}: {error}, or remove the line") from None


def _answer(engine: Engine, sample: Sample, params: SamplingParams, cancelled: Callable[[], bool]) -> Record | None:
    """What there is to know of one answer but its grade; None if it was cut off."""
    unique = _UniqueExperts(engine)
    completion: Completion | None = None
    for event in engine.stream(sample.prompt, params, cancelled=cancelled):
        if event.kind == "step":
            unique.note()
        completion = event.completion
    assert completion is not None
    if completion.finish_reason == CANCELLED:
        return None
    stats = completion.stats
    return {
        "id": sample.id,
        "question": sample.question,
        "prompt": sample.prompt,
        "gold": sample.gold,
        "generation": completion.text,
        "tags": sample.tags,
        "finish_reason": completion.finish_reason,
        "tokens": stats.new_tokens,
        "prompt_tokens": stats.prompt_tokens,
        "blocks": stats.blocks,
        "steps": stats.denoise_steps,
        "forwards": {str(phase): stats.forwards.get(phase, 0) for phase in Phase if phase is not Phase.SCORE},
        "seconds": stats.wall_seconds,
        "prefill_seconds": stats.prefill_seconds,
        "denoise_seconds": stats.denoise_seconds,
        "commit_seconds": stats.commit_seconds,
        "stall_seconds": stats.stall_seconds,
        "unique_experts": stats.unique_experts,
        "unique_by_layer": stats.as_dict()["unique_experts_by_layer"],
        "unique_by_forward": unique.by_forward,
        "unique_mid_by_forward": unique.middle_by_forward,
        "expert_requests": stats.expert_requests,
        "hits": stats.hits,
        "late": stats.late,
        "misses": stats.misses,
        "loads": stats.loads,
        "bytes_moved": stats.bytes_moved,
        "peak_bytes": stats.measured_peak_bytes,
    }


class _UniqueExperts:
    """Distinct experts of each denoising forward: the mean over MoE layers, and the middle layer's (paper, Fig. 3b)."""

    def __init__(self, engine: Engine) -> None:
        self._stats = engine.stats
        self._layers = engine.model_config.moe_layers
        self._middle = middle_layer(self._layers)
        self._before = self._sums()
        self.by_forward: list[float] = []
        self.middle_by_forward: list[int] = []

    def note(self) -> None:
        """A denoising forward is over."""
        now = self._sums()
        counts = {layer: now[layer] - self._before[layer] for layer in self._layers}
        self._before = now
        self.by_forward.append(round(sum(counts.values()) / len(counts), 4))
        self.middle_by_forward.append(counts[self._middle])

    def _sums(self) -> dict[int, int]:
        by_layer = self._stats.unique_experts_by_layer
        return {layer: by_layer.get(layer, (0, 0))[0] for layer in self._layers}


def _params_of(params: SamplingParams, index: int) -> SamplingParams:
    if params.temperature == 0 or params.seed is None:
        return params
    return params.model_copy(update={"seed": params.seed + index})
