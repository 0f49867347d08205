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
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "cpu"
LIBRARY = HERE / "libexpert_ffn.so"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    *("-std=gnu11", "-O3", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-ffp-contract=off",  # every instruction set rounds alike
    "-fno-math-errno",
)
LIBRARIES = ("-lm",)  # for compilers that don't have a square root of their own


class BuildError(Exception):
    """The kernels can't be compiled here; the message says why, in one line."""


def fingerprint() -> str:
    """Of the sources: a library tells which ones it was built from."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def compiler() -> list[str]:
    """The command of the C compiler: `$CC`, or the first of `COMPILERS` that is there. Raises BuildError."""
    named = shlex.split(os.environ.get("CC", ""))
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"CC names {named[0]!r}, which is not there; unset CC or install it")
        return named
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C compiler found ({', '.join(COMPILERS)}); install gcc or clang, or set CC")


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


def main() -> int:
    """Build in place and say so."""
    try:
        sys.stdout.write(f"built {build()}\n")
    except BuildError as error:
        sys.stderr.write(f"kernels not built: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
