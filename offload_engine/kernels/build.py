"""Compiles the kernels: `python -m offload_engine.kernels.build`, in place. Installing the package does the same.

Standard library only: the build hook runs this file before the package, or torch, is there.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "cpu"
LIBRARY = HERE / "libexpert_ffn.so"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-ffp-contract=off",  # every instruction set rounds alike
    "-fno-math-errno",
    "-fno-trapping-math",  # gcc turns no comparison of floats into vectors otherwise
)
LIBRARIES = ("-lm",)  # for compilers that don't have a square root of their own


class BuildError(Exception):
    """The kernels can't be compiled here; the message says why, in one line."""


def fingerprint() -> str:
    """Of the sources: a library tells which ones it was built from."""
    return digest(SOURCES.glob("*.[ch]"))


def digest(sources: Iterable[Path]) -> str:
    """16 hexadecimal digits that tell these files from others, whatever their order."""
    whole = hashlib.sha256()
    for source in sorted(sources):
        whole.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def compiler() -> list[str]:
    """The command of the C compiler: `$CC`, or the first of `COMPILERS` that is there. Raises BuildError."""
    named = command_named_by("CC")
    if named:
        return named
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C compiler found ({', '.join(COMPILERS)}); install gcc or clang, or set CC")


def command_named_by(variable: str) -> list[str]:
    """The command in this environment variable; empty if it is unset. Raises BuildError if it isn't there."""
    named = shlex.split(os.environ.get(variable, ""))
    if named and shutil.which(named[0]) is None:
        raise BuildError(f"{variable} names {named[0]!r}, which is not there; unset {variable} or install it")
    return named


def build(target: Path = LIBRARY) -> Path:
    """Compile the CPU kernels into `target`. Raises BuildError."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.c"))]
    return compile_into(target, [*compiler(), *FLAGS, f"-DDMOE_SOURCES={fingerprint()}", *sources, *LIBRARIES])


def compile_into(target: Path, command: list[str]) -> Path:
    """Run a compiler's `command` for `target`, written aside and renamed. Raises BuildError."""
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as directory:
            output = Path(directory) / target.name
            done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True, check=False)
            if done.returncode:
                complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
                raise BuildError(f"{command[0]} failed with exit code {done.returncode}: {complaint}")
            output.replace(target)
    except OSError as error:
        raise BuildError(f"{target} can't be built: {error}") from error
    return target


def run(build: Callable[[], Path], kernels: str) -> int:
    """Have `build` build these `kernels` and say so; returns the exit code."""
    try:
        sys.stdout.write(f"built {build()}\n")
    except BuildError as error:
        sys.stderr.write(f"{kernels} not built: {error}\n")
        return 1
    return 0


def main() -> int:
    """Build in place and say so."""
    return run(build, "kernels")


if __name__ == "__main__":
    sys.exit(main())
