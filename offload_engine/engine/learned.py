"""What `dmoe tune` found a model to need on a device, kept for runs whose `gpu_mem` is "auto".

A budget that a run falls back to, and options that never change an answer, but for `cpu_experts`, which does by
rounding, and is named in the notice. So nothing here raises: findings that are
missing, damaged, or can't be written are a run without them.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload_engine.config import EngineConfig, format_bytes
from offload_engine.errors import ConfigError
from offload_engine.experts.hot_set import fingerprint, places
from offload_engine.files import write_aside
from offload_engine.routing import RoutingOptions

logger = logging.getLogger(__name__)

FILE: Final = ".tuned.json"
"""Its name beside a checkpoint."""
KIND: Final = "tuned"
"""Of files in the user's cache."""
KNOBS: Final = ("eviction", "predictor", "prefetch_depth", "transfers_in_flight", "cpu_experts")
"""Options that are tuned: fields of `EngineConfig`."""
_MAX_BYTES = 1 << 20

Settings = dict[str, str | float | int]


class Learned(BaseModel):
    """One finding: for one device, one way to route and one batch size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Annotated[str, Field(min_length=1)]
    """As `device_name`."""
    routing: Settings
    """As `routing_settings`."""
    batch_size: Annotated[int, Field(ge=1)]
    slots: Annotated[int, Field(ge=1)]
    """Expert slots of the smallest budget near the best speed: more make no difference worth their memory."""
    knobs: Settings
    """The best options with so many, by name."""

    def serves(self, config: EngineConfig, device: str, routing: Settings) -> bool:
        """Whether a run on that device, which routes like that, is what was tuned, and left to it."""
        asked = (device, routing, config.batch_size)
        return (
            config.gpu_mem == "auto"
            and config.expert_mem is None
            and asked
            == (
                self.device,
                self.routing,
                self.batch_size,
            )
        )

    def applied(self, config: EngineConfig) -> EngineConfig:
        """`config` with those of the options that nobody has set."""
        return EngineConfig(**{**self.knobs, **config.model_dump(exclude_unset=True)})

    def notice(self, slots: int, total: int, config: EngineConfig) -> str:
        """What the user should know of a plan of `slots` slots and `total` bytes that was made with it, for `config`
        as it was given.
        """
        changed = [name for name in KNOBS if name not in config.model_fields_set and name in self.knobs]
        options = ", ".join(f"{name} {self.knobs[name]}" for name in changed)
        enough = "" if slots >= self.slots else f" (it found {self.slots} slots worth having: free memory for more)"
        return (
            f"gpu_mem auto: {format_bytes(total)} for {slots} expert slots{f', {options}' if options else ''}, as dmoe "
            f"tune found for {self.device}{enough}; tuned = off takes what there is"
        )


class _Saved(BaseModel):
    """The file: JSON, one object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["offload_engine.tuned"] = "offload_engine.tuned"
    version: Literal[1] = 1
    checkpoint: str
    """See `experts.hot_set.fingerprint`."""
    found: tuple[Learned, ...]


def device_name(card: str | None) -> str:
    """The device as findings name it: a card by its name, without the memory that profiles add to it (it is the same
    card, and a budget is capped by what is free); None is the CPU.
    """
    if card is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return f"a CPU of {cores} cores"
    return re.sub(r" [0-9]+ ?GB$", "", card)


def routing_settings(name: str, options: RoutingOptions) -> Settings:
    """The options of the engine that route like that and decide how many experts a block wants."""
    if name != "dmoe":
        return {"routing": name}
    least, held = options.min_experts, options.hold_steps
    return {"routing": name, "top_p": options.top_p, "min_experts": least, "hold_steps": held}


def recall_tuning(directory: Path) -> Sequence[Learned]:
    """All that was found for the checkpoint in `directory`."""
    checkpoint = fingerprint(directory)
    for path in places(directory, FILE, KIND):
        try:
            with path.open("rb") as file:
                saved = _Saved.model_validate_json(file.read(_MAX_BYTES))
            if saved.checkpoint == checkpoint:
                return [one for one in saved.found if _usable(one.knobs)]
        except OSError:
            continue
        except ValidationError as error:
            logger.debug("%s: no findings of dmoe tune, ignored (%s)", path, error)
    return []


def remember_tuning(directory: Path, learned: Learned) -> Path | None:
    """Write it beside what was found for other devices and routings. Returns where; None if nowhere."""
    kept = [one for one in recall_tuning(directory) if _place(one) != _place(learned)]
    data = _Saved(checkpoint=fingerprint(directory), found=(*kept, learned)).model_dump()
    for path in places(directory, FILE, KIND):
        try:
            if path.parent != directory:  # a checkpoint that is gone stays gone
                path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, json.dumps(data, indent=1).encode() + b"\n")
        except OSError as error:
            logger.debug("%s: findings of dmoe tune not written (%s)", path, error)
        else:
            return path
    return None


def _place(learned: Learned) -> tuple[Any, ...]:
    return learned.device, learned.routing, learned.batch_size


def _usable(knobs: Settings) -> bool:
    """Whether this version has such options."""
    if not knobs.keys() <= set(KNOBS):
        return False
    values: dict[str, Any] = {**knobs}
    try:
        EngineConfig(**values)
    except ConfigError:
        return False
    return True
