"""Compiles the CUDA kernels: `make cuda`, or `python -m offload_engine.kernels.cuda_build`, in place.

Needs the repository (its folder cuda/) and nvcc, but no GPU. Standard library only.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from offload_engine.kernels.build import BuildError, command_named_by, compile_into, digest, run

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "cuda"
LIBRARY = HERE / "libdmoe_cuda.so"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
"""Machine code for these, which their minor successors run too; later cards translate the last one's PTX."""
FLAGS = (
    *("-std=c++17", "-O3", "--shared", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"),
    "-fmad=false",  # rounds as the CPU does
    *("--threads", "0"),
)


def fingerprint() -> str | None:
    """Of the sources: a library tells which ones it was built from. None where they aren't at hand."""
    sources = [path for path in SOURCES.glob("*") if path.suffix in {".cu", ".cuh", ".h"}]
    return digest(sources) if sources else None


def nvcc() -> list[str]:
    """The command of CUDA's compiler: `$NVCC`, or nvcc on the path or under `$CUDA_HOME`. Raises BuildError."""
    named = command_named_by("NVCC")
    if named:
        return named
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)
    if found is None:
        raise BuildError("no nvcc found; install the CUDA toolkit, put its bin folder on PATH, or set NVCC")
    return [found]


def build(target: Path = LIBRARY, architectures: tuple[int, ...] = ARCHITECTURES) -> Path:
    """Compile for these compute capabilities (75 is 7.5), rising, into `target`. Raises BuildError."""
    sources = [str(path) for path in sorted(SOURCES.glob("*.cu"))]
    if not sources:
        raise BuildError(f"no *.cu in {SOURCES}; build the CUDA kernels in a checkout of the repository")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    return compile_into(target, [*nvcc(), *FLAGS, *codes, f"-DDMOE_SOURCES={fingerprint()}", *sources])


def main() -> int:
    """Build in place and say so."""
    return run(build, "CUDA kernels")


if __name__ == "__main__":
    sys.exit(main())
