"""A contender's process: `python -m offload_engine.bench.contender TASK.json REPORT.json PARENT`.

It does what the task says and writes the report, an error included, in one piece. It doesn't outlive PARENT, the id of
the process that started it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from offload_engine.bench.bandwidth import measure_bandwidth
from offload_engine.bench.fresh import touch_memory
from offload_engine.bench.overlap import LayerRun, missed_bytes
from offload_engine.bench.probe import (
    Probe,
    StallStats,
    expert_bytes,
    network,
    open_engine,
    probing,
    replace_experts,
    settle,
)
from offload_engine.bench.spec import COMPONENTS, ENGINES, TORCH, Measured, Report, Task, Workload, write_document
from offload_engine.bench.yardstick import digest, disk_bytes, out_of_patience, prompt_ids
from offload_engine.config import EngineConfig
from offload_engine.core import ExpertKey
from offload_engine.engine.assembly import find_source
from offload_engine.engine.engine import Engine
from offload_engine.errors import OffloadError, TokenizerError
from offload_engine.kernels.library import CHOICE as KERNEL_CHOICE
from offload_engine.memory.footprint import estimated_slab_bytes
from offload_engine.metrics import EngineStats, measure_peak, reset_peak
from offload_engine.model.checkpoint import Checkpoint
from offload_engine.model.moe import ExpertExecutor, ResidentExperts
from offload_engine.simulate.belady import belady_misses

PR_SET_PDEATHSIG = 1
"""Of `prctl`, linux/prctl.h."""
TOKEN_SLOTS = 8
"""Slots of an engine whose experts another takes over: as good as none, and given back before anything is measured."""


def main(task_file: Path, report_file: Path) -> None:
    """Carry out the task."""
    task = Task.model_validate_json(task_file.read_bytes())
    fresh = touch_memory(task.touched)
    reset_peak()
    began = time.perf_counter()
    if task.kind in TORCH:
        os.environ[KERNEL_CHOICE] = "off"  # of this process, which runs nothing else
    try:
        report = carry_out(task, began)
    except (OffloadError, ImportError) as error:
        report = Report(error=str(error).splitlines()[0])
    if report.bandwidth is not None:
        report = Report(bandwidth=report.bandwidth.model_copy(update={"fresh": fresh}))
    write_document(report_file, report)


def carry_out(task: Task, began: float) -> Report:
    """What the task measures; `began` is when its process had imported everything. Raises `OffloadError`s."""
    config = EngineConfig(**task.config)
    if task.kind == "bandwidth":
        return Report(bandwidth=measure_bandwidth(config))
    if task.kind == "mlx":
        from offload_engine.bench.mlx_decoder import measure_mlx

        return Report(measured=measure_mlx(find_source(config), task, began))
    with open_engine(decoding_config(config, task)) as engine:
        gc.freeze()  # as dmoe-run does
        offloaded = task.kind in ENGINES
        if not offloaded:
            reset_peak()
            replace_experts(engine, _other_experts(task, engine))
        if task.kind == "unlimited":
            with probing(engine, offloaded=True) as probe:
                startup = _answer(engine, task, probe).first_forward - began
                probe.first_forward = None
        with probing(engine, offloaded=offloaded) as probe:
            seen = _answer(engine, task, probe)
            if task.kind != "unlimited":
                startup = seen.first_forward - began
        return Report(measured=_measured(engine, task, probe, seen, startup))


def decoding_config(config: EngineConfig, task: Task) -> EngineConfig:
    """The engine's config with an eos that never comes: the mask, which is no answer, so that all blocks are decoded.

    An engine whose experts another takes over gets hardly any slots.
    """
    source = find_source(config)
    if source.mask_token_id is None:
        raise TokenizerError(f"{source.directory}: nothing says which token is the mask; pass mask_token_id")
    changes: dict[str, object] = {"eos_token_id": source.mask_token_id}
    if task.kind not in ENGINES:
        changes |= {"gpu_mem": "auto", "expert_mem": TOKEN_SLOTS * estimated_slab_bytes(source.config, 4)}
    return EngineConfig(**config.model_dump(exclude_unset=True) | changes)


def _other_experts(task: Task, engine: Engine) -> ExpertExecutor:
    checkpoint = Checkpoint.open(engine.directory)
    if task.kind == "accelerate":
        from offload_engine.bench.accelerated import AccelerateExperts

        return AccelerateExperts(engine.model_config, checkpoint, engine.dtype)
    from offload_engine.bench.mapped import mapped_weights

    return ResidentExperts(mapped_weights(engine.model_config, checkpoint, random=task.kind.endswith("-random")))


@dataclass(slots=True)
class _Seen:
    """What one answer showed of its measured blocks."""

    step_seconds: list[float] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*COMPONENTS, "stall"), 0.0))
    began: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    disk_began: int | None = None
    disk_ended: int | None = None
    before: EngineStats | None = None
    """Counters at the end of the warm-up."""
    stats: EngineStats | None = None
    """What was counted since."""
    runs_before: int = 0
    """Layers run by the end of the warm-up."""
    first_forward: float = 0.0
    answer: str = ""
    cut_short: bool = False


def _answer(engine: Engine, task: Task, probe: Probe) -> _Seen:
    """Decode the workload's answer once; everything after the warm-up blocks is seen."""
    workload, seen, blocks = task.workload, _Seen(), 0
    deadline = time.perf_counter() + task.patience
    events = engine.stream(
        prompt_ids(engine.mask_token_id, engine.model_config.vocab_size, workload),
        workload.sampling(),
        cancelled=lambda: time.perf_counter() > deadline,
    )
    while True:
        parts, stalled, clock = dict(probe.seconds), engine.stats.stall_seconds, time.perf_counter()
        event = next(events)
        took = time.perf_counter() - clock
        if event.kind == "step" and seen.before is not None:
            seen.step_seconds.append(took)
            for name in COMPONENTS:
                seen.seconds[name] += probe.seconds[name] - parts.get(name, 0.0)
            seen.seconds["stall"] += engine.stats.stall_seconds - stalled
            seen.tokens += len(event.accepted)
        blocks += event.kind == "block"
        if event.completion is not None:
            break
        if event.kind == "block" and blocks == workload.warm_up:
            _begin_window(engine, probe, seen)
    seen.ended, seen.disk_ended = time.perf_counter(), disk_bytes()
    if seen.before is None or not seen.step_seconds:
        raise out_of_patience(task)
    seen.stats = engine.stats.since(seen.before)
    seen.cut_short = event.completion.finish_reason == "cancelled"
    seen.answer = digest(event.completion.token_ids)
    seen.first_forward = probe.first_forward or seen.began
    return seen


def _begin_window(engine: Engine, probe: Probe, seen: _Seen) -> None:
    seen.before, seen.runs_before = engine.stats.snapshot(), len(probe.runs)
    seen.began, seen.disk_began = time.perf_counter(), disk_bytes()


def _measured(engine: Engine, task: Task, probe: Probe, seen: _Seen, startup: float) -> Measured:
    settle(engine)
    runs, stats = probe.layer_runs(), seen.stats
    window = runs[seen.runs_before :]
    assert stats is not None
    per_layer = stats.unique_experts
    weights, flops = step_work(engine, task.workload, per_layer or 0.0)
    measured = Measured(
        step_seconds=seen.step_seconds,
        seconds=dict(seen.seconds),
        window_seconds=seen.ended - seen.began,
        tokens=seen.tokens,
        requests=sum(len(run.experts) for run in window),
        unique_experts=per_layer,
        expert_bytes=expert_bytes(engine),
        disk_bytes=None if seen.disk_began is None or seen.disk_ended is None else seen.disk_ended - seen.disk_began,
        peak_bytes=measure_peak(),
        answer=seen.answer,
        startup_seconds=startup,
        step_bytes=weights,
        step_flops=flops,
        cut_short=seen.cut_short,
    )
    if task.kind not in ENGINES:
        return measured
    assert isinstance(engine.stats, StallStats)
    before, slots = seen.runs_before, engine.plan.slots
    missed = missed_bytes(runs, probe.transfers, engine.stats.stalls, since=seen.began)
    return measured.model_copy(
        update={
            "loads": stats.loads,
            "bytes_moved": stats.bytes_moved,
            "belady_misses": None if task.kind == "unlimited" else window_misses(runs, before, slots),
            "missed_bytes": missed.nbytes,
            "early_bytes": missed.early,
            "hidden_bytes": missed.hidden,
            "slots": slots,
            "planned_bytes": engine.plan.total,
            "resident_weights": engine.plan.weights,
            "stats": stats.as_dict(),
        }
    )


def window_misses(runs: list[LayerRun], first: int, slots: int) -> int:
    """Belady's misses in `runs[first:]`, with what came before them as it was."""
    requests = [[ExpertKey(run.layer, expert) for expert in run.experts] for run in runs]
    return sum(belady_misses(requests, slots)[first:])


def step_work(engine: Engine, workload: Workload, unique: float) -> tuple[float, float]:
    """Bytes of weights read and floating-point operations done by one denoising step, on average over a block.

    `unique`: distinct experts per MoE layer. A product of [T, in] with [in, out] takes 2 T in out operations; the LM
    head is applied to the positions still masked, on average (steps + 1) / (2 steps) of a block's.
    """
    config, model = engine.model_config, network(engine)
    head, embedding = model.lm_head.weight, model.model.word_embeddings.weight
    body = [weight for weight in model.parameters() if weight is not head and weight is not embedding]
    layers, tokens, steps = len(config.moe_layers), workload.block_length, min(workload.steps, workload.block_length)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    nbytes = sum(weight.nbytes for weight in body) + head.nbytes + layers * unique * expert_bytes(engine)
    products = sum(weight.numel() for weight in body) + layers * config.num_experts_per_tok * expert
    masked = tokens * (steps + 1) / (2 * steps)
    return float(nbytes), 2.0 * (tokens * products + masked * head.numel())


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent, the process `parent`, ends in whatever way; on Linux alone."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        sys.exit(f"the benchmark, process {parent}, is gone")


if __name__ == "__main__":
    die_with(int(sys.argv[3]))
    main(Path(sys.argv[1]), Path(sys.argv[2]))
