"""The kernels, compiled for this run from the sources as they are."""

from __future__ import annotations

import pytest
from cuda_emulation import emulate

from offload_engine.kernels import build
from offload_engine.kernels.cuda import CudaLibrary
from offload_engine.kernels.library import Library


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    try:
        built = build.build(tmp_path_factory.mktemp("kernels") / "libexpert_ffn.so")
    except build.BuildError as error:
        pytest.skip(str(error))
    return Library(built)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> CudaLibrary:
    """The CUDA kernels, on the CPU."""
    try:
        return emulate(tmp_path_factory.mktemp("cuda") / "libdmoe_cuda_emulated.so")
    except build.BuildError as error:
        pytest.skip(str(error))
