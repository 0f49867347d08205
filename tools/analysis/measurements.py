"""The measurements of a study, each kept in a file with the settings it was made with."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import random
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from offload_engine.cli.progress import PIECES, Progress
from offload_engine.core import SamplingParams
from offload_engine.engine.engine import Engine
from offload_engine.evaluate.records import write_json
from offload_engine.evaluate.summary import middle_layer
from offload_engine.text import Message
from tools.analysis import masking, moe_latency, seam
from tools.analysis.components import answer_all
from tools.analysis.runs import of_block_length
from tools.analysis.speed import compare_speed
from tools.analysis.study import BLOCK, Role, Study
from tools.analysis.turns import take_turns

Result = dict[str, Any]
ROLES: tuple[Role, ...] = ("base", "distilled")
CACHES = ("whole", "tight")
"""An expert cache as large as memory allows, and one that holds the study's `tight_share`."""


def path_of(study: Study, name: str) -> Path:
    """Where the measurement called `name` is kept."""
    return study.out / "measure" / f"{name}.json"


def settings_of(study: Study, name: str) -> dict[str, Any]:
    """What the measurement's numbers depend on; a change makes it be done again."""
    facts = {"fingerprints": study.fingerprints, "longest": study.longest, "tight_share": study.tight_share}
    engine = study.config("base").model_dump(exclude={"model"})
    measured = {}
    if name != "model":
        prompts = study.prompts(max(study.effort.prompts, study.effort.mask_problems))  # what --n and --data leave
        digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
        measured = {"effort": asdict(study.effort), "task": study.tasks[0], "prompts": digest}
    whole: dict[str, Any] = json.loads(json.dumps({"version": 3, **facts, "engine": engine, **measured}))
    return whole


def load(study: Study, name: str) -> Result | None:
    """The kept measurement: its `result`, `machine` and `date`; None if there is none of these settings."""
    try:
        saved = json.loads(path_of(study, name).read_bytes())
    except (OSError, ValueError):
        return None
    whole = isinstance(saved, dict) and {"settings", "result", "machine", "date"} <= saved.keys()
    return saved if whole and saved["settings"] == settings_of(study, name) else None


def ensure(study: Study, name: str) -> Result:
    """The measurement called `name`, made now unless it is there."""
    saved = load(study, name)
    if saved is not None:
        return saved
    print(f"measuring {name}", file=sys.stderr, flush=True)
    made = {
        "settings": settings_of(study, name),
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "result": MEASUREMENTS[name](study),
    }
    path_of(study, name).parent.mkdir(parents=True, exist_ok=True)
    write_json(path_of(study, name), made)
    return made


def model_facts(study: Study) -> dict[Role, dict[str, Any]]:
    """What is known of the two models without running them: sizes, layers, and the plan of their memory."""
    found: dict[Role, dict[str, Any]] = ensure(study, "model")["result"]
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    try:
        cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        cpu = None
    return {
        "cpu": cpu[1].strip() if cpu else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _model(study: Study) -> Result:
    """Opens every model alone as the measurements will, with both cache sizes: one that doesn't fit is refused before
    hours of evaluations.
    """
    facts: Result = {}
    for role in study.roles:
        with study.open(role) as engine:
            facts[role] = _facts(study, role, engine)
        with study.open(role, expert_mem=facts[role]["tight_bytes"]):
            pass
    return {role: facts[study.played_by(role)] for role in ROLES}


def _facts(study: Study, role: Role, engine: Engine) -> Result:
    config, plan = engine.model_config, engine.plan
    return {
        "name": engine.config.model or "built-in",
        "fingerprint": study.fingerprints[role],
        "parameters": seam.parameters(engine),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "threads": seam.threads(engine),
        "moe_layers": list(config.moe_layers),
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "expert_bytes": seam.expert_bytes(engine),
        "slots": plan.slots,
        "all_experts": plan.all_experts,
        "tight_bytes": max(2, round(study.tight_share * plan.all_experts)) * plan.slab_bytes,
        "distilled_top_p": config.distilled_top_p,
        "core_min_experts": config.core_min_experts,
    }


def _components(study: Study) -> Result:
    """Fig. 2a and b: seconds per denoising forward by component, over block lengths, routings and cache sizes."""
    prompts = study.prompts(study.effort.prompts)
    runs = {run.name: run for length in study.effort.block_lengths for run in of_block_length(length)}
    found = []

    def measure(engine: Engine, name: str) -> dict[str, float]:
        run = runs[name]
        with seam.routed(engine, **run.routing):
            engine.generate(prompts[0], study.sampling(run.block_length))  # another routing filled the expert cache
            return _per_forward(engine, prompts, study.sampling(run.block_length))

    for cache in CACHES:
        options = {role: _cache(study, role, cache) for role in ROLES}
        what = f"components, {cache} cache"
        taken = take_turns(study, what, options, list(runs), lambda name: runs[name].role, measure)
        for name, rounds in taken.rounds.items():
            medians = {part: statistics.median(one[part] for one in rounds) for part in rounds[0]}
            run = runs[name]
            setting = {"cache": cache, "slots": taken.slots, "routing": run.label, "block_length": run.block_length}
            found.append({**setting, **medians})
    return {"bars": found}


def _per_forward(engine: Engine, prompts: list[str], params: SamplingParams) -> dict[str, float]:
    """Milliseconds per denoising forward."""
    spent = answer_all(engine, prompts, params)
    parts = {"moe": spent.moe, "attention": spent.attention, "other": spent.other, "total": spent.total}
    return {part: 1000 * seconds / spent.forwards for part, seconds in parts.items()}


def _cache(study: Study, role: Role, cache: str) -> dict[str, Any]:
    return {"expert_mem": model_facts(study)[role]["tight_bytes"]} if cache == "tight" else {}


def _moe_latency(study: Study) -> Result:
    """Fig. 2c: one MoE block under made-up routings, and all MoE blocks of real denoising forwards."""
    effort, prompts = study.effort, study.prompts(study.effort.prompts)
    found: Result = {}
    for cache in CACHES:
        with study.open("base", routing="original", **_cache(study, "base", cache)) as engine:
            config, slots = engine.model_config, engine.plan.slots
            layer = middle_layer(config.moe_layers)
            hidden = moe_latency.hidden_states(engine, layer, prompts[0], study.sampling())
            counts = moe_latency.unique_counts(
                config.num_experts, config.num_experts_per_tok, len(hidden), effort.sweep_counts
            )
            swept = moe_latency.sweep(engine, layer, hidden, counts, repeats=effort.sweep_repeats)
            answer_all(engine, prompts[:2], study.sampling())
            real = [(call.unique, call.seconds) for call in answer_all(engine, prompts, study.sampling()).calls]
        print(f"  moe-latency, {cache} cache: done", file=sys.stderr, flush=True)
        found[cache] = {
            "layer": layer,
            "slots": slots,
            "swept": [(point.unique, 1000 * point.seconds) for point in swept],
            "real": [(unique, 1000 * seconds) for unique, seconds in real],
        }
    return found


def _masking(study: Study) -> Result:
    """Fig. 3a: loss increase against router weight, an expert left out for one token or for a whole block."""
    effort, rng = study.effort, random.Random(0)
    found: Result = {"token": [], "block": []}
    with (
        study.open("base", routing="original") as engine,
        Progress("  masking, problems", effort.mask_problems, PIECES) as progress,
    ):
        assert engine.tokenizer is not None
        assert engine.mask_token_id is not None
        scale = engine.model_config.router.routed_scaling_factor
        for number, prompt in enumerate(study.prompts(effort.mask_problems)):
            ids = engine.tokenizer.encode_chat([Message(role="user", content=prompt)])
            answer = engine.generate(ids, study.sampling()).token_ids
            masked = masking.mask_block(ids, answer, engine.mask_token_id, BLOCK, rng)
            decisions = masking.losses(engine, masked, [None])[1]
            for kind, draw in (("token", masking.token_cases), ("block", masking.block_cases)):
                cases = draw(decisions, masked, effort.mask_cases, scale, rng)
                for (layer, expert, _tokens, weight), increase in masking.effects(engine, masked, cases):
                    found[kind].append((number, layer, expert, weight, increase))
            progress.show(number + 1)
    return found


def _speed(study: Study) -> Result:
    """Fig. 5b."""
    options = {cache: {role: _cache(study, role, cache) for role in ROLES} for cache in CACHES}
    return {cache: compare_speed(study, cache, own) for cache, own in options.items()}


MEASUREMENTS: dict[str, Callable[[Study], Result]] = {
    "model": _model,
    "components": _components,
    "moe-latency": _moe_latency,
    "masking": _masking,
    "speed": _speed,
}
