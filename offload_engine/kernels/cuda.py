"""Finds and loads the compiled CUDA kernels, and tells why they aren't in use where they aren't."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from offload_engine.errors import DeviceError
from offload_engine.kernels.library import CHOICE
from offload_engine.kernels.loading import UnavailableError, load

REBUILD = "run `make cuda`"
OLDEST = (7, 5)
"""Compute capability of the oldest cards that the kernels are built for."""
REFUSED = -1
"""`dmoe_cuda_select` was given sizes that it has no room for."""

_INT32, _INT64, _POINTER = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class SelectionCall(ctypes.Structure):
    """`dmoe_selection` of cuda/select.cu, which says what each field means."""

    _fields_ = (
        ("tokens", _INT64),
        *((name, _INT32) for name in ("experts", "blocks", "choices", "groups", "kept_groups", "least", "normalise")),
        ("scale", ctypes.c_float),
        ("top_p", ctypes.c_double),
        *((name, _POINTER) for name in ("block_ids", "logits", "bias", "scores", "selection")),
        *((name, _POINTER) for name in ("chosen", "weights", "coreset", "block_scores", "used")),
        *((name, _POINTER) for name in ("table", "slots", "missing", "sums", "finished")),
    )


class CudaLibrary:
    """A loaded library of CUDA kernels.

    Raises UnavailableError if `path` (default: where the build leaves it) is absent, can't be loaded, or was built from
    other sources than those in this checkout.
    """

    def __init__(self, path: Path | None = None) -> None:
        from offload_engine.kernels.cuda_build import LIBRARY, fingerprint  # here, for `python -m` runs it afresh

        path = path or LIBRARY
        library = load(path, "dmoe_cuda_sources", fingerprint(), REBUILD)
        try:
            library.dmoe_cuda_error.restype = ctypes.c_char_p
            library.dmoe_cuda_select.argtypes = [ctypes.POINTER(SelectionCall), _POINTER]
        except AttributeError as error:
            raise UnavailableError(f"{path.name} can't be loaded ({error}): {REBUILD}") from error
        self.path = path
        self.device_type = "cpu" if hasattr(library, "emulation_order") else "cuda"
        """Where it works: the tests' build emulates a device on the CPU."""
        self._library = library

    def select(self, call: SelectionCall, stream: int | None) -> None:
        """Enqueue a selection, its fields checked, on the CUDA stream of this handle (None: the default stream).

        Raises ValueError where the kernel has no room for the sizes, DeviceError where the device refuses.
        """
        failure = self._library.dmoe_cuda_select(ctypes.byref(call), stream)
        if failure == REFUSED:
            sizes = f"{call.experts} experts, {call.choices} of them per token, in {call.groups} groups"
            raise ValueError(f"{sizes}, {call.blocks} blocks don't fit the CUDA kernel")
        if failure:
            told = self._library.dmoe_cuda_error(failure).decode()
            raise DeviceError(f"the CUDA kernel for expert selection failed with error {failure}: {told}")


@dataclass(frozen=True, slots=True)
class CudaStatus:
    """What selects experts on a CUDA device."""

    library: CudaLibrary | None
    """None: torch does."""
    reason: str
    """Why, in one line."""


def choose(library: CudaLibrary | str, choice: str, capability: tuple[int, int] | None) -> CudaStatus:
    """Whether `library`, or the reason that there is none, serves a device of this compute capability (None: there is
    no device); `choice` off means no.
    """
    if choice == "off":
        return CudaStatus(None, f"{CHOICE} is off")
    if isinstance(library, str):
        return CudaStatus(None, library)
    if capability is None:
        return CudaStatus(None, "torch finds no CUDA device")
    found = f"compute capability {capability[0]}.{capability[1]}"
    if capability < OLDEST:
        return CudaStatus(None, f"the device has {found}, the CUDA kernels want {OLDEST[0]}.{OLDEST[1]} or newer")
    return CudaStatus(library, f"built for {found}")


@cache
def _loaded() -> CudaLibrary | str:
    try:
        return CudaLibrary()
    except UnavailableError as error:
        return str(error)


@cache
def status(device: int = 0) -> CudaStatus:
    """What selects experts on this CUDA device in this process, decided once."""
    capability = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
    return choose(_loaded(), os.environ.get(CHOICE) or "auto", capability)
