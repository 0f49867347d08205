"""The CUDA kernels compiled for the CPU, against cuda/emulation/cuda_runtime.h."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
from pathlib import Path

from offload_engine.kernels.build import BuildError, compile_into
from offload_engine.kernels.cuda import CudaLibrary
from offload_engine.kernels.cuda_build import SOURCES, fingerprint

EMULATION = SOURCES / "emulation"
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra")

RISING, FALLING = 0, 1
"""Orders of threads that can run; any other number is a seed."""


def compiler() -> list[str]:
    """The command of the C++ compiler. Raises BuildError."""
    for command in ([os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]):
        if shutil.which(shlex.split(command)[0]):
            return shlex.split(command)
    raise BuildError("no C++ compiler found, so the CUDA kernels can't be emulated; install g++ or set CXX")


def emulate(target: Path, sources: Path = SOURCES) -> CudaLibrary:
    """The kernels in the folder `sources` as a library for the CPU. Raises BuildError."""
    options = [*FLAGS, f"-I{EMULATION}", f"-DDMOE_SOURCES={fingerprint()}", "-x", "c++"]
    return CudaLibrary(compile_into(target, [*compiler(), *options, str(sources / "select.cu")]))


def set_order(library: CudaLibrary, order: int) -> None:
    ctypes.CDLL(str(library.path)).emulation_order(ctypes.c_uint64(order))
