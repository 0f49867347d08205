"""The kernels in plain C give the same bits whatever compiles them, and on Arm as on x86-64."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from offload_engine.kernels.build import FLAGS, LIBRARIES, SOURCES

DRIVER = Path(__file__).parent / "portability.c"
MACHINES = {
    "gcc": (["gcc"], []),
    "clang": (["clang"], []),
    "gcc without optimisation": (["gcc", "-O0"], []),
    "gcc for Arm": (["aarch64-linux-gnu-gcc", "-static"], ["qemu-aarch64-static"]),
}
"""How to compile for a machine, and what runs its programs here."""


def digests(machine: str, directory: Path) -> list[str]:
    """What the driver prints on `machine`; skips where this one lacks a tool for that."""
    compiler, emulator = MACHINES[machine]
    for tool in (compiler[0], *emulator):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = directory / "driver"
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    sources = [str(path) for path in [*sorted(SOURCES.glob("*.c")), DRIVER]]
    options = [*flags, *compiler[1:], "-DDMOE_SOURCES=x", f"-I{SOURCES}"]
    command = [compiler[0], *options, *sources, *LIBRARIES, "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    done = subprocess.run([*emulator, str(program)], check=True, capture_output=True, text=True, timeout=300)
    return done.stdout.splitlines()


@pytest.mark.parametrize("machine", [name for name in MACHINES if name != "gcc"])
def test_every_compiler_and_machine_gives_the_same_bits(machine, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    found = digests(machine, there)
    assert found == digests("gcc", here)
    assert len(found) == 19
    assert not [line for line in found if "failed" in line]
