"""A hardware profile: what a machine was measured to give, as a TOML file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from offload_engine.bench.spec import Bandwidth
from offload_engine.errors import OffloadError
from offload_engine.files import write_aside


@dataclass(frozen=True, slots=True)
class Profile:
    """Rates of one machine that runs models on its CPU, experts on its disk."""

    name: str
    disk_bytes_per_second: float
    """At the best of the depths measured."""
    disk_depth: int
    """Reads under way at that rate."""
    disk_read_bytes: int
    """Size of each read: one expert of the model it was measured with."""
    disk_direct: bool
    memory_bytes_per_second: float
    flops: float
    """bf16 operations per second."""

    def as_dict(self) -> dict[str, str | int | float | bool]:
        """By name, for JSON."""
        return asdict(self)

    def text(self) -> str:
        """The file's content."""
        lines = [
            "# Measured by dmoe doctor --measure: whole experts at random places of the model's files, a sum over",
            "# memory that no cache holds, and a bf16 product.",
        ]
        return "\n".join([*lines, *(f"{key} = {json.dumps(value)}" for key, value in self.as_dict().items())])


def profile_of(bandwidth: Bandwidth, name: str) -> Profile:
    """The rates that a bandwidth measurement gave, to three significant digits."""
    depth, rate = max(bandwidth.disk.items(), key=lambda pair: pair[1])
    return Profile(
        name=name or "this machine",
        disk_bytes_per_second=_rounded(rate),
        disk_depth=depth,
        disk_read_bytes=bandwidth.slab_bytes,
        disk_direct=bandwidth.direct,
        memory_bytes_per_second=_rounded(bandwidth.dram),
        flops=_rounded(bandwidth.gemm),
    )


def write_profile(path: Path, profile: Profile) -> None:
    """Write it whole or not at all. Raises `OffloadError`."""
    try:
        write_aside(path, f"{profile.text()}\n".encode())
    except OSError as error:
        raise OffloadError(f"{path}: can't be written ({error.strerror}); name another file with --out") from None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
