"""Who runs: every contender of a benchmark by name, and those that can't run here with the reason."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from offload_engine.bench.spec import Kind, Task, Workload
from offload_engine.config import EngineConfig, format_bytes
from offload_engine.errors import UsageError
from offload_engine.experts.storage.packed_header import PACKED_FILE

ROUTINGS = ("original", "dmoe")
MAPPED: tuple[Kind, ...] = ("mmap", "mmap-random", "torch", "torch-random", "accelerate", "mlx")
"""Kinds that read experts out of safetensors files."""
PEERS: dict[Kind, tuple[str, str]] = {
    "accelerate": ("accelerate", "accelerate is not installed; pip install --no-deps accelerate adds it"),
    "mlx": ("mlx_vlm", "mlx-vlm is not installed; pip install 'mlx[cpu]' mlx-vlm adds it, with all that it brings"),
}
"""Kinds that need a package of another: what is imported of it, and what to say where it isn't there."""
ROOMY = ("mlx-unlimited", "unlimited")
"""Who takes as much memory as there is. They come last: what they give back slows a virtual machine for a while."""
RESERVE = 100_000_000
"""Of the limit, what an engine's budget leaves for page cache and the kernel's own tables, in bytes, ..."""
RESERVE_SHARE = 64
"""... or this fraction of the limit if that is more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be measured."""

    config: EngineConfig
    """The engine's options, those of its rivals too as far as they mean anything to them."""
    workload: Workload
    limit: int | None = None
    """Bytes each contender may use, page cache included; None: no limit."""
    budgets: Sequence[int] = ()
    """Budgets of the engine; none: what its config says, else what the limit leaves."""
    packed: Sequence[Path] = ()
    """The same model in other weight formats."""
    only: Sequence[str] = ()
    """Patterns of the names to run; none: all."""
    rounds: int = 2
    patience: float = 900.0


@dataclass(slots=True)
class Lineup:
    """The contenders of one benchmark."""

    tasks: list[Task] = field(default_factory=list)
    """In the order in which a round runs them."""
    absent: dict[str, str] = field(default_factory=dict)
    """Name -> why it can't run here."""


def default_budget(limit: int) -> int:
    """The budget of an engine that has `limit` bytes for everything."""
    return limit - max(RESERVE, limit // RESERVE_SHARE)


def line_up(request: Request, *, packed: bool = False) -> Lineup:
    """Choose the contenders. `packed`: the model itself is a converted one, whose experts our stores alone can read.

    Raises `UsageError` when `only` leaves none, two have one name, or the limit leaves no budget.
    """
    lineup = Lineup()
    everyone = [_task(request, "bandwidth", "bandwidth", {}, limited=False)]
    for routing in _routings(request.config):
        everyone += _ours(request, routing)
        for kind in MAPPED[:-1]:
            everyone.append(_task(request, kind, f"{kind}/{routing}", {"routing": routing}))
        if routing == "original":  # mlx-vlm knows no other
            everyone += _mlx(request)
        config = {"routing": routing, "gpu_mem": "auto", "expert_mem": None}
        everyone.append(_task(request, "unlimited", f"unlimited/{routing}", config, limited=False))
    everyone.sort(key=lambda task: task.name.split("/")[0] in ROOMY)
    wanted = [task for task in everyone if not request.only or any(fnmatchcase(task.name, p) for p in request.only)]
    if not wanted:
        names = ", ".join(task.name for task in everyone)
        raise UsageError(f"--only {' '.join(request.only)}: no contender of that name; there are {names}")
    _require_names(wanted)
    for task in wanted:
        if packed and task.kind in MAPPED:
            lineup.absent[task.name] = (
                f"it can't read {PACKED_FILE}; name the model it was made of as --model, and this one with --packed"
            )
        elif task.kind in PEERS and importlib.util.find_spec(PEERS[task.kind][0]) is None:
            lineup.absent[task.name] = PEERS[task.kind][1]
        else:
            lineup.tasks.append(task)
    return lineup


def _require_names(tasks: Sequence[Task]) -> None:
    name, count = Counter(task.name for task in tasks).most_common(1)[0]
    if count > 1:
        raise UsageError(
            f"{name}: the name of {count} contenders; wanted --packed directories of different names, and --budgets "
            "that differ in their first three digits"
        )


def _routings(config: EngineConfig) -> Sequence[str]:
    return ROUTINGS if config.routing is None else (config.routing,)


def _ours(request: Request, routing: str) -> list[Task]:
    """The engine under each budget, and in each weight format under the first."""
    budgets = _budgets(request)
    tasks = []
    for place, budget in enumerate(budgets):
        size = "" if place == 0 else f"@{_size(budget).replace(' ', '')}"
        tasks.append(_task(request, "engine", f"engine/{routing}{size}", {"routing": routing, "gpu_mem": budget}))
    for directory in request.packed:
        config = {"routing": routing, "gpu_mem": budgets[0], "model": str(directory)}
        tasks.append(_task(request, "engine", f"engine/{routing}+{directory.name}", config))
    return tasks


def _mlx(request: Request) -> list[Task]:
    """mlx-vlm within the limit, and, since it wants every weight in memory, without one as well."""
    tasks = [_task(request, "mlx", "mlx/original", {"routing": "original"})]
    if request.limit is not None:
        tasks.append(_task(request, "mlx", "mlx-unlimited/original", {"routing": "original"}, limited=False))
    return tasks


def _budgets(request: Request) -> Sequence[int | str]:
    if request.budgets:
        return request.budgets
    if request.config.gpu_mem != "auto" or request.limit is None:
        return (request.config.gpu_mem,)
    budget = default_budget(request.limit)
    if budget <= 0:
        raise UsageError(f"--limit is {format_bytes(request.limit)}, which leaves no budget; wanted over 100 MB")
    return (budget,)


def _task(request: Request, kind: Kind, name: str, changes: dict[str, Any], *, limited: bool = True) -> Task:
    return Task(
        name=name,
        kind=kind,
        # every run begins alike: what earlier ones used most or found would serve some contenders and not others
        config={"hot_set": "off", "tuned": "off"} | request.config.model_dump(exclude_unset=True) | changes,
        workload=request.workload,
        limited=limited and request.limit is not None,
        patience=request.patience,
    )


def _size(budget: int | str) -> str:
    return budget if isinstance(budget, str) else format_bytes(budget)
