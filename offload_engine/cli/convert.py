"""`dmoe convert`: a checkpoint's experts into a packed store, and what that changes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_engine.cli.loading import loading_progress
from offload_engine.cli.terminal import Output, note
from offload_engine.config import EngineConfig, format_bytes
from offload_engine.core import SamplingParams
from offload_engine.engine.assembly import BUILT_IN
from offload_engine.engine.engine import Engine
from offload_engine.errors import UsageError
from offload_engine.evaluate.compare import compare, comparison_table
from offload_engine.evaluate.fingerprint import fingerprint
from offload_engine.evaluate.records import Memory, SavedRun
from offload_engine.evaluate.runner import about, evaluate, run_folder_settings
from offload_engine.evaluate.tasks import ARITHMETIC, Task, make_task
from offload_engine.experts.storage.conversion import DEFAULT_GROUP, Conversion, Kind, convert
from offload_engine.experts.storage.rounding import KindError
from offload_engine.model.hub import resolve_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be converted to what, and how the outcome is wanted."""

    model: str | None
    """None: the built-in one."""
    out: Path
    experts: Kind
    group_size: int | None
    evaluate: int | None = None
    """Problems of tiny-arithmetic that both are asked; None: none."""
    as_json: bool = False


def convert_model(request: Request) -> None:
    """Convert, and print what came of it. Raises `OffloadError`s."""
    output = Output()
    if request.group_size is not None and request.experts != "int4":
        raise UsageError(
            f"--group-size has no effect on {request.experts} experts; leave it out, or use --experts int4"
        )
    with loading_progress() as progress:
        source = BUILT_IN if request.model is None else resolve_model(request.model, progress=progress)
    if request.evaluate is not None and not (source / "tokenizer.json").exists():
        raise UsageError(f"{source}: has no tokenizer.json, and --evaluate asks questions in text; leave it out")
    task = None if request.evaluate is None else make_task(ARITHMETIC, n=request.evaluate)
    group = DEFAULT_GROUP if request.group_size is None else request.group_size
    with loading_progress("converting", "wrote") as progress:
        done = convert(
            source, request.out, request.experts, group=group, identity=fingerprint(source), progress=progress
        )
    if done.format.group and done.format.group != group:
        note(f"note: groups of {done.format.group}, as {group} is no power of two that divides every matrix's columns")
    if not request.as_json:
        output.line(_table(done))
    comparison = None if task is None else _compared(request.model, done.directory, task)
    if request.as_json:
        output.line(json.dumps(_facts(done) | ({} if comparison is None else {"comparison": comparison})))
    elif comparison is not None:
        output.line(f"\n{comparison_table(comparison)}")


def _compared(model: str | None, converted: Path, task: Task) -> dict[str, Any]:
    """Ask both checkpoints the same, and hold the converted one's answers against the other's."""
    params, runs = SamplingParams(), []
    for name in (model, str(converted)):
        said = name or "built-in"
        with loading_progress() as progress:
            engine = Engine.from_pretrained(
                config=EngineConfig(model=name, hot_set="off", tuned="off"), progress=progress
            )
        with engine:
            recorder = Memory()
            for _record in evaluate(engine, task, params, recorder):
                pass
            settings = run_folder_settings(engine, task, params)
            runs.append(SavedRun(Path(said), settings, about(engine), recorder.records()))
        note(f"{said}: {len(task.samples)} problems answered")
    return compare(*runs)


def _facts(done: Conversion) -> dict[str, Any]:
    errors = {
        kind: {
            "relative_rms": error.relative,
            "worst_relative_rms": error.worst,
            "worst_expert": None if error.worst_key is None else list(error.worst_key),
            "largest": error.largest,
        }
        for kind, error in done.errors.kinds.items()
    }
    return {
        "out": str(done.directory),
        "experts_before": str(done.original),
        "experts": str(done.format),
        "slab_bytes_before": done.original_slab,
        "slab_bytes": done.slab,
        "expert_bytes": done.expert_bytes,
        "other_bytes": done.resident_bytes,
        "lossless": done.errors.exact,
        "errors": errors,
    }


def _table(done: Conversion) -> str:
    slots = f"{format_bytes(done.original_slab)} -> {format_bytes(done.slab)} per slot"
    rows = [
        ("converted", str(done.directory)),
        ("experts", f"{done.original} -> {done.format}, {slots}, {format_bytes(done.expert_bytes)} in all"),
        ("other weights", f"{format_bytes(done.resident_bytes)}, as they were"),
    ]
    if done.errors.exact:
        rows.append(("error", "none: every weight is what it was"))
    else:
        rows += [(f"error of {kind}", _error(error)) for kind, error in done.errors.kinds.items()]
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{wide}}  {value}" for name, value in rows)


def _error(error: KindError) -> str:
    text = f"{100 * error.relative:.3f} % of the weights' RMS, {error.largest:.3g} at most"
    if error.worst_key is None:
        return text
    key = error.worst_key
    return f"{text}; worst {100 * error.worst:.3f} % (expert {key.expert} of layer {key.layer})"
