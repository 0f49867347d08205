"""What doctor says of the kernels for a GPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from offload_engine.doctor import device_kernels
from offload_engine.doctor.device_kernels import check_cuda_kernels, check_triton, read_cuda_kernels, read_triton
from offload_engine.doctor.finding import Level
from offload_engine.kernels import cuda, grouped


@pytest.mark.parametrize(
    ("reason", "nvcc", "way_out"),
    [
        ("lib.so is not built: run `make cuda`", "/usr/bin/nvcc", "run `make cuda` in a checkout"),
        ("lib.so is not built: run `make cuda`", None, "install the CUDA toolkit (nvcc is not on the PATH), then run"),
        ("lib.so was built from other sources (a, not b): run `make cuda`", "/nvcc", "run `make cuda` in a checkout"),
        ("OFFLOAD_ENGINE_KERNEL is off", None, "unset OFFLOAD_ENGINE_KERNEL"),
        ("the device has compute capability 7.0, the CUDA kernels want 7.5 or newer", "/nvcc", ""),
        ("torch finds no CUDA device", None, ""),
    ],
)
def test_where_torch_selects_the_way_out_is_told_if_there_is_one(reason: str, nvcc: str | None, way_out: str) -> None:
    found = check_cuda_kernels(False, reason, nvcc)
    assert found.found == f"torch selects experts, in some dozen launches instead of one: {reason}"
    assert found.way_out.startswith(way_out)
    assert (found.level is Level.WARNING) == bool(way_out) == bool(found.way_out)


def test_kernels_in_use() -> None:
    found = check_cuda_kernels(True, "built for compute capability 8.9", None)
    assert (found.level, found.found, found.way_out) == (Level.OK, "built for compute capability 8.9", "")
    assert check_triton(None).level is Level.OK


@pytest.mark.parametrize(
    ("reason", "way_out"),
    [
        ("Triton is not installed", "pip install triton"),
        ("OFFLOAD_ENGINE_TRITON is off", "unset OFFLOAD_ENGINE_TRITON"),
        ("Triton fails here: RuntimeError: no ptxas", "install the version of Triton"),
        ("compute capability 7.5, and Triton wants 8.0", ""),
    ],
)
def test_where_triton_does_not_compute(reason: str, way_out: str) -> None:
    found = check_triton(reason)
    assert reason in found.found
    assert found.way_out.startswith(way_out)
    assert (found.level is Level.WARNING) == bool(way_out) == bool(found.way_out)


def test_the_device_asked_for_is_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(grouped, "why_not", lambda device: (asked.append(device), "it is")[1])
    monkeypatch.setattr(cuda, "status", lambda index: (asked.append(index), cuda.CudaStatus(None, "it isn't"))[1])
    assert read_triton(1) == "it is"
    assert read_cuda_kernels(1) == (False, "it isn't")
    assert asked == [torch.device("cuda", 1), 1]
    assert read_triton(2) in ("Triton is not installed", "torch finds no CUDA device")


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_gpu_for_torch_triton_is_looked_for_only(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert read_triton(0) == ("torch finds no CUDA device" if installed else "Triton is not installed")
    assert device_kernels.TRITON == "Triton"
