"""`dmoe plan`: the memory plan of a model, from its config alone if need be."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from offload_engine.cli.terminal import Output
from offload_engine.config import EngineConfig
from offload_engine.engine.assembly import BUILT_IN, compute_dtype, setup_for
from offload_engine.engine.placement import shared_tokens
from offload_engine.errors import DeviceError
from offload_engine.experts.storage.opening import open_store
from offload_engine.memory import DeviceKind, MemoryPlan, auto_budget, available_memory, plan_memory
from offload_engine.model.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from offload_engine.model.config import ModelConfig
from offload_engine.model.hub import resolve_model
from offload_engine.model.quantized import ExpertFormat

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Described:
    """A model as far as a plan needs to know it."""

    name: str
    config: ModelConfig
    stored: ExpertFormat
    slab_bytes: int | None
    """Bytes of an expert's slot; None where only a config.json is known."""


def show_plan(config: EngineConfig, *, as_json: bool) -> None:
    """Print the plan for `config`. Raises `ModelError`s, `DeviceError`, `MemoryBudgetError`."""
    model = describe(config.model)
    device = device_kind(config.device)
    dtype = plan_dtype(config, model, device)
    plan = make_plan(config, model, device, dtype)
    stored, computed = str(model.stored), str(dtype).removeprefix("torch.")
    output = Output()
    if as_json:
        facts = {"model": model.name, "dtype": computed, "stored_dtype": stored, "plan": plan.as_dict()}
        output.line(json.dumps(facts))
        return
    slots = "" if model.slab_bytes is not None else ", without weights: slot sizes are estimated"
    output.line(f"{model.name} on {device}, {computed}, experts stored as {stored}{slots}\n\n{plan.table()}")


def describe(model: str | None) -> Described:
    """Find a model, which may be a config.json or a directory with nothing else. Raises `ModelError`s."""
    path = BUILT_IN if model is None else Path(model).expanduser()
    if path.is_file():
        directory, config_file = None, path
    else:
        directory = BUILT_IN if model is None else resolve_model(model, files=("config.json",))
        config_file = directory / "config.json"
    config = ModelConfig.from_file(config_file)
    name = "built-in" if model is None else model
    if directory is None or not any((directory / file).exists() for file in (SINGLE_FILE, INDEX_FILE)):
        return Described(name, config, ExpertFormat(_declared_dtype(config_file)), None)
    with closing(open_store(config, Checkpoint.open(directory))) as store:
        return Described(name, config, store.format, store.slab_bytes)


def _declared_dtype(config_file: Path) -> torch.dtype:
    """The dtype a config.json says its weights have; bfloat16, the published one, where it doesn't."""
    raw = json.loads(config_file.read_text(encoding="utf-8"))
    declared = raw.get("dtype") or raw.get("torch_dtype")
    return _DTYPES.get(declared, torch.bfloat16) if isinstance(declared, str) else torch.bfloat16


def device_kind(device: str) -> DeviceKind:
    """What to plan for; auto is a GPU if this machine has one."""
    if device == "auto":
        return "cuda" if _free_vram(0) is not None else "cpu"
    return "cuda" if device.startswith("cuda") else "cpu"


def plan_dtype(config: EngineConfig, model: Described, device: DeviceKind) -> torch.dtype:
    """What would be computed in."""
    if device == "cuda" and config.dtype == "auto":
        return model.stored.dtype
    return compute_dtype(config, model.config, model.stored.dtype)


def make_plan(config: EngineConfig, model: Described, device: DeviceKind, dtype: torch.dtype) -> MemoryPlan:
    """Divide the budget asked for. Sizes given in numbers may be those of any machine; auto means this one's."""
    here = setup_for(config, model.config, dtype=dtype, stored=model.stored, slab_bytes=model.slab_bytes)
    cuda = device == "cuda"
    there = replace(
        here,
        device=device,
        step_graphs=cuda and config.cuda_graphs != "off",
        shared_tokens=shared_tokens(config, on_gpu=cuda),
        runtime_bytes=None,  # estimated, as this process runs no model
    )
    return plan_memory(
        model.config,
        there,
        _budget(config, device),
        max_context=config.max_context,
        expert_mem=config.expert_mem,
        host_mem=_host_budget(config) if cuda else None,
    )


def _budget(config: EngineConfig, device: DeviceKind) -> int:
    if config.gpu_mem != "auto":
        return config.gpu_mem
    if device == "cpu":
        return auto_budget(available_memory(), "cpu")
    free = _free_vram(int(config.device.partition(":")[2] or 0))
    if free is None:
        raise DeviceError(
            f"gpu_mem is auto and device is {config.device!r}, but this machine shows no such GPU to take the size "
            "from; set gpu_mem to the size you plan for, such as 8GB"
        )
    return auto_budget(free, "cuda")


def _host_budget(config: EngineConfig) -> int | None:
    return auto_budget(available_memory(), "host") if config.host_mem == "auto" else config.host_mem


def _free_vram(index: int) -> int | None:
    """Bytes free on this machine's GPU `index`, by the driver; None where there is none or it is hidden."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(index)).free)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
