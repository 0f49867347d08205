"""`dmoe doctor`: what of this machine helps or hinders a run, and the way out of what hinders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from offload_engine import kernels
from offload_engine.bench.machine import processor
from offload_engine.cli.plan import Described, describe, device_kind, make_plan, plan_dtype
from offload_engine.cli.terminal import Output, note
from offload_engine.config import EngineConfig
from offload_engine.doctor import device_kernels, disk, graphics, memory
from offload_engine.doctor.finding import EXIT_CODES, Finding, refused, table, worst
from offload_engine.doctor.plan import check_plan
from offload_engine.doctor.processor import check_kernels, check_processor, check_threads, read_threads
from offload_engine.doctor.profile import measure_profile, write_profile
from offload_engine.engine.assembly import BUILT_IN, compute_threads
from offload_engine.errors import OffloadError
from offload_engine.memory import MemoryPlan, available_memory
from offload_engine.memory.machine import memory_caps
from offload_engine.model.hub import resolve_model


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked beside the checks."""

    measure: bool
    out: Path
    """Where the measured profile goes."""
    as_json: bool


def examine(config: EngineConfig, request: Request) -> int:
    """Check, print, and if asked measure the machine's profile; returns the exit code.

    A check that fails is a finding; a measurement that fails raises `OffloadError`s.
    """
    findings = list(diagnose(config))
    profile = None
    if request.measure:
        note("measuring disk, memory and products; this takes some seconds")
        if config.model is None:
            note("the built-in model's experts are small: --model of a larger one shows what the disk can do")
        profile = measure_profile(config)
        write_profile(request.out, profile)
    output, level = Output(), worst(findings)
    if request.as_json:
        facts = {"level": level.word, "checks": [finding.as_dict() for finding in findings]}
        output.line(json.dumps(facts | ({"profile": profile.model_dump(exclude_none=True)} if profile else {})))
    else:
        output.line(table(findings))
        if profile is not None:
            output.line(f"\n{profile.toml()}\nwritten to {request.out}")
    return EXIT_CODES[level]


def diagnose(config: EngineConfig) -> Iterator[Finding]:
    """Every check, in the order of the table."""
    cards = graphics.read_graphics()
    model, plan, outcome = _planned(config, cards)
    yield from _device(config, cards)
    yield check_processor(*processor())
    yield _kernels()
    yield check_threads(read_threads(_threads(config, model)))
    yield from _memory(plan, cards)
    yield outcome
    yield from _disk(config, model)


def _planned(config: EngineConfig, cards: graphics.Graphics) -> tuple[Described | None, MemoryPlan | None, Finding]:
    """The model and its plan, as far as they can be had, and what to say of them."""
    model = None
    try:
        model = describe(config.model)
        device = device_kind(config.device)
        plan = make_plan(config, model, device, plan_dtype(config, model, device))
    except OffloadError as error:
        return model, None, refused("model" if model is None else "plan", error)
    available = available_memory()
    reachable: int | None = available + psutil.Process().memory_info().rss
    if device == "cuda":
        index = int(config.device.partition(":")[2] or 0)
        reachable = cards.cards[index].free if index < len(cards.cards) else None
    return model, plan, check_plan(plan, reachable, available)


def _device(config: EngineConfig, cards: graphics.Graphics) -> Iterator[Finding]:
    wanted = config.device.startswith("cuda")
    yield graphics.check_driver(cards, wanted)
    for index, card in enumerate(cards.cards):
        yield from graphics.check_card(index, card)
    yield graphics.check_torch(torch.__version__, torch.version.cuda, cards)
    if cards.cards:
        yield from _device_kernels(int(config.device.partition(":")[2] or 0))
    if wanted:
        yield graphics.check_device(config.device, torch.cuda.device_count() if torch.cuda.is_available() else 0)


def _device_kernels(index: int) -> Iterator[Finding]:
    try:
        yield device_kernels.check_cuda_kernels(*device_kernels.read_cuda_kernels(index), shutil.which("nvcc"))
        yield device_kernels.check_triton(device_kernels.read_triton(index))
    except OffloadError as error:
        yield refused("GPU kernels", error)


def _kernels() -> Finding:
    try:
        status = kernels.status()
    except OffloadError as error:
        return refused("CPU kernels", error)
    return check_kernels(status.variant, status.reason)


def _threads(config: EngineConfig, model: Described | None) -> int:
    """As many as a run would compute with."""
    chosen = config.threads if model is None else compute_threads(config, model.config)
    return chosen or torch.get_num_threads()


def _memory(plan: MemoryPlan | None, cards: graphics.Graphics) -> Iterator[Finding]:
    ram, limits = psutil.virtual_memory(), memory.read_ulimits()
    locked = limits.pop("l", None)
    pinned = None if not cards.cards else plan.host_total if plan is not None else 0
    version = memory.read_setting(Path("/proc/version")) or ""
    yield memory.check_ram(ram.total, ram.available)
    yield memory.check_caps(memory_caps(), memory.read_throttles())
    yield memory.check_address_space(limits, ram.total)
    yield memory.check_locked(locked, pinned, "microsoft" in version.lower())
    yield memory.check_huge_pages(memory.read_setting(Path("/sys/kernel/mm/transparent_hugepage/enabled")))


def _disk(config: EngineConfig, model: Described | None) -> Iterator[Finding]:
    if model is None:
        return
    experts = len(model.config.moe_layers) * model.config.num_experts
    try:
        directory = _directory(config)
        converted = None if model.slab_bytes is None else experts * model.slab_bytes
        yield disk.check_space(Path.cwd(), disk.free_space(Path.cwd()), converted)
        with disk.sample_file(directory) as file:
            speed = disk.read_speed(file)
    except OSError as error:
        yield refused(
            "disk speed", OffloadError(f"a test file can't be written or read ({error.strerror}); free space")
        )
    except OffloadError as error:
        yield refused("disk speed", error)
    else:
        yield disk.check_direct(speed.direct, speed.file)
        yield disk.check_speed(speed)


def _directory(config: EngineConfig) -> Path:
    """Where the model's files are."""
    if config.model is None:
        return BUILT_IN
    path = Path(config.model).expanduser()
    return path.parent if path.is_file() else resolve_model(config.model, files=("config.json",))
