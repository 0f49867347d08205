"""`dmoe-run`: load a model, answer prompts, say what it took."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from offload_engine.cli.errors import INTERRUPTED
from offload_engine.cli.interrupt import interruptible
from offload_engine.cli.loading import load_engine, prefill_progress
from offload_engine.cli.prompts import Prompt
from offload_engine.cli.report import announce, announce_later, as_json, show_stats
from offload_engine.cli.terminal import Output, note
from offload_engine.cli.watch import watching
from offload_engine.config import EngineConfig
from offload_engine.core import Completion, SamplingParams, StepEvent
from offload_engine.engine.engine import Engine
from offload_engine.errors import PromptError, UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked of the engine, and how the answers are wanted."""

    prompts: list[Prompt]
    params: SamplingParams
    raw: bool = False
    token_ids: bool = False
    stats: bool = False
    as_json: bool = False
    trace: Path | None = None
    watch: bool = False


def answer_prompts(config: EngineConfig, request: Request) -> int:
    """Answer all prompts on stdout; returns the exit code. Raises `OffloadError`s."""
    if request.watch and min(config.batch_size, len(request.prompts)) > 1:
        raise UsageError(
            f"--watch shows one answer at a time, but --batch-size is {config.batch_size}; leave one of them out"
        )
    output = Output()
    with load_engine(config) as engine, interruptible() as interrupted, prefill_progress(engine):
        announced = announce(engine, whole_plan=request.stats)
        if request.trace is not None:
            engine.record_trace(request.trace, request.params.block_length)
        together = engine.plan.sequences > 1 and len(request.prompts) > 1
        (_answer_together if together else _answer_in_turn)(engine, request, interrupted, output)
        if request.stats:
            show_stats(engine.stats)
        note(engine.stats.summary_line())
        announce_later(engine, announced)
        engine.close_trace()
    return INTERRUPTED if interrupted() else 0


def _answer_in_turn(engine: Engine, request: Request, interrupted: Callable[[], bool], output: Output) -> None:
    """Write each answer as it comes."""
    streams = [_stream(engine, prompt, request, interrupted) for prompt in request.prompts]
    for place, (prompt, stream) in enumerate(zip(request.prompts, streams, strict=True), start=1):
        if len(streams) > 1:
            note(f"[{place}/{len(streams)}] {prompt.source}")
        _answer(engine, prompt, stream, request, output)
        if interrupted():
            break


def _answer_together(engine: Engine, request: Request, interrupted: Callable[[], bool], output: Output) -> None:
    """Write each answer once it and those before it are finished; several are under way at a time."""
    prompts = request.prompts
    for prompt in prompts:  # refused by the name of its source
        _stream(engine, prompt, request, interrupted)
    answers = engine.complete(
        [prompt.content for prompt in prompts], request.params, raw=request.raw, cancelled=interrupted
    )
    finished: dict[int, Completion] = {}
    written = 0
    for number, done in answers:
        finished[number] = done
        note(f"[{len(finished) + written}/{len(prompts)}] {prompts[number].source}")
        while written in finished:
            output.write(_whole(engine, prompts[written], request, finished.pop(written)))
            written += 1


def _whole(engine: Engine, prompt: Prompt, request: Request, done: Completion) -> str:
    """All that stdout gets of a finished answer."""
    event = StepEvent("block", 0, 0, tuple(done.token_ids), text=done.text, completion=done)
    return _Writing(engine, prompt, request).of(event)


def _stream(engine: Engine, prompt: Prompt, request: Request, cancelled: Callable[[], bool]) -> Iterator[StepEvent]:
    """The prompt's events, none of them computed yet. Raises `PromptError` that names the prompt's source."""
    if engine.tokenizer is None and not request.token_ids:
        raise PromptError(
            f"{prompt.source}: is text, but {engine.config.model} has no tokenizer.json; "
            "pass token ids with --token-ids"
        )
    try:
        return engine.stream(prompt.content, request.params, raw=request.raw, cancelled=cancelled)
    except PromptError as error:
        raise PromptError(f"{prompt.source}: {error}") from error


def _answer(engine: Engine, prompt: Prompt, stream: Iterator[StepEvent], request: Request, output: Output) -> None:
    """Follow one answer to its end and write it as it comes; after the live view if both are on a terminal."""
    held: list[str] = []
    writing = _Writing(engine, prompt, request)
    try:
        with watching(engine, request.params, token_ids=request.token_ids, wanted=request.watch) as viewer:
            write = held.append if viewer.live and output.terminal else output.write
            for event in stream:
                viewer.show(event)
                write(writing.of(event))
    finally:
        output.write("".join(held))
        output.end_line()  # an answer cut off by an error ends its line as well


class _Writing:
    """What stdout gets of one answer."""

    def __init__(self, engine: Engine, prompt: Prompt, request: Request) -> None:
        self._engine = engine
        self._source = prompt.source
        self._request = request
        self._given = 0

    def of(self, event: StepEvent) -> str:
        """The text that `event` adds; the answer ends with a newline."""
        done = event.completion
        if self._request.as_json:
            return f"{json.dumps(as_json(done, self._engine, self._source))}\n" if done else ""
        if self._request.token_ids:
            return self._ids(event) + ("\n" if done else "")
        return event.text + ("\n" if done and not done.text.endswith("\n") else "")

    def _ids(self, event: StepEvent) -> str:
        if event.kind == "step":
            return ""
        ids = event.block_token_ids if event.completion is None else event.completion.token_ids[self._given :]
        before, self._given = self._given, self._given + len(ids)
        return (" " if before and ids else "") + " ".join(map(str, ids))
