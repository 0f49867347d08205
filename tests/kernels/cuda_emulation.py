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


def compiler() -> list[str]:
    """The command of the C++ compiler. Raises BuildError."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler found, so the CUDA kernels can't be emulated; install g++ or set CXX")


def emulate(target: Path, sources: Path = SOURCES) -> CudaLibrary:
    """The kernels in the folder `sources` as a library for the CPU. Raises BuildError."""
    options = [*FLAGS, f"-I{EMULATION}", f"-DDMOE_SOURCES={fingerprint()}", "-x", "c++"]
    return CudaLibrary(compile_into(target, [*compiler(), *options, str(sources / "select.cu")]))


def set_order(library: CudaLibrary, order: int) -> None:
    """Of the threads that can run: 0 rising, 1 falling, else drawn with this seed."""
    ctypes.CDLL(str(library.path)).emulation_order(ctypes.c_uint64(order))
