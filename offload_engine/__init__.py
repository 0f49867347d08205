"""offload_engine: memory-constrained inference for Mixture-of-Experts diffusion language models.

The public names are imported when first used, so that what doesn't run a model doesn't wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from offload_engine.config import EngineConfig
    from offload_engine.core import (
        Completion,
        ExpertKey,
        ForwardInfo,
        Phase,
        RoutingDecision,
        SamplingParams,
        StepEvent,
    )
    from offload_engine.decode.scoring import LayerRouting
    from offload_engine.engine.asynchronous import AsyncEngine
    from offload_engine.engine.batching import Batcher, Ticket
    from offload_engine.engine.engine import Engine
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
    from offload_engine.experts.scheduling.cache import Occupancy
    from offload_engine.experts.scheduling.eviction import EvictionPolicy
    from offload_engine.experts.scheduling.outlook import Outlook
    from offload_engine.experts.scheduling.predictor import ExpertPredictor
    from offload_engine.memory import MemoryPlan
    from offload_engine.metrics import EngineStats
    from offload_engine.routing.base import RouterShape, RoutingPolicy
    from offload_engine.text import Message

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "Batcher",
    "CheckpointError",
    "Completion",
    "ConfigError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineStats",
    "EvictionPolicy",
    "ExpertKey",
    "ExpertPredictor",
    "ForwardInfo",
    "HubError",
    "InternalError",
    "LayerRouting",
    "MemoryBudgetError",
    "MemoryPlan",
    "Message",
    "ModelError",
    "Occupancy",
    "OffloadError",
    "Outlook",
    "Phase",
    "PromptError",
    "QueueFullError",
    "RouterShape",
    "RoutingDecision",
    "RoutingPolicy",
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
    "AsyncEngine": "engine.asynchronous",
    "Batcher": "engine.batching",
    "Completion": "core",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "EngineStats": "metrics",
    "EvictionPolicy": "experts.scheduling.eviction",
    "ExpertKey": "core",
    "ExpertPredictor": "experts.scheduling.predictor",
    "ForwardInfo": "core",
    "LayerRouting": "decode.scoring",
    "MemoryPlan": "memory",
    "Message": "text",
    "Occupancy": "experts.scheduling.cache",
    "Outlook": "experts.scheduling.outlook",
    "Phase": "core",
    "RouterShape": "routing.base",
    "RoutingDecision": "core",
    "RoutingPolicy": "routing.base",
    "SamplingParams": "core",
    "StepEvent": "core",
    "Ticket": "engine.batching",
}
"""Where the public names live; errors are in `errors`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"offload_engine.{_HOMES.get(name, 'errors')}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
