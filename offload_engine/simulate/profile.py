"""Hardware profiles: what a machine can do, each figure with its unit and where it comes from.

A profile is a TOML file; those of this package lie in `profiles/`. Every figure is a table `{ value, unit, source }`,
and `estimate = true` where nobody published or measured it.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from offload_engine.core import usage_error
from offload_engine.errors import UsageError

PROFILES: Final = Path(__file__).parent / "profiles"
HOST: Final = ("host_bandwidth", "host_compute")
"""Figures of the CPU beside a GPU; without them no expert can be computed there."""
UNITS: Final = {
    "memory": "B",
    "memory_bandwidth": "B/s",
    "memory_efficiency": "1",
    "compute": "FLOP/s",
    "compute_efficiency": "1",
    "overlap": "1",
    "launch": "s",
    "readback": "s",
    "selection": "s",
    "layer": "s",
    "expert": "s",
    "link_bandwidth": "B/s",
    "link_efficiency": "1",
    "pageable_bandwidth": "B/s",
    "link_latency": "s",
    "host_memory": "B",
    "host_bandwidth": "B/s",
    "host_compute": "FLOP/s",
    "disk_bandwidth": "B/s",
    "disk_latency": "s",
}
"""Of every figure of a profile; a file that says another is refused."""
LINK: Final = ("link_bandwidth", "link_efficiency", "pageable_bandwidth", "link_latency", "host_memory")
"""Figures of what lies between a GPU and its host; a CPU has none of them."""


class Figure(BaseModel):
    """One number, and why anybody should believe it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    unit: str
    source: Annotated[str, Field(min_length=1)]
    """Who published it, or what it was measured with; of an estimate, its grounds."""
    estimate: bool = False


class Profile(BaseModel):
    """One machine. Times add up as `simulate.timing` says; a figure's unit is that of `UNITS`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(min_length=1)]
    title: str
    device: Literal["cuda", "cpu"]
    memory: Figure
    """Fast memory: VRAM, or the RAM of a machine without a GPU."""
    memory_bandwidth: Figure
    memory_efficiency: Figure
    """Share of it that a kernel which only reads weights gets."""
    compute: Figure
    """16-bit products with float32 sums, dense."""
    compute_efficiency: Figure
    """Share of it that products of our shapes get."""
    overlap: Figure
    """1: a kernel takes the longer of its memory and its arithmetic time; 0: their sum."""
    launch: Figure
    """Host time per kernel or operation."""
    readback: Figure
    """From a layer's routing on the device to the host's knowing what is missing; once per MoE layer."""
    selection: Figure
    """Time to choose experts from router scores; once per MoE layer, and per preview."""
    layer: Figure
    """Host time per MoE layer: books, prediction, Python."""
    expert: Figure
    """Host time per expert wanted: books."""
    link_bandwidth: Figure | None = None
    """Of the slot the card is in, as specified, one direction."""
    link_efficiency: Figure | None = None
    """Share of it that copies from pinned memory get."""
    pageable_bandwidth: Figure | None = None
    """Of copies from memory that is not pinned."""
    link_latency: Figure | None = None
    host_memory: Figure | None = None
    """RAM of a usual machine with this card; not a property of the card."""
    host_bandwidth: Figure | None = None
    """At which that machine's CPU reads an expert's weights from RAM while it computes one token with them."""
    host_compute: Figure | None = None
    """What every further token of an expert comes to there."""
    disk_bandwidth: Figure
    """Direct reads of whole experts, two under way."""
    disk_latency: Figure

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        for name, unit in UNITS.items():
            figure: Figure | None = getattr(self, name)
            if figure is not None and figure.unit != unit:
                raise ValueError(f"{name} is in {figure.unit!r}, wanted {unit!r}")
            if figure is not None and unit in ("B", "B/s", "FLOP/s") and figure.value == 0:
                raise ValueError(f"{name} is 0, wanted more")
            if figure is not None and unit == "1" and not (0 if name == "overlap" else 1e-6) <= figure.value <= 1:
                raise ValueError(f"{name} is {figure.value}, wanted a share of at most 1")
        found = [name for name in LINK if getattr(self, name) is not None]
        wanted = list(LINK) if self.device == "cuda" else []
        if found != wanted:
            odd = ", ".join(name for name in LINK if (name in found) != (name in wanted))
            raise ValueError(f"device is {self.device!r}, which {'needs' if wanted else 'has no'} {odd}")
        told = [name for name in HOST if getattr(self, name) is not None]
        if told and (self.device == "cpu" or len(told) < len(HOST)):
            raise ValueError(f"{' and '.join(HOST)} belong together, and to a machine with a GPU; found {told[0]}")
        return self

    @property
    def shares(self) -> bool:
        """Whether it says what an expert takes on the CPU beside the GPU."""
        return self.host_bandwidth is not None

    def with_values(self, source: str, **values: float) -> Profile:
        """The same with some figures measured; `source` says by what."""
        unknown = [name for name in values if getattr(self, name, None) is None or name not in UNITS]
        if unknown:
            raise UsageError(f"profile {self.name}: has no figure {unknown[0]!r}")
        changed = {
            name: Figure(value=value, unit=UNITS[name], source=source).model_dump() for name, value in values.items()
        }
        return Profile.model_validate(self.model_dump() | changed)

    def toml(self) -> str:
        """The profile as a file that `load_profile` reads."""
        lines = [f"{name} = {_quoted(getattr(self, name))}" for name in ("name", "title", "device")]
        for name in UNITS:
            figure: Figure | None = getattr(self, name)
            if figure is not None:
                fields = [f"value = {figure.value!r}", f"unit = {_quoted(figure.unit)}"]
                fields += [f"source = {_quoted(figure.source)}", *(["estimate = true"] if figure.estimate else [])]
                lines.append(f"{name} = {{ {', '.join(fields)} }}")
        return "\n".join(lines) + "\n"


def profile_names() -> list[str]:
    """The profiles of this package, in alphabetical order."""
    return sorted(path.stem for path in PROFILES.glob("*.toml"))


def load_profile(name: str) -> Profile:
    """A profile of this package by its name or an unambiguous beginning of it, or a file ending in .toml.

    Raises `UsageError` for a name that fits none or several, and for a file that makes no sense.
    """
    path = Path(name) if name.endswith(".toml") else _shipped(name)
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror}); name a profile: {_choices()}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: no TOML ({error})") from None
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        raise usage_error(error, f"{path}: profile") from None


def _quoted(text: str) -> str:
    """A basic string of TOML, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def _shipped(name: str) -> Path:
    fitting = [known for known in profile_names() if known.startswith(name.lower())] if name else []
    if name.lower() in fitting:
        fitting = [name.lower()]
    if len(fitting) != 1:
        problem = f"fits {' and '.join(fitting)}" if fitting else "is no profile"
        raise UsageError(f"--gpu {name!r} {problem}; choose one of {_choices()}, or a .toml file")
    return PROFILES / f"{fitting[0]}.toml"


def _choices() -> str:
    return ", ".join(profile_names())
