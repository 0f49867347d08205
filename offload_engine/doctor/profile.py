"""A hardware profile: what this machine was measured to give, as a TOML file.

Each figure is a table `{ value, unit, source }`, with `estimate = true` where nothing measured it. `profile_of` has
the figures of a machine without a GPU.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from offload_engine.bench.spec import Bandwidth
from offload_engine.config import format_bytes
from offload_engine.errors import OffloadError
from offload_engine.files import write_aside


@dataclass(frozen=True, slots=True)
class Figure:
    """One number and where it comes from."""

    value: float
    unit: str
    source: str
    estimate: bool = False

    def as_dict(self) -> dict[str, float | str | bool]:
        """As the file has it."""
        found: dict[str, float | str | bool] = {"value": self.value, "unit": self.unit, "source": self.source}
        return found | ({"estimate": True} if self.estimate else {})


@dataclass(frozen=True, slots=True)
class Profile:
    """One machine."""

    name: str
    """Lower-case letters, digits and hyphens."""
    title: str
    device: str
    figures: dict[str, Figure]

    def as_dict(self) -> dict[str, object]:
        """The file's content, for JSON."""
        heads: dict[str, object] = {"name": self.name, "title": self.title, "device": self.device}
        return heads | {name: figure.as_dict() for name, figure in self.figures.items()}

    def text(self) -> str:
        """The file's content, TOML."""
        lines = ["# Measured by dmoe doctor --measure."]
        lines += [f"{key} = {_quoted(getattr(self, key))}" for key in ("name", "title", "device")]
        for name, figure in self.figures.items():
            pairs = ", ".join(f"{key} = {_quoted(value)}" for key, value in figure.as_dict().items())
            lines.append(f"{name} = {{ {pairs} }}")
        return "\n".join(lines)


def profile_of(bandwidth: Bandwidth, processor: str, memory: int) -> Profile:
    """The profile of a machine that runs models on its CPU. `memory`: bytes of RAM."""
    depth, rate = max(bandwidth.disk.items(), key=lambda pair: pair[1])
    way = "direct" if bandwidth.direct else "through the page cache"
    reads = f"whole experts of {format_bytes(bandwidth.slab_bytes)} at random, {depth} under way, {way}"
    within = "contained in the rate, which was measured"
    title = processor or "this machine"
    figures = {
        "memory": Figure(memory, "B", "the system"),
        "memory_bandwidth": _measured(bandwidth.dram, "B/s", "a sum over memory that no cache holds"),
        "memory_efficiency": Figure(1, "1", within),
        "compute": _measured(bandwidth.gemm, "FLOP/s", "a bf16 product"),
        "compute_efficiency": Figure(1, "1", within),
        "overlap": Figure(1, "1", "not measured: the plain roofline", estimate=True),
        "launch": Figure(0, "s", "not measured", estimate=True),
        "readback": Figure(0, "s", "no device to read back from"),
        "layer": Figure(0, "s", "not measured", estimate=True),
        "expert": Figure(0, "s", "not measured", estimate=True),
        "disk_bandwidth": _measured(rate, "B/s", reads),
        "disk_latency": Figure(0, "s", within),
    }
    return Profile(re.sub("[^a-z0-9]+", "-", title.lower()).strip("-"), title, "cpu", figures)


def write_profile(path: Path, profile: Profile) -> None:
    """Write it whole or not at all. Raises `OffloadError`."""
    try:
        write_aside(path, f"{profile.text()}\n".encode())
    except OSError as error:
        raise OffloadError(f"{path}: can't be written ({error.strerror}); name another file with --out") from None


def _measured(rate: float, unit: str, source: str) -> Figure:
    """To three significant digits: no two runs measure the same."""
    return Figure(float(f"{rate:.3g}"), unit, source)


def _quoted(value: object) -> str:
    """As TOML writes it, which for these kinds is as JSON does."""
    return json.dumps(value, ensure_ascii=False)
