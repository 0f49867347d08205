"""Which experts were used most, remembered from one run to the next, so that the next one starts with them.

A hint and nothing more: it decides what idle transfers bring first, never a result. So nothing here raises: a memory
that is missing, damaged, of another checkpoint or can't be written is a run without it.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from offload_engine.core import ExpertKey
from offload_engine.files import write_aside

logger = logging.getLogger(__name__)

FILE: Final = ".hot-experts.json"
"""Its name beside a checkpoint."""
HALF_LIFE: Final = 256
"""Forwards after which a use counts half."""
LARGE_FILE: Final = 2**20
"""A file of a checkpoint this large holds weights, whatever it is called."""
_LARGEST_UNIT = 2.0**256
_MAX_BYTES = 16 << 20


class HotSet:
    """How often each expert was used, older uses counting less."""

    def __init__(self, shares: Iterable[tuple[ExpertKey, float]] = ()) -> None:
        self._unit = 1.0
        """What a use is worth now. It grows instead of all others fading, which keeps their order as it is."""
        self._uses: dict[int, dict[int, float]] = {}
        """By layer and expert."""
        for (layer, expert), uses in shares:
            self._uses.setdefault(layer, {})[expert] = uses
        self.forwards = 0
        """Forwards noted; 0: there is nothing new to remember."""

    def begin(self) -> None:
        """A forward starts."""
        self.forwards += 1
        self._unit *= 2.0 ** (1 / HALF_LIFE)
        if self._unit > _LARGEST_UNIT:
            for of_layer in self._uses.values():
                of_layer.update({expert: uses / self._unit for expert, uses in of_layer.items()})
            self._unit = 1.0

    def use(self, layer: int, experts: Sequence[int]) -> None:
        """`layer` uses these in the forward under way."""
        uses, unit = self._uses.setdefault(layer, {}), self._unit
        for expert in experts:
            uses[expert] = uses.get(expert, 0.0) + unit

    def hottest(self, count: int) -> list[tuple[ExpertKey, float]]:
        """The `count` experts used most, falling, with their faded uses; ties to the lower key."""
        ranks = ((-uses, layer, expert) for layer, of_layer in self._uses.items() for expert, uses in of_layer.items())
        return [(ExpertKey(layer, expert), -rank / self._unit) for rank, layer, expert in heapq.nsmallest(count, ranks)]


class _Saved(BaseModel):
    """The file: JSON, one object."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: Literal["offload_engine.hot_experts"] = "offload_engine.hot_experts"
    version: Literal[1] = 1
    checkpoint: str
    """See `fingerprint`."""
    experts: tuple[
        tuple[
            Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0, allow_inf_nan=False)]
        ],
        ...,
    ]
    """(layer, expert, faded uses), falling."""


class Remembered(NamedTuple):
    """What `recall` found."""

    hot: HotSet
    notice: str | None
    """What the user should know: that a file was there and made no sense."""


def fingerprint(directory: Path) -> str:
    """16 hexadecimal digits that tell one checkpoint from another by config.json and its weight files' names and sizes.

    Weights of the same shapes under the same names look alike: their hot experts are a worse hint, no wrong one.
    """
    digest = hashlib.sha256()
    try:
        digest.update((directory / "config.json").read_bytes())
        for path in sorted(directory.iterdir()):
            size = path.stat().st_size
            if path.is_file() and (path.suffix == ".safetensors" or size >= LARGE_FILE):
                digest.update(f"\n{path.name} {size}".encode())
    except OSError as error:
        logger.debug("%s: no fingerprint (%s)", directory, error)
    return digest.hexdigest()[:16]


def places(directory: Path, name: str = FILE, kind: str = "hot-experts") -> tuple[Path, ...]:
    """Where what was learned of the checkpoint in `directory` may be: beside it, else in the cache of a user who has
    one. `name` of the file beside it, `kind` of those in the cache.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        cache = base if base.is_absolute() else Path.home() / ".cache"  # the XDG specification ignores relative ones
    except RuntimeError:  # neither HOME nor an entry among the system's users
        return (directory / name,)
    return directory / name, cache / "offload_engine" / kind / f"{fingerprint(directory)}.json"


def recall(directory: Path, known: Iterable[ExpertKey]) -> Remembered:
    """The hot set last remembered for the checkpoint in `directory`, of `known` experts only; else an empty one."""
    checkpoint, keys = fingerprint(directory), frozenset(known)
    for path in places(directory):
        try:
            with path.open("rb") as file:
                data = file.read(_MAX_BYTES)
        except OSError:
            continue
        try:
            saved = _Saved.model_validate_json(data)
        except ValidationError:
            return Remembered(HotSet(), f"{path}: no memory of hot experts; ignored, and written anew at the end")
        if saved.checkpoint == checkpoint:
            shares = ((ExpertKey(layer, expert), uses) for layer, expert, uses in saved.experts)
            return Remembered(HotSet((key, uses) for key, uses in shares if key in keys), None)
    return Remembered(HotSet(), None)


def remember(directory: Path, hot: HotSet, count: int) -> Path | None:
    """Write the `count` hottest experts, all or nothing. Returns where; None if nothing or nowhere to write."""
    if not hot.forwards or not count:
        return None
    experts = tuple((key.layer, key.expert, float(f"{uses:.4g}")) for key, uses in hot.hottest(count))
    data = _Saved(checkpoint=fingerprint(directory), experts=experts).model_dump()
    for path in places(directory):
        try:
            if path.parent != directory:  # a checkpoint that is gone stays gone
                path.parent.mkdir(parents=True, exist_ok=True)
            write_aside(path, json.dumps(data, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            logger.debug("%s: hot experts not written (%s)", path, error)
        else:
            return path
    return None
