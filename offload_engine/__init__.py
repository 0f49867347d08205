"""offload_engine: memory-constrained inference for Mixture-of-Experts diffusion language models.

The public names are imported when first used, so that what doesn't run a model doesn't wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload_engine.batching import Batcher, Ticket
    from offload_engine.config import EngineConfig
    from offload_engine.core import Completion, SamplingParams, StepEvent
    from offload_engine.engine import Engine
    from offload_engine.errors import (
        CheckpointError,
        ConfigError,
        DeviceError,
        EngineClosedError,
        HubError,
        InternalError,
        MemoryBudgetError,
        ModelError,
        OffloadError,
        PromptError,
        QueueFullError,
        TokenizerError,
        TraceError,
        TraceWriteError,
        TransferError,
        UsageError,
    )
    from offload_engine.memory import MemoryPlan
    from offload_engine.metrics import EngineStats

    __version__: str

__all__ = [
    "Batcher",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineStats",
    "HubError",
    "InternalError",
    "MemoryBudgetError",
    "MemoryPlan",
    "ModelError",
    "OffloadError",
    "PromptError",
    "QueueFullError",
    "SamplingParams",
    "StepEvent",
    "Ticket",
    "TokenizerError",
    "TraceError",
    "TraceWriteError",
    "TransferError",
    "UsageError",
    "__version__",
]

_HOMES = {
    "Batcher": "batching",
    "Completion": "core",
    "Engine": "engine",
    "EngineConfig": "config",
    "EngineStats": "metrics",
    "MemoryPlan": "memory",
    "SamplingParams": "core",
    "StepEvent": "core",
    "Ticket": "batching",
}
"""The rooms of the public names; errors live in `errors`."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in __all__:
        value = getattr(importlib.import_module(f"offload_engine.{_HOMES.get(name, 'errors')}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    """The installed version; "unknown" where the package runs from a tree that was never installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("offload-engine")
    except PackageNotFoundError:
        return "unknown"


def __dir__() -> list[str]:
    return sorted(__all__)
